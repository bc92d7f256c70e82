"""What tokens of answers are worth, against the equations written out, a sample at a time, in plain Python."""

import math
import random
from statistics import mean, pvariance, stdev

import numpy as np
import pytest
import torch
from torch import Tensor

from moray.jobs.alignment.observed import Minibatch, Mismatch, Observed
from moray.jobs.alignment.packed import Rows, packed
from moray.jobs.alignment.worth import Seen, by_comparison, by_critic
from moray.jobs.config.alignment import RLSection
from moray.model.objective import MicroBatch
from moray.parallel.control_plane import ControlPlane

SIZES = ((2, 3), (4, 1), (1, 5), (3, 2))
"""Tokens of prompt and answer of four samples, two a minibatch."""
LENGTHS = torch.tensor([answer for _, answer in SIZES])
SCORES = [1.0, 0.0, 0.25, 0.75]


def drawn(seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.uniform(-2, 0) for _ in range(answer)] for _, answer in SIZES]


LOGP, REFERENCE, VALUES = drawn(0), drawn(1), drawn(2)


def seen(has_reference: bool = True) -> Seen:
    """As a rank observes them, in micro-batches of one row; numbers elsewhere must not matter."""
    found = []
    for samples in (range(2), range(2, 4)):
        rows = packed([(np.arange(SIZES[s][0]), np.arange(SIZES[s][1])) for s in samples], 6, 2)
        pieces = [range(row, row + 1) for row in range(len(rows.tokens_RT))]
        logp, reference, values = (_rows(rows, [known[s] for s in samples]) for known in (LOGP, REFERENCE, VALUES))
        observed = []
        for piece in pieces:
            parts = (rows.tokens_RT, rows.targets_RT, rows.positions_RT, rows.documents_RT)
            batch = MicroBatch.of(*(part[piece] for part in parts), torch.device("cpu"))
            reference_BT = reference[piece] if has_reference else None
            observed.append(
                Observed(piece, batch, logp[piece], reference_BT, values[piece], None, Mismatch(0, 0, 0, 0, 0))
            )
        found.append((Minibatch(samples, rows, pieces), observed))
    return found


def _rows(rows: Rows, known: list[list[float]]) -> Tensor:
    return torch.where(rows.targets_RT < 0, 9.0, rows.placed([np.array(of_sample) for of_sample in known]))


def by_hand(rl: RLSection, has_reference: bool) -> tuple[list[list[float]], list[list[float]]]:
    """DeepSeekMath, eq. 2, and Schulman et al., 2016, eq. 16: as the double sum that it is."""
    advantages, returns = [], []
    for score, logp, reference, values in zip(SCORES, LOGP, REFERENCE, VALUES, strict=True):
        n, next_values = len(values), [*values[1:], 0.0]
        rewards = [
            -rl.kl_coefficient * (logp[t] - reference[t]) * has_reference + score * (t == n - 1) for t in range(n)
        ]
        deltas = [rewards[t] + rl.discount * next_values[t] - values[t] for t in range(n)]
        factor = rl.discount * rl.gae_decay
        advantages.append([math.fsum(factor ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
        returns.append([advantage + value for advantage, value in zip(advantages[-1], values, strict=True)])
    return advantages, returns


def rows_of(x_ST: Tensor) -> list[float]:
    """What stands behind an answer's end is 0."""
    assert not x_ST[torch.arange(x_ST.shape[1]) >= LENGTHS[:, None]].any()
    return [x for of_sample, n in zip(x_ST.tolist(), LENGTHS.tolist(), strict=True) for x in of_sample[:n]]


@pytest.mark.parametrize("has_reference", [True, False])
def test_a_critic_by_hand(has_reference: bool) -> None:
    rl = RLSection(kl_coefficient=0.3, discount=0.9, gae_decay=0.7, whiten=False, group_size=1)
    everyone = torch.ones(4, dtype=torch.bool)
    found = by_critic(rl, torch.tensor(SCORES).double(), LENGTHS, everyone, seen(has_reference), ControlPlane())
    advantages, returns = by_hand(rl, has_reference)
    assert rows_of(found.advantages_ST) == pytest.approx([x for row in advantages for x in row], abs=1e-12)
    assert found.returns_ST is not None
    flat = [x for row in returns for x in row]
    assert rows_of(found.returns_ST) == pytest.approx(flat, abs=1e-12)
    left = [x - v for x, v in zip(flat, [v for row in VALUES for v in row], strict=True)]
    assert found.told["explained_variance"] == pytest.approx(1 - pvariance(left) / pvariance(flat))
    away = [p - q for ps, qs in zip(LOGP, REFERENCE, strict=True) for p, q in zip(ps, qs, strict=True)]
    assert found.told["kl"] == pytest.approx(mean(away) * has_reference, abs=1e-12)
    assert found.teaches_S.all()


def test_whitening_leaves_out_what_is_not_learnt_from() -> None:
    """Over the tokens of all minibatches, but those of an answer that was cut short."""
    rl = RLSection(kl_coefficient=0.3, group_size=1)
    is_valid = torch.tensor([True, True, False, True])
    found = by_critic(rl, torch.tensor(SCORES).double(), LENGTHS, is_valid, seen(), ControlPlane())
    advantages, _ = by_hand(rl, True)
    held = [x for row, valid in zip(advantages, is_valid.tolist(), strict=True) for x in row * valid]
    whole = [(x - mean(held)) / math.sqrt(stdev(held) ** 2 + 1e-8) for x in held]
    assert [x for x in rows_of(found.advantages_ST) if x] == pytest.approx(whole, abs=1e-9)


def test_a_comparison_by_hand() -> None:
    """An answer's advantage is that of each of its tokens; of equal rewards it is 0."""
    rl = RLSection(group_size=2)
    everyone = torch.ones(4, dtype=torch.bool)
    found = by_comparison(rl, torch.tensor([1.0, 0.0, 0.3, 0.3]).double(), LENGTHS, everyone, [], ControlPlane())
    better = 0.5 / (stdev([1.0, 0.0]) + 1e-4)
    assert rows_of(found.advantages_ST) == pytest.approx([better] * 3 + [-better] + [0.0] * 7)
    assert (found.teaches_S.tolist(), found.told) == ([True] * 2 + [False] * 2, {"dead_groups": 1})
    dead = by_comparison(rl, torch.full((4,), 0.3).double(), LENGTHS, everyone, [], ControlPlane())
    assert (dead.teaches_S.any(), dead.told) == (False, {"dead_groups": 2})
