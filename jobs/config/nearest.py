"""For a misspelt name, the one that was probably meant."""

import difflib
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str:
    """`did you mean NAME?`, or else all the names there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
