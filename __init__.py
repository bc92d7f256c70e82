"""moray trains Mixture-of-Experts and dense GPTs on Ray."""


class UserError(ValueError):
    """What only a person can set right: one line that names the setting, its value and what would be right.

    No retry helps, so none is made; anything else that a worker raises, a library's ValueError too, is worth one.
    """
