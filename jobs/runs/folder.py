"""The folder of a run: who may work in it, what may go on in it, and what lies there."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moray import UserError
from moray.data.dataset import Dataset
from moray.data.sources import Sources
from moray.data.special_tokens import copy_stops
from moray.data.tokenizer import copy_tokenizer, tokenizer_in
from moray.jobs.alignment.critic import committed_bytes
from moray.jobs.config.alignment import ALIGNMENT
from moray.jobs.config.load import flatten
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig
from moray.jobs.models.weights import adapted_in, tokenizer_of
from moray.jobs.runs.files import partial_path, replace_file
from moray.model import ModelConfig
from moray.model.lora import LoRA
from moray.parallel.checkpoint.commits import Commit, list_commits, verify
from moray.parallel.layout import Layout

# What decides on weights, data order or their meaning: a run that changed one would be another run.
_FIXED = ("seed", "global_batch", "seq_len")
_FIXED_OF_DATA = {"train.objective": "pretrain", "data.long_dialogues": "cut"}
_FREE = ("folder", "reward_timeout_s", "validation_prompts", "critic_lr")
_FIXED_OF_OPTIMIZER = {"kind": "adamw", "moments": "float32"}
"""And what they were before there was a choice."""
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def claimed(config: RunConfig, sources: Sources, tell: Callable[[str], None]) -> Iterator[bool]:
    """Makes the run's folder, or checks that it may go on; no other driver can claim it until the block ends.

    Yields whether any step is left to do, and writes config.toml and tokenizer/, if so. Until something is committed,
    the folder is bound to nothing.
    The lock is flock's, a courtesy: some network file systems keep it to one host, or have none, of which this tells.
    What holds everywhere are the generations of `moray.parallel.checkpoint.generations`.
    Raises UserError as `check_folder` does, and naming the holder of a folder in use.
    """
    folder = Path(config.run.dir)
    _check_no_file(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        link = Path(error.filename)
        raise UserError(
            f"run.dir={folder} leads over the link {link} to {link.readlink()}, which does not exist: mount its disk, "
            "or choose another run.dir"
        ) from None
    with _locked(folder, tell) as is_alone:
        if is_alone:
            _remove_partials(folder)
        if not check_folder(config, sources, tell):
            yield False
            return
        is_bound = bool(list_commits(folder / "checkpoints"))
        _put_tokenizer(sources.first, folder / "tokenizer", is_bound=is_bound)
        if config.weights_from and config.train.objective == "pretrain":  # dialogues end by their own template
            copy_stops(tokenizer_of(Path(config.weights_from)), folder / "tokenizer")
        replace_file(folder / "config.toml", to_toml(config))
        yield True


def check_folder(config: RunConfig, sources: Sources, tell: Callable[[str], None]) -> bool:
    """Whether any step is left to do; tells of a run where none is, and of settings that change at a resume.

    Writes nothing. Raises UserError naming what differs in a folder that holds another run, and the room that a commit
    needs where the disk has none.
    """
    folder = Path(config.run.dir)
    _check_no_file(folder)
    if commits := list_commits(folder / "checkpoints"):
        check_same_run(commits[-1], config, sources)
        if (done := commits[-1].step) >= config.train.steps and not verify(commits[-1]):
            tell(f"run.dir={folder} has committed step {done} of train.steps={config.train.steps}: nothing to do")
            return False
        if changes := _changes(commits[-1], config):
            tell(f"going on from step {done} with {', '.join(changes)}")
    _check_space(config, folder)
    return True


def _check_no_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file; name a folder")


def check_same_run(commit: Commit, now: RunConfig, sources: Sources) -> None:
    """Raises UserError unless config and data continue the run that made the commit, at the position it ended at."""
    metadata = commit.manifest.metadata
    there = metadata["config"]
    if "train" not in there:
        raise UserError(
            f"run.dir={now.run.dir} holds weights alone, without the state of an optimizer that a run resumes from; "
            f"start from them in another run.dir, with model.from={now.run.dir}"
        )
    before = _deciding(ModelConfig.of(there["model"]), there, there.get("weights_from", ""))
    asked = _deciding(
        now.model, now.model_dump(include={"train", "optimizer", "data", "align", "rl"}), now.weights_from
    )
    adapted = adapted_in(commit)
    before |= _deciding_adapters(adapted[0] if adapted else None)
    asked |= _deciding_adapters(now.adapters)
    if now.train.exact or there["train"].get("exact"):
        before |= _deciding_bits(there["train"], there["layout"])
        asked |= _deciding_bits(now.train.model_dump(), now.layout.model_dump())
    if differing := _differing(before, asked):
        raise UserError(
            f"run.dir={now.run.dir} holds a different run: {', '.join(differing)}; "
            "choose another run.dir or these settings"
        )
    position, skipped = metadata["data"]["position"], metadata["data"].get("skipped", 0)
    if position != (expected := commit.step * now.train.global_batch + skipped):
        raise UserError(
            f"{commit.path} was committed at data position {position}, not at step {commit.step} * "
            f"train.global_batch={now.train.global_batch} + {skipped} skipped = {expected}: going on would skip or "
            "repeat sequences"
        )
    sources.check_fingerprint(metadata["data"]["fingerprint"])


def _changes(commit: Commit, now: RunConfig) -> list[str]:
    """What the steps to come are taken with, where those up to the commit were not: lengths, rates, dtype, batches."""
    there, wanted = commit.manifest.metadata["config"], now.model_dump(include={"train", "optimizer"})
    for name in ("dtype", "zero_stage"):
        if wanted["train"][name] == "auto":
            wanted["train"][name] = there["train"].get(name)  # it stays as it was chosen
    before = dict(flatten({name: there[name] for name in wanted}))
    before["data.phases"] = ";".join(there.get("data", {}).get("phases", []))
    # A setting that is younger than the commit has not been changed.
    asked = {name: value for name, value in flatten(wanted) if name in before}
    return _differing(before, asked | {"data.phases": ";".join(now.data.phases)})


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name}={now.get(name)} (there: {before.get(name)})"
        for name in {**now, **before}
        if now.get(name) != before.get(name)
    ]


def _deciding(model: ModelConfig, sections: dict[str, Any], weights_from: str) -> dict[str, Any]:
    settings = {"model.from": weights_from, **dict(flatten(model.model_dump(), "model."))}
    settings |= {f"train.{name}": sections["train"][name] for name in _FIXED}
    stated = dict(flatten({"train": sections["train"], "data": sections["data"]}))
    settings |= {name: stated.get(name, default) for name, default in _FIXED_OF_DATA.items()}
    if sections["train"].get("objective") in ALIGNMENT:
        for section in ("align", "rl"):
            decides = {name: value for name, value in sections[section].items() if name not in _FREE}
            settings |= dict(flatten(decides, f"{section}."))
        settings = {name: [*value] if isinstance(value, tuple) else value for name, value in settings.items()}
    optimizer = _FIXED_OF_OPTIMIZER | sections["optimizer"]
    return settings | {f"optimizer.{name}": optimizer[name] for name in _FIXED_OF_OPTIMIZER}


def _deciding_adapters(lora: LoRA | None) -> dict[str, Any]:
    return {f"lora.{name}": value for name, value in vars(lora).items()} if lora else {"lora.rank": 0}


def _deciding_bits(train: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """What train.exact is exact for."""
    settings = {"train.exact": train.get("exact", False), "train.micro_batch": train["micro_batch"]}
    settings["train.recompute"] = train.get("recompute", "none")
    deciding = ("tp", "ep", "ep_nodes", "dispatcher", "placement", "wire")  # of which older commits have two
    return settings | {f"layout.{name}": layout.get(name, Layout.model_fields[name].default) for name in deciding}


@contextmanager
def _locked(folder: Path, tell: Callable[[str], None]) -> Iterator[bool]:
    """Holds RUN/.lock, of which the kernel lets go however this process ends; yields whether files can be locked."""
    with open(folder / ".lock", "a+") as file:
        is_alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(
                f"run.dir={folder} is in use by {holder}; wait until it has ended, or choose another run.dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            is_alone = False
            tell(
                f"run.dir={folder} lies where files cannot be locked ({error.strerror}): another driver that starts "
                "on it is not refused, but takes the run over, and this one ends"
            )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield is_alone


def _check_space(config: RunConfig, folder: Path) -> None:
    needed = committed_bytes(config)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"run.dir={folder}: a commit takes at least {needed / 2**20:,.1f} MiB, but its disk has "
            f"{free / 2**20:,.1f} MiB left; free some or choose another"
        )


def _put_tokenizer(dataset: Dataset, folder: Path, *, is_bound: bool) -> None:
    """Copies the data's tokenizer, whole or not at all; once something is committed, the one there must be the same."""
    with tokenizer_in(dataset.folder) as data:
        if folder.exists():
            if _tokenizer_bytes(folder) == _tokenizer_bytes(data):
                return
            if is_bound:
                said = f"{dataset.called}={dataset.folder}"
                raise UserError(f"{folder} is not the tokenizer of {said}, the run's data; move it away")
            shutil.rmtree(folder)
        partial = partial_path(folder)
        partial.mkdir()
        copy_tokenizer(data, partial)
        try:
            partial.rename(folder)
        except OSError:  # where files cannot be locked, another attempt may just have done the same
            shutil.rmtree(partial)
            if _tokenizer_bytes(folder) != _tokenizer_bytes(data):
                raise


def _remove_partials(folder: Path) -> None:
    """What starts that were killed here have left."""
    for path in folder.glob("*.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.endswith(f".{os.getpid()}.partial"):  # which is about to be written anew
            path.unlink()


def _tokenizer_bytes(folder: Path) -> list[bytes | None]:
    """And how dialogues are written with it."""
    paths = (folder / "tokenizer.json", folder / "chat_template.jinja")
    return [path.read_bytes() if path.is_file() else None for path in paths]
