"""Which documents are good enough: those from a score on, or each with a chance that grows with its score."""

from dataclasses import dataclass

import numpy as np

SCORES = 1 << 16
ALPHA = 9


@dataclass(frozen=True)
class Selection:
    """cut: the lowest score that stays, of 0 to 65,535. chances: SCORES of them, by score, instead."""

    cut: int = 0
    chances: tuple[float, ...] | None = None

    def keeps(self, scores: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Whether each document stays: a function of its score and of its digest, which is a hash of its text.

        Shapes: uint16 [D], S16 [D] -> bool [D].
        """
        if self.chances is None:
            return scores >= self.cut
        # Digests order the documents by their first bytes; the last ones have had no part in anything.
        last = np.ascontiguousarray(digests, "S16").view(np.uint32).reshape(-1, 4)[:, 3]
        return last < np.array(self.chances)[scores] * 2.0**32


def by_pareto(probabilities: np.ndarray) -> tuple[float, ...]:
    """The chance of each score to stay, from the probability that it is a good one: (2 - p)^-9.

    Source: GPT-3 (Brown et al. 2020), appendix A: a document stays where a number drawn from Pareto's distribution,
    with alpha = 9, is above 1 - p.
    """
    return tuple(((2.0 - probabilities) ** -ALPHA).tolist())


def cut_for(histogram: np.ndarray, share: float) -> int:
    """The cut that keeps that share of the documents, or the least more: int64 [SCORES] counted by score -> a score."""
    kept = np.cumsum(histogram[::-1])[::-1]  # from each score on
    return int(np.flatnonzero(kept >= share * kept[0])[-1])
