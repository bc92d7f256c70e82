"""Rewards of answers, weighted and added up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moray import UserError
from moray.jobs.alignment.rewards import SETTING, Reward, Sample


@dataclass(frozen=True)
class Scores:
    """Shapes: values_SR (samples, rewards in the order of the setting), totals_S (weighted sums); fp64."""

    names: tuple[str, ...]
    values_SR: np.ndarray
    totals_S: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        """Each reward's, without its weight; the same bits in whatever order the samples are."""
        return {
            name: math.fsum(column) / len(column) for name, column in zip(self.names, self.values_SR.T, strict=True)
        }


def combine(rewards: Sequence[Reward], samples: Sequence[Sample], values: Mapping[str, np.ndarray]) -> Scores:
    """Of each reward's values by its name, [samples]: a `Judge`'s and reward models'.

    A sample's total has the same bits whichever others are beside it. Raises UserError naming the reward and the sample
    of a value that is not finite, as a reward model's may be.
    """
    values_SR = np.stack([np.asarray(values[reward.name], np.float64) for reward in rewards], axis=1)
    assert len(values_SR) == len(samples)
    for row, column in np.argwhere(~np.isfinite(values_SR)):
        raise UserError(
            f"{SETTING}: {rewards[column].name} on {samples[row].told}: is {values_SR[row, column]}, and must be finite"
        )
    totals_S = np.zeros(len(samples))
    for column, reward in enumerate(rewards):
        totals_S += reward.weight * values_SR[:, column]
    return Scores(tuple(reward.name for reward in rewards), values_SR, totals_S)
