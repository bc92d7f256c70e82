"""What must agree wherever a run computes: the versions of moray, Python, torch and Ray. Imports none of them."""

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import moray

ROOMS = ("cluster", "data", "jobs", "model", "parallel")


def versions() -> dict[str, str]:
    """Those of this process, by name; moray's by its source, too: two checkouts may bear one number."""
    found = {"moray": "not installed", "python": platform.python_version()}
    for name, package in (("moray", "moray-train"), ("torch", "torch"), ("ray", "ray")):
        with suppress(PackageNotFoundError):
            found[name] = version(package)
    root, digest = Path(moray.__file__).parent, hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found | {"moray": f"{found['moray']} (source {digest.hexdigest()[:8]})"}


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The first that differs so that it matters: its name, ours and theirs. None where all agree."""
    for name in ours:
        if _what_matters(name, ours[name]) != _what_matters(name, theirs.get(name, "none")):
            return name, ours[name], theirs.get(name, "none")
    return None


def _what_matters(name: str, number: str) -> str:
    """Of Python the first two numbers; of torch not what it was built for, such as +cpu."""
    return ".".join(number.split(".")[:2]) if name == "python" else number.partition("+")[0]
