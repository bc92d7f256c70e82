"""Which differences of versions matter."""

import platform
from importlib.metadata import version

import pytest

from moray.cluster.versions import difference, versions

HERE = {"moray": "1.0 (source 12345678)", "python": "3.11.9", "torch": "2.13.0+cpu", "ray": "2.60.0"}


def test_this_process_knows_its_own() -> None:
    found = versions()
    assert list(found) == ["moray", "python", "torch", "ray"]
    assert (found["python"], found["torch"], found["ray"]) == (
        platform.python_version(),
        version("torch"),
        version("ray"),
    )


@pytest.mark.parametrize(
    ("theirs", "differs"),
    [
        ({}, None),
        ({"python": "3.11.2", "torch": "2.13.0+cu128"}, None),
        ({"python": "3.12.9"}, ("python", "3.11.9", "3.12.9")),
        ({"torch": "2.11.0+cpu"}, ("torch", "2.13.0+cpu", "2.11.0+cpu")),
        ({"moray": "1.0 (source 87654321)", "ray": "2.59.0"}, ("moray", HERE["moray"], "1.0 (source 87654321)")),
        ({"ray": "2.59.0"}, ("ray", "2.60.0", "2.59.0")),
    ],
)
def test_what_matters(theirs: dict[str, str], differs: tuple[str, str, str] | None) -> None:
    assert difference(HERE, HERE | theirs) == differs


def test_what_is_not_installed_differs() -> None:
    assert difference(HERE, {name: HERE[name] for name in ("moray", "python", "torch")}) == ("ray", "2.60.0", "none")
