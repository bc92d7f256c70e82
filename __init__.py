"""moray trains Mixture-of-Experts and dense GPTs on Ray."""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """What only a person can set right: one line that names the setting, its value and what would be right.

    No retry helps, so none is made; anything else that a worker raises, a library's ValueError too, is worth one.
    """


def nearest(name: str, known: Collection[str]) -> str:
    """For a misspelt name, the one that was probably meant: `did you mean NAME?`, or else all the names there are."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
