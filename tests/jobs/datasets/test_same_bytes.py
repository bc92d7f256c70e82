"""One dataset, to the byte: however many processes make it, on one node or two, and whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_parts
from processes import marked_processes
from small_parts import make_corpus, prepared

from moray.data.dataset import STAGING_SUFFIX, Dataset

# Not a file: every process would import what that imports.
PROGRAM = (
    f"import sys; sys.path.insert(0, {str(Path(small_parts.__file__).parent)!r}); import small_parts as it; it.main()"
)
GONE_WITHIN_S = 5.0
STAGES = ("parts", "buckets-*", "repeats-*", "shards-*")


@dataclass(frozen=True)
class Corpus:
    """Sources, and the dataset that one process makes of them in one go."""

    sources: list[Path]
    out: Path

    def check(self, out: Path) -> None:
        """It is the same, and nothing else is left."""
        assert Dataset.open(out).fingerprint == Dataset.open(self.out).fingerprint
        names = {path.name for path in self.out.iterdir()}
        assert names == {path.name for path in out.iterdir()}
        for name in names:
            assert (out / name).read_bytes() == (self.out / name).read_bytes(), name
        assert not list(out.parent.glob(f"*{STAGING_SUFFIX}"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("same")
    sources = make_corpus(folder / "corpus")
    summary = prepared(folder / "out", "local", 1, *sources)
    dropped = {(stage, reason) for stage, reason, _, _ in summary.ledger.dropped()}
    assert {stage for stage, _ in dropped} == {"reading", "rules", "exact duplicates", "near-duplicates"}, dropped
    assert sum(count for (_, step), count in summary.ledger.cleaned.items() if step == "paragraphs")
    assert min(len(split) for split in summary.dataset.splits.values()) > 1
    return Corpus(sources, folder / "out")


@contextmanager
def killing(out: Path, *stages: str) -> Iterator[list[int]]:
    """Kills whoever is first seen at a task of each of these stages, once; yields whom it has killed."""
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        for stage in stages:
            while not (pids := _at_work(out, stage) - {os.getpid()}):
                if is_over.wait(0.001):
                    return
            with suppress(ProcessLookupError):
                killed.append(min(pids))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


def _at_work(out: Path, stage: str) -> set[int]:
    scratch = out.with_name(out.name + STAGING_SUFFIX) / "scratch"
    return {int(path.name.split(".")[1].partition("-")[0]) for path in scratch.glob(f"{stage}/*.partial")}


@pytest.mark.parametrize("workers", [2, 4])
def test_by_several_processes_from_sources_in_another_order(corpus: Corpus, tmp_path: Path, workers: int) -> None:
    prepared(tmp_path / "out", "local", workers, *corpus.sources[::-1])
    corpus.check(tmp_path / "out")


def test_after_a_process_was_killed(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with killing(out, "buckets-*") as killed, pytest.raises(ValueError, match="was killed, perhaps because memory"):
        prepared(out, "local", 2, *corpus.sources)
    assert killed
    assert list(tmp_path.glob("*/scratch/parts/*/done.json")), "what was done is kept"
    prepared(out, "local", 2, *corpus.sources)
    corpus.check(out)


def test_after_its_driver_was_killed_time_and_again_and_nothing_lived_on(corpus: Corpus, tmp_path: Path) -> None:
    out, n_killed = tmp_path / "out", 0
    for stage in STAGES:
        n_killed += killed_in(stage, out, corpus, "local")
    assert n_killed >= len(STAGES) - 1, "a stage may be over before it is seen"
    if not out.exists():
        prepared(out, "local", 1, *corpus.sources)
    corpus.check(out)


def killed_in(stage: str, out: Path, corpus: Corpus, engine: str) -> bool:
    """Begins, or goes on with, a preparation in a process that is killed in that stage; whether it was."""
    if out.exists():
        return False
    mark = f"{out}-{stage}"
    command = [sys.executable, "-c", PROGRAM, str(out), engine, "2", *map(str, corpus.sources)]
    process = subprocess.Popen(command, env={**os.environ, "MARK": mark})
    scratch = out.with_name(out.name + STAGING_SUFFIX) / "scratch"
    try:
        while process.poll() is None and not any(scratch.glob(f"{stage}/*")):
            time.sleep(0.001)
    finally:
        process.kill()
        code = process.wait()
    until = time.monotonic() + GONE_WITHIN_S
    while (living := marked_processes(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not living
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_on_two_nodes_whose_processes_and_driver_are_killed(corpus: Corpus, tmp_path: Path, two_nodes: Any) -> None:
    out = tmp_path / "out"
    assert killed_in("near-*", out, corpus, "ray")
    with killing(out, "buckets-*", "shards-*") as killed:
        prepared(out, "ray", None, *corpus.sources[::-1])
    assert len(killed) == 2
    corpus.check(out)


def test_on_two_nodes_one_of_which_is_lost(corpus: Corpus, tmp_path: Path, two_nodes: Any) -> None:
    out = tmp_path / "out"
    (node,) = two_nodes.worker_nodes
    scratch = out.with_name(out.name + STAGING_SUFFIX) / "scratch"

    def lose() -> None:
        while not any(scratch.glob("buckets-*/*")):
            time.sleep(0.001)
        two_nodes.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    prepared(out, "ray", None, *corpus.sources)
    thread.join()
    corpus.check(out)
