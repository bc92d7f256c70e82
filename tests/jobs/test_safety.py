"""What a stranger's file, or a look into a run's folder, can do: nothing, and find nothing.

Every reader of files gets a pickle that would leave a mark if anybody executed it.
"""

import hashlib
import importlib.util
import io
import json
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny, tiny_from
from version_1 import make_version_1, write_version_1

from moray.data.index import digest_of
from moray.parallel.checkpoint.commits import list_commits
from moray.parallel.checkpoint.manifest import Manifest

Moray = Callable[..., Any]
SECRETS = ("RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def payload(mark: Path) -> bytes:
    armed = pickle.dumps(Hostile(mark))
    pickle.loads(armed)
    assert mark.is_dir(), "it would"
    mark.rmdir()
    return armed


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moray.jobs.cli import dispatch

    run = tmp_path_factory.mktemp("safe") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, run, train__steps=2)]) == 0
    return run


def refused(outcome: Any, mark: Path) -> str:
    """The one line that was said."""
    assert not mark.exists()
    assert outcome.code in (1, 2), outcome.err
    assert "Traceback" not in outcome.err
    return outcome.err.splitlines()[-1]


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """An index of version 1, changed by one who knows the format: the fingerprint fits."""
    index = make_version_1(folder)
    change(index)
    write_version_1(folder, index)


def rewrite_manifest(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = list_commits(run / "checkpoints")[-1].path / "manifest.json"
    body = json.loads(path.read_text())
    change(body)
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, **body}))


def objects(payload: bytes) -> bytes:
    """An .npy file of Python objects, whose data are a pickle."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return header.getvalue() + payload


@pytest.mark.parametrize("kind", ["objects", "pickle"])
def test_shards(moray: Moray, dataset: Path, tmp_path: Path, mark: Path, payload: bytes, kind: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    hostile = objects(payload) if kind == "objects" else payload

    def replace_tokens(index: dict[str, Any]) -> None:
        for shard in index["splits"]["train"]:
            content = bytearray((data / shard["name"]).read_bytes())
            for sample in shard["samples"]:
                tokens, ends = sample["tokens"], sample["ends"]
                tokens["length"] = len(hostile)
                content[tokens["offset"] : tokens["offset"] + len(hostile)] = hostile
                ends_npy = content[ends["offset"] : ends["offset"] + ends["length"]]
                sample["crc32"] = zlib.crc32(ends_npy, zlib.crc32(hostile))
            (data / shard["name"]).write_bytes(content)
            shard["sha256"] = hashlib.sha256(content).hexdigest()

    rewrite_index(data, replace_tokens)
    line = refused(moray("pretrain", *tiny(data, tmp_path / "run", train__steps=2)), mark)
    assert "train-00000.tar, sample train-00000-000000, byte " in line
    assert "no array of numbers" in line


@pytest.mark.parametrize("name", ["../train-00000.tar", "/etc/passwd", "..", ""])
def test_names_in_an_index(moray: Moray, dataset: Path, tmp_path: Path, mark: Path, name: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    rewrite_index(data, lambda index: index["splits"]["train"][0].update(name=name))
    line = refused(moray("pretrain", *tiny(data, tmp_path / "run")), mark)
    assert line == f"moray: {data}/index.json names {name!r}, which is no file of its own folder"


@pytest.mark.parametrize("name", ["../train", "/etc/passwd", "..", ""])
def test_splits_in_an_index(moray: Moray, dataset: Path, tmp_path: Path, mark: Path, name: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    index = json.loads((data / "index.json").read_text()) | {"splits": [name]}
    del index["digest"]
    (data / "index.json").write_text(json.dumps({**index, "digest": digest_of(index)}))
    line = refused(moray("pretrain", *tiny(data, tmp_path / "run")), mark)
    assert line == f"moray: {data}/index.json names {name!r}, which is no file of its own folder"


def test_an_index_that_is_none(moray: Moray, dataset: Path, tmp_path: Path, mark: Path, payload: bytes) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    rewrite_index(data, lambda index: index["splits"]["train"][0].pop("sha256"))
    assert "is no index of version 1" in refused(moray("pretrain", *tiny(data, tmp_path / "run")), mark)
    (data / "index.json").write_bytes(payload)
    assert "index.json is damaged" in refused(moray("pretrain", *tiny(data, tmp_path / "run")), mark)


@pytest.mark.parametrize("name", ["train-00000.tar", "train.samples.npy"])
def test_a_file_that_is_a_link(moray: Moray, dataset: Path, tmp_path: Path, mark: Path, name: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    (data / name).rename(tmp_path / "elsewhere")
    (data / name).symlink_to(tmp_path / "elsewhere")
    line = refused(moray("pretrain", *tiny(data, tmp_path / "run")), mark)
    assert f"{name} is a link out of its folder" in line


def test_sources(moray: Moray, tmp_path: Path, mark: Path, payload: bytes) -> None:
    """Members and files by whose names webdataset's decoders would unpickle them are not even read."""
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "set.tar", "w") as archive:
        for name in ("a.txt", "a.pyd", "a.pickle", "a.pkl", "a.pth", "b.npy", "c.txt", "d.json"):
            content = {"a.txt": b"a text of some words " * 40, "b.npy": objects(payload)}.get(name, payload)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for name in ("x.pkl", "x.pt", "x.txt", "x.jsonl", "x.json"):
        (source / name).write_bytes(payload)
    (source / "good.txt").write_text("another text of some words " * 40)
    outcome = moray("prepare", source, "--out", tmp_path / "data", "--vocab-size", 270, "--on-damage", "skip")
    assert outcome.code == 0, outcome.err
    assert not mark.exists()


