"""LoRA runs from the command line: what learns, what is committed, and who reads it without knowing of adapters."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_from
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from moray import UserError
from moray.cluster.events import read_events
from moray.jobs.cli import dispatch
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.generation.generate import load_run
from moray.jobs.models.base import identify
from moray.jobs.models.weights import locate, open_weights
from moray.jobs.training.metrics import read_metrics
from moray.model.tensors import tensor_shapes, whole
from moray.parallel.checkpoint.commits import list_commits, read_tensors

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
LORA: dict[str, object] = {
    "lora__rank": 8,
    "lora__alpha": 12,
    "train__steps": 4,
    "train__eval_every": 0,
    "checkpoint__every": 2,
    "optimizer__lr": 0.01,
    "optimizer__warmup_steps": 1,
}


def in_this_process(*words: str) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch([*words]) == 0


def made(config: Any, dataset: Path, folder: Path) -> Path:
    """A random model as transformers saves it, with the dataset's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dataset / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def llama(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return made(config, dataset, tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="module")
def moe(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a dense layer, shared and routed experts, whose routing bias has moved."""
    folder = tmp_path_factory.mktemp("runs") / "moe"
    changes = {"model__moe__bias_update_rate": 0.1, "model__moe__balance_loss": 0.05, "train__steps": 2}
    in_this_process("pretrain", *tiny(dataset, folder, **changes, train__eval_every=0))
    return folder


@pytest.fixture(scope="module")
def of_moe(moe: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapters"
    in_this_process("pretrain", *tiny_from(moe, dataset, folder, **LORA))
    return folder


@pytest.fixture(scope="module")
def of_llama(llama: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapters"
    in_this_process("pretrain", *tiny_from(llama, dataset, folder, **LORA))
    return folder


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(list_commits(run / "checkpoints")[-1]))


def test_the_first_step_is_the_bases_own_and_later_ones_learn(
    moe: Path, of_moe: Path, dataset: Path, tmp_path: Path
) -> None:
    still = {**LORA, "lora__rank": 0, "lora__alpha": "none", "optimizer__lr": 1e-12, "model__moe__bias_update_rate": 0}
    in_this_process("pretrain", *tiny_from(moe, dataset, tmp_path, **still))
    ours, plain = read_metrics(of_moe), read_metrics(tmp_path)
    assert ours[0]["loss"] == plain[0]["loss"], "bit for bit"
    assert ours[-1]["loss"] < plain[-1]["loss"]
    assert all(weight.any() for name, weight in final_state(of_moe).items() if name.endswith("lora_b"))
    assert plain[0]["auxiliary_loss"] > 0 == ours[0]["auxiliary_loss"]


def test_what_a_frozen_router_cannot_be_taught_is_said_once(of_moe: Path) -> None:
    (told,) = [event for event in read_events(of_moe / "events.jsonl") if event["kind"] == "lora"]
    assert told["off"] == {"balance_loss": 0.05, "bias_update_rate": 0.1}
    assert told["targets"] == ["attention", "dense", "experts", "shared"]
    assert told["learn"] == sum(x.numel() for name, x in final_state(of_moe).items() if name.startswith("model."))


def test_a_commit_holds_adapters_and_their_moments_alone(of_moe: Path) -> None:
    state = final_state(of_moe)
    weights = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    attention = [f"attention.{part}." for part in ("query", "key", "value", "output")]
    matrices = [f"blocks.{layer}.{part}" for layer in (0, 1) for part in attention]
    for part in ("gate", "up", "down"):
        matrices += [f"blocks.0.ffn.{part}.", f"blocks.1.ffn.shared.{part}.", f"blocks.1.ffn.experts.{part}_"]
    assert weights == {f"{matrix}lora_{which}" for matrix in matrices for which in "ab"}
    moments = {f"optimizer.{name}.{moment}" for name in weights for moment in ("exp_avg", "exp_avg_sq")}
    assert state.keys() == {f"model.{name}" for name in weights} | moments | {"optimizer.step"}
    numbers = sum(state[f"model.{name}"].numel() for name in weights)
    stored = sum(file.size for file in list_commits(of_moe / "checkpoints")[-1].manifest.files.values())
    assert 12 * numbers <= stored < 12 * numbers + 40_000, "headers of safetensors"


def test_what_is_read_are_the_bases_weights_and_the_products_that_were_learnt(moe: Path, of_moe: Path) -> None:
    state, base, merged = final_state(of_moe), open_weights(locate(moe)), open_weights(locate(of_moe))
    assert merged.config == base.config
    for name, shape in tensor_shapes(base.config).items():
        was, found = base.read(name, whole(shape)), merged.read(name, whole(shape))
        stem = name.removesuffix("weight") if name.endswith(".weight") else name[:-3]
        if f"model.{stem}lora_a" not in state:
            assert torch.equal(found, was), name
            continue
        a, b = (state[f"model.{stem}lora_{which}"].double() for which in "ab")
        torch.testing.assert_close(found.double(), was.double() + 12 / 8 * (b @ a), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, was), name


def test_others_read_merged_weights_without_knowing_of_adapters(
    moray: Moray, of_moe: Path, dataset: Path, tmp_path: Path
) -> None:
    out = moray("export", of_moe, "--out", tmp_path / "hf")
    assert out.code == 0, out.err
    decoder, _ = load_run(of_moe, pytest.fail)
    tokens = torch.randint(0, 400, (2, 50), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert moray("inspect", of_moe).code == 0
    assert moray("generate", of_moe, "--prompt", "def", "--max-new-tokens", 2).code == 0
    # All weights go on from the merged ones: the first loss is what the exported model has.
    once = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}
    for source, run in ((of_moe, tmp_path / "merged"), (tmp_path / "hf", tmp_path / "exported")):
        assert moray("pretrain", *tiny_from(source, dataset, run, **once)).code == 0
    losses = [read_metrics(tmp_path / run)[0]["loss"] for run in ("merged", "exported")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Adapters beside merged adapters.
    again = moray("pretrain", *tiny_from(of_moe, dataset, tmp_path / "again", **{**LORA, "train__steps": 1}))
    assert again.code == 0, again.err
    assert read_metrics(tmp_path / "again")[0]["loss"] == losses[0]


def test_sigkill_changes_no_later_step(llama: Path, of_llama: Path, dataset: Path, tmp_path: Path) -> None:
    words = tiny_from(llama, dataset, tmp_path, **LORA)
    killing = """
import os, signal
import moray.jobs.training.trainer as trainer
from moray.jobs.cli import main
take_step = trainer.take_step
def and_die(training, batch):
    row = take_step(training, batch)
    if training.step == 4:
        training.checkpointer.finish()
        os.kill(os.getpid(), signal.SIGKILL)
    return row
trainer.take_step = and_die
main()
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run([sys.executable, "-c", killing, "pretrain", *words], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [commit.step for commit in list_commits(tmp_path / "checkpoints")] == [2]
    in_this_process("pretrain", *words)
    keys = ("step", "loss", "grad_norm", "lr", "positions")
    assert [[row[key] for key in keys] for row in read_metrics(tmp_path)] == [
        [row[key] for key in keys] for row in read_metrics(of_llama)
    ]
    ours, theirs = final_state(tmp_path), final_state(of_llama)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    (resumed,) = [event for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "resume"]
    assert (resumed["step"], resumed["source"]) == (2, "commit")


def test_muon_moves_adapters_that_are_all_that_there_is(
    moray: Moray, of_llama: Path, llama: Path, dataset: Path, tmp_path: Path
) -> None:
    for steps in (2, 3):
        words = tiny_from(llama, dataset, tmp_path, **{**LORA, "optimizer__kind": "muon", "train__steps": steps})
        outcome = moray("pretrain", *words)
        assert outcome.code == 0, outcome.err
    weights = [name for name in final_state(of_llama) if name.startswith("model.")]
    momenta = [name.replace("model.", "optimizer.") + ".momentum" for name in weights]
    assert final_state(tmp_path).keys() == {*weights, *momenta}
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


class TestBase:
    """Of adapters: it must be there, and the same."""

    @pytest.fixture
    def base(self, llama: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(llama, tmp_path / "base"))

    @pytest.fixture
    def run(self, base: Path, dataset: Path, tmp_path: Path) -> Path:
        in_this_process("pretrain", *self.words(base, dataset, tmp_path / "run", 1))
        return tmp_path / "run"

    def words(self, base: Path, dataset: Path, run: Path, steps: int) -> list[str]:
        return tiny_from(base, dataset, run, **{**LORA, "train__steps": steps})

    def change(self, base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"][3] += 1
        save_file(weights, base / "model.safetensors", {"format": "pt"})

    def test_another_one_in_its_place_is_refused(self, moray: Moray, run: Path, base: Path, dataset: Path) -> None:
        self.change(base)
        outcome = moray("pretrain", *self.words(base, dataset, run, 2))
        assert outcome.code == 2
        assert "is not what the adapters of" in outcome.err
        outcome = moray("export", run, "--out", run.parent / "out")
        assert outcome.code == 2
        assert "is not what the adapters of" in outcome.err

    def test_one_that_is_gone_is_missed(self, moray: Moray, run: Path, base: Path, dataset: Path) -> None:
        shutil.rmtree(base)
        for words in (["pretrain", *self.words(base, dataset, run, 2)], ["generate", run, "--prompt", "x"]):
            outcome = moray(*words)
            assert outcome.code == 2
            assert f"model.from={base} is not there, and this run is nothing without it" in outcome.err

    def test_a_copy_of_the_same_bytes_will_do(self, moray: Moray, run: Path, base: Path, dataset: Path) -> None:
        again = base.with_name("again")
        shutil.copytree(base, again, copy_function=shutil.copyfile)
        shutil.rmtree(base)
        again.rename(base)
        assert moray("pretrain", *self.words(base, dataset, run, 2)).code == 0

    def test_a_run_that_went_on_is_no_other_base_but_a_damaged_commit_is(
        self, moray: Moray, moe: Path, dataset: Path, tmp_path: Path
    ) -> None:
        source = Path(shutil.copytree(moe, tmp_path / "source"))
        words = tiny_from(source, dataset, tmp_path / "run", **{**LORA, "train__steps": 1})
        assert moray("pretrain", *words).code == 0
        (commit,) = list_commits(source / "checkpoints")
        file = commit.path / sorted(commit.manifest.files)[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        outcome = moray("pretrain", *[*words, "--train.steps", "2"])
        assert outcome.code == 2
        assert "is damaged" in outcome.err
        assert moray("generate", tmp_path / "run", "--prompt", "x").code == 2

    def test_its_name_is_of_all_bytes_and_only_changed_files_are_read_again(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = identify(base)
        (file,) = first.files.values()
        assert file.sha256 == hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
        with monkeypatch.context() as unread:
            unread.setattr("moray.jobs.models.base._sha256", pytest.fail)
            assert identify(base, first) == first
        os.utime(base / "model.safetensors", ns=(time.time_ns(), file.changed + 1))
        assert identify(base, first).digest == first.digest
        self.change(base)
        assert identify(base, first).digest != first.digest


class TestPeft:
    def test_adapters_load_beside_their_base(self, moray: Moray, llama: Path, of_llama: Path, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        outcome = moray("export", of_llama, "--out", tmp_path / "adapters", "--peft")
        assert outcome.code == 0, outcome.err
        assert str(llama) in outcome.out
        base = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
        tokens = torch.randint(0, 400, (2, 50), generator=torch.Generator().manual_seed(0))
        decoder, _ = load_run(of_llama, pytest.fail)
        with torch.no_grad():
            before = base(tokens).logits
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
            logits = theirs(tokens).logits
            torch.testing.assert_close(decoder(tokens), logits, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(theirs.merge_and_unload()(tokens).logits, logits, rtol=1e-5, atol=2e-5)
        assert (logits - before).abs().max() > 0.1
        assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]

    def test_transposed_matrices_have_adapters_too_and_joined_ones_none(
        self, moray: Moray, dataset: Path, tmp_path: Path
    ) -> None:
        peft = pytest.importorskip("peft")
        config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
        gpt2, tokens = made(config, dataset, tmp_path / "gpt2"), torch.arange(40)[None]
        for targets in ("dense", "all"):
            words = tiny_from(gpt2, dataset, tmp_path / targets, **{**LORA, "lora__targets": targets})
            assert moray("pretrain", *words).code == 0
        assert moray("export", tmp_path / "dense", "--out", tmp_path / "out", "--peft").code == 0
        base = AutoModelForCausalLM.from_pretrained(gpt2, attn_implementation="eager")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        with torch.no_grad():
            ours = load_run(tmp_path / "dense", pytest.fail)[0](tokens)
            torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-5, atol=2e-5)
        outcome = moray("export", tmp_path / "all", "--out", tmp_path / "other", "--peft")
        assert outcome.code == 2
        assert "query.weight is a part of transformer.h.0.attn.c_attn.weight" in outcome.err
        assert not (tmp_path / "other").exists()

    def test_what_peft_has_no_words_for_is_refused(self, moray: Moray, of_moe: Path, moe: Path, tmp_path: Path) -> None:
        outcome = moray("export", of_moe, "--out", tmp_path / "out", "--peft")
        assert outcome.code == 2
        assert "has adapters an expert, for which peft has no module" in outcome.err
        outcome = moray("export", moe, "--out", tmp_path / "out", "--peft")
        assert outcome.code == 2
        assert "holds no adapters but whole weights" in outcome.err


class TestMistakes:
    def said(self, words: list[str]) -> str:
        with pytest.raises(UserError) as raised:
            load_config(*parse_settings(words))
        return str(raised.value)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"lora__targets": "attention,experts"}, "lora.targets=experts matches nothing in this model, which has"),
            ({"lora__targets": "attention,heads"}, "lora.targets=heads must be all, attention, dense"),
            ({"lora__targets": "none"}, "lora.targets"),
            ({"lora__rank": -1}, "lora.rank"),
            ({"lora__rank": 0}, "lora.rank=0 means no adapters, but lora.alpha or lora.targets is set"),
        ],
    )  # fmt: skip
    def test_of_a_dense_model(self, llama: Path, dataset: Path, changes: dict[str, object], part: str) -> None:
        assert part in self.said(tiny_from(llama, dataset, Path("run"), **{**LORA, **changes}))

    def test_of_a_model_with_experts(self, moe: Path, dataset: Path) -> None:
        said = self.said(tiny_from(moe, dataset, Path("run"), **{**LORA, "lora__rank": 12}))
        assert "lora.rank=12 must be a multiple of 8 for adapters of experts" in said
        assert "try 16, or lora.targets=attention,dense,shared" in said
        load_config(*parse_settings(tiny_from(moe, dataset, Path("run"), lora__rank=12, lora__targets="shared,dense")))
        said = self.said(tiny_from(moe, dataset, Path("run"), **LORA, layout__placement="balanced"))
        assert "layout.placement=balanced must be contiguous with lora.rank" in said

    def test_without_a_base(self, dataset: Path) -> None:
        assert "lora.rank=8 needs model.from" in self.said(tiny(dataset, Path("run"), lora__rank=8))

    def test_a_run_goes_on_with_the_adapters_that_it_began_with(
        self, moray: Moray, llama: Path, of_llama: Path, dataset: Path
    ) -> None:
        for changes, part in (
            ({"lora__alpha": 16}, "lora.alpha=16.0 (there: 12.0)"),
            ({"lora__rank": 0, "lora__alpha": "none"}, "lora.rank=0 (there: 8)"),
        ):
            outcome = moray("pretrain", *tiny_from(llama, dataset, of_llama, **{**LORA, "train__steps": 6, **changes}))
            assert outcome.code == 2
            assert part in outcome.err

    def test_alpha_is_twice_the_rank_where_it_is_not_set(self, llama: Path, dataset: Path) -> None:
        config = load_config(*parse_settings(tiny_from(llama, dataset, Path("run"), lora__rank=6)))
        assert config.adapters
        assert (config.adapters.alpha, config.adapters.scale) == (12.0, 2.0)
