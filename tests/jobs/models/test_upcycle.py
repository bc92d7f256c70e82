"""`moray upcycle` end to end: a dense run becomes a MoE that says the same, and that a run can start from."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny, tiny_from
from transformers import AutoModelForCausalLM

from moray.jobs.cli import dispatch
from moray.jobs.generation.generate import load_run
from moray.jobs.models.weights import open_weights
from moray.jobs.training.metrics import read_metrics
from moray.model.hf import save_pretrained
from moray.model.tensors import Box, tensor_shapes, whole
from moray.parallel.checkpoint import weights as weights_of_commits
from moray.parallel.checkpoint.commits import list_commits, verify
from moray.parallel.checkpoint.weights import CommitWeights, write_weights

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py


@pytest.fixture(scope="module")
def dense(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        changes = {"model__moe": "none", "train__steps": 4, "train__eval_every": 0, "optimizer__lr": 0.01}
        assert dispatch(["pretrain", *tiny(dataset, run, **changes)]) == 0
        yield run


def logits_of(folder: Path) -> torch.Tensor:
    decoder, _ = load_run(folder, pytest.fail)
    with torch.no_grad():
        return decoder(torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(0)))


def test_the_folder_holds_one_whole_commit_that_computes_the_same(moray: Moray, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    outcome = moray("upcycle", dense, "--experts", 3, "--top-k", 2, "--shared", 1, "--granularity", 2, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    (commit,) = list_commits(out / "checkpoints")
    assert (commit.step, verify(commit)) == (0, [])
    assert commit.manifest.metadata["upcycled"]["from"] == str(dense)
    assert commit.manifest.metadata["config"]["model"]["moe"]["expert_width"] == 24
    assert "nan" not in moray("checkpoints", out).out, "it has no loss yet"
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (dense / "tokenizer" / "tokenizer.json").read_bytes()
    torch.testing.assert_close(logits_of(out), logits_of(dense), rtol=1e-5, atol=1e-5)
    words = ["--prompt", "def", "--temperature", 0, "--max-new-tokens", 12]
    assert moray("generate", out, *words).out == moray("generate", dense, *words).out != ""


def test_a_hugging_face_folder_is_upcycled_too(moray: Moray, dense: Path, tmp_path: Path) -> None:
    save_pretrained(load_run(dense, pytest.fail)[0], tmp_path / "hf")
    outcome = moray("upcycle", tmp_path / "hf", "--experts", 4, "--top-k", 1, "--out", tmp_path / "moe")
    assert (outcome.code, outcome.err) == (0, "")
    assert "the router learns from the balance loss alone" in " ".join(outcome.out.split())
    assert not list((tmp_path / "moe" / "tokenizer").iterdir()), "there was none"
    (commit,) = list_commits(tmp_path / "moe" / "checkpoints")
    there, here = open_weights(tmp_path / "hf"), open_weights(commit.path)
    for name in ("embedding.weight", "blocks.1.attention.key_norm.weight", "blocks.0.attention.output.weight"):
        box = whole(tensor_shapes(here.config)[name])
        assert torch.equal(here.read(name, box), there.read(name, box))


def test_exported_it_computes_in_transformers_what_the_dense_run_does(
    moray: Moray, dense: Path, tmp_path: Path
) -> None:
    out, hf = tmp_path / "moe", tmp_path / "hf"
    words = ["--experts", 8, "--top-k", 4, "--granularity", 2]
    assert moray("upcycle", dense, *words, "--out", out).code == 0
    assert moray("export", out, "--out", hf).code == 0
    theirs = AutoModelForCausalLM.from_pretrained(hf).eval()
    assert theirs.config.model_type == "qwen3_moe"
    with torch.no_grad():
        logits = theirs(torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(0))).logits
    torch.testing.assert_close(logits, logits_of(dense), rtol=1e-5, atol=1e-5)


def test_a_run_starts_from_it_where_the_dense_one_ended(
    moray: Moray, dense: Path, dataset: Path, tmp_path: Path
) -> None:
    """Its first loss is that of the dense run's next step, on the same batch; training it in place is refused."""
    out, run, same = tmp_path / "moe", tmp_path / "run", tmp_path / "dense"
    assert moray("upcycle", dense, "--experts", 4, "--top-k", 2, "--out", out).code == 0
    once = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}
    for source, folder in ((out, run), (dense, same)):
        assert moray("pretrain", *tiny_from(source, dataset, folder, **once)).code == 0
    (ours,), (theirs,) = read_metrics(run), read_metrics(same)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["auxiliary_loss"] > 0, "the routers are kept in balance"
    outcome = moray("pretrain", *tiny_from(out, dataset, out, **once))
    assert outcome.code == 2
    assert f"run.dir={out} holds weights alone, without the state of an optimizer" in outcome.err
    assert f"model.from={out}" in outcome.err


def test_a_folder_in_use_is_refused_and_left_as_it_was(moray: Moray, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    outcome = moray("upcycle", dense, "--experts", 4, "--top-k", 2, "--out", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"out={tmp_path} is not empty" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_mistake_is_told_before_anything_is_written(moray: Moray, dense: Path, tmp_path: Path) -> None:
    outcome = moray("upcycle", dense, "--experts", 4, "--top-k", 3, "--granularity", 2, "--out", tmp_path / "moe")
    assert (outcome.code, outcome.out) == (2, "")
    assert "top_k=3 must be a multiple of 2" in outcome.err
    assert not list(tmp_path.iterdir())


def test_what_fails_on_the_way_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_of_commits, "write_tensors", full)
    with pytest.raises(ValueError, match=r"moe: the disk is full \(No space left on device\); free space"):
        dispatch(["upcycle", str(dense), "--experts", "4", "--top-k", "2", "--out", str(tmp_path / "moe")])
    assert not list(tmp_path.iterdir())


def test_weights_are_asked_for_and_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a tensor, no more than a row or FILE_BYTES at once; what is read again is what was given."""
    monkeypatch.setattr(weights_of_commits, "FILE_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    shapes = {"bias": (5,), "matrix": (100, 32), "experts": (3, 16, 64), "wide": (2, 3000)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    asked: list[int] = []

    def read(name: str, box: Box) -> torch.Tensor:
        asked.append(tensors[name][box].nbytes)
        return tensors[name][box]

    write_weights(tmp_path, 7, {"note": 1}, {name: tensor.shape for name, tensor in tensors.items()}, read)
    (commit,) = list_commits(tmp_path)
    assert (commit.step, commit.manifest.metadata, verify(commit)) == (7, {"note": 1}, [])
    assert max(asked) == 3000 * 4, "one row of the widest"
    assert sorted(asked)[-3] <= 4096
    assert max(file.size for file in commit.manifest.files.values()) < 4096 + 3000 * 4 + 1024
    weights = CommitWeights(commit)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name, whole(tensor.shape)), tensor)
        for cut in (3, 2):
            box = tuple(slice(size // cut, size - size // 5) for size in tensor.shape)
            assert torch.equal(weights.read(name, box), tensor[box])


def test_a_damaged_commit_is_told_on_standard_error(moray: Moray, dense: Path, tmp_path: Path) -> None:
    run = shutil.copytree(dense, tmp_path / "run")
    (weights,) = (run / "checkpoints").glob("*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    outcome = moray("upcycle", run, "--experts", 4, "--top-k", 2, "--out", tmp_path / "moe")
    assert (outcome.code, outcome.out) == (2, "")
    assert "refused the damaged commit" in outcome.err
    assert outcome.err.splitlines()[-1].startswith(f"moray: {run} holds no whole commit")
    assert not (tmp_path / "moe").exists()
