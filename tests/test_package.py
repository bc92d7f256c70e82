"""What `pip install moray-train` brings: `moray` and nothing else, whole, and in nobody's way."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cluster", "data", "jobs", "model", "parallel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml", "__init__.py", "__main__.py", "tests", *ROOMS):
        (source / name).symlink_to(ROOT / name)  # setuptools leaves a build/ beside what it builds
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_installs_nothing_but_moray(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"moray"}


def test_the_wheel_holds_every_module_preset_and_script(wheel: list[str]) -> None:
    found = {name.removeprefix("moray/") for name in wheel if name.startswith("moray/")}
    here = {f"{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    for kind in ("*.toml", "*.sh", "page.*"):
        here |= {f"{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob(kind)}
    assert found == here | {"__init__.py", "__main__.py"}


def test_a_folder_that_has_such_names_of_its_own_takes_no_place(tmp_path: Path) -> None:
    """As a working directory of Ray, or of `torchrun -m`, comes first among the places where Python looks."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('not yours')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    for program in (["-m", "moray"], ["-m", "torch.distributed.run", "--standalone", "-m", "moray"]):
        command = [sys.executable, *program, "inspect", "demo-moe"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "parameters" in done.stdout
