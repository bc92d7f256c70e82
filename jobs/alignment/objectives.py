"""What a run learns, as an objective."""

from collections.abc import Mapping
from typing import Any

from moray.jobs.alignment.frozen import Frozen
from moray.jobs.config.run import RunConfig
from moray.model.alignment.preference import Preference
from moray.model.objective import NextToken, Objective


def objective_of(config: RunConfig, frozen: Mapping[str, Frozen]) -> Objective[Any]:
    """frozen: the models that `config.frozen` names."""
    align, kind = config.align, config.train.objective
    if kind == "dpo" or kind == "ipo":
        return Preference(frozen["reference"].decoder, kind, align.beta, align.label_smoothing, align.length_normalised)
    return NextToken.of(config.learnt)
