"""A small dataset, and the command line in this process; makes tiny.py importable."""

import io
import signal
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from moray.jobs import cli
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Outcome:
    """What a command left behind in its shell."""

    code: int
    out: str
    err: str


@pytest.fixture
def moray(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`moray VERB …` in this process, on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moray", *map(str, arguments)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            # This process outlives the command, and its children inherit what it ignores.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        written = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, written.out, written.err)

    return run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real source text with a tokenizer of 400 entries."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    folder = tmp_path_factory.mktemp("data") / "stdlib"
    quiet = Console(file=io.StringIO())
    sources = stdlib / "json", stdlib / "wsgiref"
    prepare(PrepareConfig(sources=sources, out=folder, vocab_size=400, validation=0.1), quiet)
    return folder
