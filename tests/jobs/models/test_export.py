"""`moray export`: what transformers makes of the folder is what the run's model says, number by number."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from moray.jobs.cli import dispatch
from moray.jobs.generation.generate import load_run
from moray.model.hf.families import FAMILIES
from moray.parallel.checkpoint import weights as weights_of_commits
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
RUNS: dict[str, dict[str, object]] = {
    # DeepSeek-V3's routing with QK-norm: dense first layer, shared expert, groups, a routing bias that has moved.
    "glm4_moe": {"model__moe__bias_update_rate": 0.1, "train__steps": 3},
    "qwen3": {"model__moe": "none"},
    "qwen3_moe": {"model__preset": "minimind-3-moe"},
    "llama": {"model__moe": "none", "model__attention__qk_norm": "none", "model__tied_embeddings": "false"},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short run of a model that the family can express; its folder is named after the family."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    plan = {"train__steps": 2, "train__eval_every": 0, "optimizer__lr": 0.01, "model__init__std": 0.2}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, folder, **{**plan, **RUNS[request.param]})]) == 0
        yield folder


def test_transformers_computes_the_same_logits(moray: Moray, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    outcome = moray("export", run, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert AutoConfig.from_pretrained(out).model_type == run.name
    decoder, tokenizer = load_run(run, pytest.fail)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    tokens_BT = torch.randint(0, 400, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = theirs(tokens_BT).logits
        torch.testing.assert_close(decoder(tokens_BT), truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_run(out, pytest.fail)[0](tokens_BT), truth, rtol=1e-5, atol=1e-5)
    assert truth.std() > 0.2, "or anything would be close"
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def read(")]])
    with torch.no_grad():
        text = tokenizer.decode(theirs.generate(prompt, max_new_tokens=8, do_sample=False)[0, 1:].tolist())
    ours = moray("generate", run, "--prompt", "def read(", "--temperature", 0, "--max-new-tokens", 8).out
    assert text.split("<|eos|>")[0].split("<|im_end|>")[0] in ours


@pytest.mark.parametrize("run", ["glm4_moe"], indirect=True)
class TestFolder:
    def test_the_tokenizer_is_the_runs_and_knows_a_dialogue(self, moray: Moray, run: Path, tmp_path: Path) -> None:
        assert moray("export", run, "--out", tmp_path / "hf").code == 0
        theirs, (_, ours) = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_run(run, pytest.fail)
        text = "def f(x):\n    return 'é漢🐟'\n"
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
        assert (theirs.pad_token_id, theirs.model_max_length) == (ours.pad_id, 2048)
        dialogue = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        expected = "<|bos|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
        assert theirs.apply_chat_template(dialogue, tokenize=False) == expected
        asked = theirs.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
        assert asked == "<|bos|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        ends = [ours.eos_id, ours.backend.token_to_id("<|im_end|>")]
        generation = GenerationConfig.from_pretrained(tmp_path / "hf")
        assert (generation.bos_token_id, generation.eos_token_id) == (ours.bos_id, ends)
        assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == ours.eos_id

    def test_a_template_that_the_tokenizer_has_stays(self, moray: Moray, run: Path, tmp_path: Path) -> None:
        out = tmp_path / "hf"
        path = run / "tokenizer" / "chat_template.jinja"
        path.write_text("{{ messages[0]['content'] }}!")
        try:
            assert moray("export", run, "--out", out).code == 0
        finally:
            path.unlink()
        theirs = AutoTokenizer.from_pretrained(out)
        assert theirs.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"

    def test_bf16_halves_the_file_and_rounds_but_the_routing_bias(
        self, moray: Moray, run: Path, tmp_path: Path
    ) -> None:
        files = {}
        for dtype in ("float32", "bfloat16"):
            assert moray("export", run, "--out", tmp_path / dtype, "--dtype", dtype).code == 0
            files[dtype] = safe_open(tmp_path / dtype / "model.safetensors", framework="pt")
        for name in files["float32"].keys():  # noqa: SIM118
            exact, rounded = (files[dtype].get_tensor(name) for dtype in ("float32", "bfloat16"))
            kept = torch.float32 if "correction_bias" in name else torch.bfloat16
            assert rounded.dtype == kept
            assert torch.equal(rounded, exact.to(kept))
        bias = files["bfloat16"].get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.any(), "it comes along"
        assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_a_folder_in_use_is_refused(self, moray: Moray, run: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("dear")
        outcome = moray("export", run, "--out", tmp_path)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"out={tmp_path} is not empty" in outcome.err

    def test_what_fails_on_the_way_leaves_nothing(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = 0

        def fail_later(self: object, name: str, box: object) -> torch.Tensor:
            nonlocal reads
            reads += 1
            if reads > 5:
                raise OSError(5, "Input/output error")
            return torch.zeros([part.stop - part.start for part in box])  # type: ignore[attr-defined]

        monkeypatch.setattr(weights_of_commits.CommitWeights, "read", fail_later)
        with pytest.raises(OSError, match="Input/output"):
            dispatch(["export", str(run), "--out", str(tmp_path / "hf")])
        assert not list(tmp_path.iterdir())


def test_what_no_family_can_express_is_named_in_one_line(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    plan = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1, "model__norm__kind": "crmsnorm"}
    assert moray("pretrain", *tiny(dataset, tmp_path / "run", **plan)).code == 0
    outcome = moray("export", tmp_path / "run", "--out", tmp_path / "hf")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "no Hugging Face family expresses this model" in line
    assert "norm.kind=crmsnorm" in line
    assert not (tmp_path / "hf").exists()
    assert list_commits(tmp_path / "run" / "checkpoints")


def test_a_format_that_transformers_does_not_load_is_told(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two_heads = {"model__attention__n_heads": 4, "model__attention__n_kv_heads": 2, "model__attention__head_dim": 8}
    plan = {"model__preset": "minimind2-moe", "train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}
    # One width for experts and dense layers, as in MiniMind.
    shape = {"model__moe__expert_width": 48, "model__moe__n_experts": 4, "model__moe__top_k": 2}
    assert dispatch(["pretrain", *tiny(dataset, run, **plan, **shape, **two_heads)]) == 0
    outcome = moray("export", run, "--out", tmp_path / "hf")
    assert outcome.code == 0
    assert "transformers has no model_type minimind" in outcome.err
    assert CONFIG_MAPPING_NAMES.keys() & {f.model_type for f in FAMILIES} == {
        f.model_type for f in FAMILIES if f.in_transformers
    }
