"""The linters are part of the suite: formatting, style, types and the direction of imports."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(program: str, *words: str, cwd: Path = ROOT) -> None:
    path = shutil.which(program, path=sysconfig.get_path("scripts"))
    assert path, f"{program} is not installed beside this interpreter"
    done = subprocess.run([path, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"]], ids=" ".join
)
def test_linter_finds_nothing(command: list[str]) -> None:
    run(*command)


def test_types_fit(tmp_path: Path) -> None:
    """mypy takes names from folders: here, they stand as they are installed."""
    (tmp_path / "moray").mkdir()
    for name in ("__init__.py", "__main__.py", "cluster", "data", "jobs", "model", "parallel"):
        (tmp_path / "moray" / name).symlink_to(ROOT / name)
    words = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    run("mypy", *words, cwd=tmp_path)
