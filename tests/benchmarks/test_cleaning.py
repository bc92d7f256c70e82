"""benchmarks/cleaning.py: what it plants in a little text is what the recipe takes out, to the document."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_what_is_planted_is_taken_out(load: Callable[[str], Any], rows_of: Callable[..., Any], prose: Path) -> None:
    rows = rows_of(load("cleaning"), "quality table", prose, "--mb", 0.1, "--steps", 0)
    assert len(rows) == 8
    for what, put_in, taken in rows:
        assert put_in == taken, what
    planted = {what: int(put_in.replace(",", "")) for what, put_in, _ in rows}
    assert planted["advertisements, by quality"] > 20
    assert planted["near copies"] > 9
    assert planted["broken copies, equal once mended"] > 1