def test_tokenizers(moray: Moray, tmp_path: Path, mark: Path, payload: bytes) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).write_bytes(payload)
    words = ["prepare", "stdlib", "--out", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer"]
    assert "tokenizer.json is not a tokenizer" in refused(moray(*words), mark)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_commits(moray: Moray, trained: Path, tmp_path: Path, mark: Path, payload: bytes, kind: str) -> None:
    """The manifest fits what it names; another run that starts from it, and `generate`, read it."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    if kind == "torch.save":
        saved = io.BytesIO()
        torch.save({"model": Hostile(mark)}, saved)
        payload = saved.getvalue()
    commit = list_commits(run / "checkpoints")[-1]

    def replace_files(body: dict[str, Any]) -> None:
        for name, file in body["files"].items():
            (commit.path / name).write_bytes(payload)
            file |= {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}

    rewrite_manifest(run, replace_files)
    line = refused(moray("generate", run, "--prompt", "a"), mark)
    assert "is not the safetensors file that it should be" in line


@pytest.mark.parametrize("name", ["../../../weights.safetensors", "/etc/passwd"])
def test_names_in_a_manifest(moray: Moray, trained: Path, tmp_path: Path, mark: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def rename(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop(next(iter(body["files"])))

    rewrite_manifest(run, rename)
    (path,) = (run / "checkpoints").glob("step-*/manifest.json")
    with pytest.raises(ValueError, match=f"names '{name}', which is no file of its own folder"):
        Manifest.from_json(path.read_bytes())
    assert "holds no whole commit" in refused(moray("generate", run, "--prompt", "a"), mark)
    path.write_bytes(pickle.dumps(Hostile(mark)))
    assert "holds no whole commit" in refused(moray("generate", run, "--prompt", "a"), mark)


def test_a_file_of_a_commit_that_is_a_link(moray: Moray, trained: Path, tmp_path: Path, mark: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (file,) = (run / "checkpoints").glob("step-*/*.safetensors")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "holds no whole commit" in refused(moray("generate", run, "--prompt", "a"), mark)


def test_hugging_face_folders(
    moray: Moray, dataset: Path, trained: Path, tmp_path: Path, mark: Path, payload: bytes
) -> None:
    """Neither its .bin, nor a pickle for safetensors, nor the code that its auto_map names; no file of elsewhere."""
    folder = tmp_path / "hf"
    assert moray("export", trained, "--out", folder).code == 0
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    (folder / "pytorch_model.bin").write_bytes(payload)
    (weights,) = folder.glob("*.safetensors")
    weights.rename(tmp_path / "outside.safetensors")
    words = ["pretrain", *tiny_from(folder, dataset, tmp_path / "run", train__steps=2)]
    assert "other formats must be converted to safetensors" in refused(moray(*words), mark)
    weights.write_bytes(payload)
    assert "is not a whole safetensors file" in refused(moray(*words), mark)
    weights.unlink()
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"weight_map": {"model.embed_tokens.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"names {name!r}, which is no file of its own folder" in refused(moray(*words), mark)


def test_no_secret_stands_in_what_a_run_writes(
    moray: Moray, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    secrets = {name: f"marked{n}secret" + 32 * "a" for n, name in enumerate(SECRETS)}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:marked9secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    submitted = {"runtime_env": {"env_vars": secrets}, "metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    trackers = [name for name in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(name)]
    outcome = moray("pretrain", *tiny(dataset, run, train__steps=2, run__trackers=",".join(trackers)))
    assert outcome.code == 0, outcome.err
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {"config.toml", "events.jsonl", "status.json", "metrics.jsonl"} <= {path.name for path in written}
    assert b"raysubmit_1" in written[run / "status.json"]
    assert [path for path, content in written.items() if b"marked" in content and b"secret" in content] == []
    assert "marked" not in outcome.err + outcome.out
