"""`--model.from`: a run starts with another model's weights, each rank reading its own part of them alone.

The truth is what transformers computes with the folder.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pool
from tiny import tiny, tiny_from
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moray.data.dataset import Dataset
from moray.data.stream import Batch, Stream
from moray.jobs.cli import dispatch
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.models import weights as existing
from moray.jobs.models.weights import check_changes, config_of, fill_shards, locate, open_weights
from moray.jobs.training.metrics import read_metrics
from moray.model import ModelConfig
from moray.model.tensors import Box, tensor_shapes, whole
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
ONCE = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}


@pytest.fixture(scope="module")
def hf(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE as transformers saves it, with the dataset's tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "qwen3-moe"
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dataset / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a DeepSeek-like MoE whose routing bias has moved."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    changes = {"train__steps": 3, "train__eval_every": 0, "model__moe__bias_update_rate": 0.1}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, folder, **changes)]) == 0
    return folder


def first_batch(dataset: Path) -> Batch:
    stream = Stream(Dataset.open(dataset), "train", seq_len=64, global_batch=4, seed=0, lanes=range(4))
    return stream.batch(0)


@torch.no_grad()
def loss_of_transformers(folder: Path, batch: Batch) -> float:
    """Mean over the targets; every document goes through alone, from position 0 or where the last sequence left it."""
    model, logits_BTV = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.empty(4, 64, 400)
    for row, documents_T in enumerate(batch.documents_BT):
        for document in documents_T.unique():
            at = (documents_T == document).nonzero().flatten()
            positions = batch.positions_BT[row, at][None]
            logits_BTV[row, at] = model(batch.tokens_BT[row, at][None], position_ids=positions).logits[0]
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten()).item()


def test_the_first_loss_is_what_transformers_computes(moray: Moray, hf: Path, dataset: Path, tmp_path: Path) -> None:
    outcome = moray("pretrain", *tiny_from(hf, dataset, tmp_path / "run", **ONCE))
    assert outcome.code == 0, outcome.err
    (row,) = read_metrics(tmp_path / "run")
    truth = loss_of_transformers(hf, first_batch(dataset))
    assert row["loss"] == pytest.approx(truth, rel=1e-5)
    assert truth > 6.1, "weights of another model would give ln(400) = 5.99"
    (commit,) = list_commits(tmp_path / "run" / "checkpoints")
    assert commit.manifest.metadata["config"]["weights_from"] == str(hf)
    assert f'from = "{hf}"' in (tmp_path / "run" / "config.toml").read_text()


def start(source: Path, layout: Layout) -> tuple[dict[str, Tensor], int, int]:
    """On one rank: every tensor, gathered, then how many numbers the rank read and how many it holds."""
    decoder = build_decoder(config_of(source), layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32)
    numbers = 0

    def counting(path: Path) -> Any:
        weights = open_weights(path)

        def read(name: str, box: Box) -> Tensor:
            nonlocal numbers
            part = weights.read(name, box)
            numbers += part.numel()
            return part

        return replace(weights, read=read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(existing, "open_weights", counting)
        fill_shards(decoder, source)
    state = {name: tensor for name, tensor in decoder.state_dict().items() if name in tensor_shapes(decoder.config)}
    held = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in state.values())
    whole_ones = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    return {name: tensor.detach().clone() for name, tensor in whole_ones.items()}, numbers, held


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("hf", Layout(dp_shard=1)),
        ("hf", Layout(dp_shard=2, tp=2, ep=4)),
        ("run", Layout(dp_shard=4)),
        ("run", Layout(dp_replicate=2, dp_shard=2, ep=2)),
        ("run", Layout(dp_shard=1, tp=2, ep=2)),
    ],
    ids=str,
)
def test_every_layout_starts_with_the_same_weights_and_reads_its_part_alone(
    pool: Pool, hf: Path, run: Path, kind: str, layout: Layout
) -> None:
    source = hf if kind == "hf" else locate(run)
    results = pool.run(start, layout.world_size, source, layout)
    weights = open_weights(source)
    shapes = tensor_shapes(weights.config)
    for name, shape in shapes.items():
        assert torch.equal(results[0][0][name], weights.read(name, whole(shape))), name
    total = sum(shape.numel() for shape in shapes.values())
    shares = layout.world_size // layout.dp_replicate
    for _, numbers, held in results:
        assert numbers == held
        # Norms, routers' biases and what tensor parallelism copies are small.
        assert numbers <= total if shares == 1 else numbers < 1.3 * total / shares
    if kind == "run":
        biases = [tensor for name, tensor in results[0][0].items() if name.endswith("bias_E")]
        assert biases
        assert all(bias.any() for bias in biases), "the routing bias comes along"


def test_what_a_hugging_face_folder_holds_is_what_is_read(hf: Path) -> None:
    """Against safetensors itself, under transformers' names."""
    from safetensors.torch import load_file

    theirs, weights = load_file(hf / "model.safetensors"), open_weights(hf)
    shapes = tensor_shapes(weights.config)
    ours = weights.read("blocks.1.ffn.experts.down_EDF", whole(shapes["blocks.1.ffn.experts.down_EDF"]))
    for expert in range(8):
        assert torch.equal(ours[expert], theirs[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"])
    part = weights.read("embedding.weight", (slice(7, 9), slice(3, 30)))
    assert torch.equal(part, theirs["model.embed_tokens.weight"][7:9, 3:30])


def test_another_runs_newest_commit_and_any_commit_of_it_can_be_named(run: Path) -> None:
    (commit,) = list_commits(run / "checkpoints")
    assert locate(run) == locate(commit.path) == commit.path


def test_once_committed_the_run_needs_its_source_no_more(moray: Moray, hf: Path, dataset: Path, tmp_path: Path) -> None:
    source, run = Path(shutil.copytree(hf, tmp_path / "source")), tmp_path / "run"
    plan = {**ONCE, "optimizer__lr": 1e-3, "model__moe__balance_loss": 0.02}
    assert moray("pretrain", *tiny_from(source, dataset, run, **plan)).code == 0
    shutil.rmtree(source)
    outcome = moray("pretrain", *tiny_from(source, dataset, run, **{**plan, "train__steps": 2}))
    assert outcome.code == 0, outcome.err
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    words = ["--recipe", str(run / "config.toml"), "--train.steps", "3"]
    assert moray("pretrain", *words).code == 0
    outcome = moray("pretrain", *tiny_from(hf, dataset, run, **plan))
    assert outcome.code == 2
    assert f"holds a different run: model.from={hf} (there: {source})" in outcome.err


def test_until_it_commits_a_run_reads_the_commit_that_it_began_with(
    moray: Moray, run: Path, dataset: Path, tmp_path: Path
) -> None:
    """Recorded in config.toml is the commit, not the run that may go on."""
    config = load_config(*parse_settings(tiny_from(run, dataset, tmp_path / "second", **ONCE)))
    assert config.weights_from == str(locate(run))
    assert config.model == config_of(locate(run))


class TestMistakes:
    def line(self, outcome: Any) -> str:
        assert outcome.code == 2, outcome.err
        (line,) = outcome.err.splitlines()
        return line

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model__preset": "demo-moe"}, "model.preset=demo-moe and model.from="),
            ({"model__d_model": 64}, "model.d_model=64 (there: 32)"),
            ({"model__moe__n_experts": 4}, "model.moe.n_experts=4 (there: 8)"),
            ({"model__norm__eps": 1e-5}, "model.norm.eps=1e-05 (there: 1e-06)"),
            ({"model__moe__noisy": "true"}, "ffn.router.noise.weight (only on one side)"),
        ],
    )
    def test_another_model_cannot_have_the_weights(
        self, moray: Moray, hf: Path, dataset: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        assert message in self.line(moray("pretrain", *tiny_from(hf, dataset, tmp_path / "run", **ONCE, **changes)))

    def test_a_folder_without_weights(self, moray: Moray, dataset: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name, reason in (("nowhere", "there is no such folder"), ("empty", "holds no commit yet")):
            words = tiny_from(tmp_path / name, dataset, tmp_path / "run", **ONCE)
            line = self.line(moray("pretrain", *words))
            assert f"model.from={tmp_path / name}" in line
            assert reason in line

    def test_data_with_other_tokens(self, moray: Moray, hf: Path, dataset: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(hf, tmp_path / "other"))
        text = (other / "tokenizer.json").read_text()
        (other / "tokenizer.json").write_text(text.replace("<|pad|>", "<|fill|>"))
        line = self.line(moray("pretrain", *tiny_from(other, dataset, tmp_path / "run", **ONCE)))
        assert f"data.path={dataset} has other tokens than model.from={other} was trained on" in line

    def test_a_damaged_commit(self, moray: Moray, run: Path, dataset: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(run, tmp_path / "source"))
        (file,) = locate(source).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        line = self.line(moray("pretrain", *tiny_from(source, dataset, tmp_path / "run", **ONCE)))
        assert f"model.from={locate(source)} is damaged: {file}: its sha256 is" in line


def test_what_training_alone_reads_may_change_and_contexts_may_grow() -> None:
    before = ModelConfig.preset("demo-moe")
    scaling = {"kind": "linear", "factor": 2}
    check_changes(before, before.but(moe={"balance_loss": 0.5, "capacity_factor": 1.0}, z_loss=1e-4, init={"std": 1}))
    check_changes(before, before.but(max_seq_len=9999, position={"theta": 5e5, "scaling": scaling}))
    learned = ModelConfig.preset("demo-dense", position={"kind": "learned"})
    with pytest.raises(ValueError, match=r"model\.max_seq_len=9999"):
        check_changes(learned, learned.but(max_seq_len=9999))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
