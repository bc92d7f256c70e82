"""Steps that must not reach the weights: what tells one, and what is done instead of it.

What was skipped stands in the row of the next step that is applied. No commit lies between the two, so that a resume
meets the same bad steps, and decides alike.
"""

import math
from collections.abc import Sequence
from statistics import median

from moray.data.stream import Batch
from moray.jobs.training.begin import WINDOW, Training, go_on_from, load_commit
from moray.parallel.checkpoint.commits import Commit
from moray.parallel.gradients import drop_gradients

NORMAL_MAD = 1.4826
"""A normal distribution's standard deviation over its median deviation from the median."""
STEADIER = "Try a lower optimizer.lr, more warm-up, or train.dtype=float32"


def what_is_wrong(
    loss: float, norm: float, applied: Sequence[tuple[float, float]], spike_sigmas: float | None
) -> str | None:
    """In words, why a step must not be applied; None: it may be. `applied`: loss and gradient norm of those before it.

    A spike is above their median by so many standard deviations, taken from the median deviation: spikes that were
    applied do not hide the next one. Source: OLMo-core's SkipStepOptimizer, which has mean, deviation and 128 steps.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss}, gradient norm {norm}"
    if spike_sigmas is None or len(applied) < WINDOW // 2:
        return None
    losses, norms = zip(*applied, strict=True)
    for name, value, before in (("loss", loss, losses), ("gradient norm", norm, norms)):
        middle = median(before)
        sigma = NORMAL_MAD * median(abs(other - middle) for other in before)
        if value > middle + spike_sigmas * sigma:
            return (
                f"{name} {value:.4g}, more than train.spike_sigmas={spike_sigmas:g} deviations of {sigma:.2g} above "
                f"{middle:.4g}, the median of {len(applied)} steps"
            )
    return None


def pass_over(training: Training, batch: Batch, why: str) -> None:
    """Leaves a bad step out, as train.on_bad_step says: the stream goes on behind its batch. Collective.

    Raises FloatingPointError where it says stop, and where train.max_skipped batches in a row are not enough.
    """
    train, bad = training.config.train, training.step + 1
    where = f"step {bad}: {why}; the weights are as step {training.step} left them"
    drop_gradients(training.decoder)
    if train.on_bad_step == "stop":
        raise FloatingPointError(f"{where}; computed once more it was the same: data, code or settings. {STEADIER}")
    commit, first, end = None, batch.first, batch.first + train.global_batch
    if train.on_bad_step == "rollback" and not training.skipped:  # else it is back, and nothing has been done since
        commit = _go_back(training, where)
        first = training.position
    window = {"positions": [first, end], "why": why}
    training.skipped.append(window)
    skipped = (end - training.position) // train.global_batch
    if skipped > train.max_skipped:
        raise FloatingPointError(
            f"{where}; that makes {skipped} skipped batches in a row, more than train.max_skipped={train.max_skipped}. "
            f"{STEADIER}"
        )
    if commit is None:
        training.note("skip", step=bad, **window)
    else:
        training.checkpointer.give_up_later()
        now = {"step": training.step, "position": training.position, "digest": commit.manifest.digest}
        training.note("rollback", bad_step=bad, **now, **window)


def _go_back(training: Training, where: str) -> Commit:
    """To the newest commit that is older than the weights: of a regular step, lest a stop in between change the way."""
    training.context.enter("loading")
    every = training.config.checkpoint.every
    commit = load_commit(training, lambda step: step < training.step and step % every == 0)
    if commit is None:
        raise FloatingPointError(f"{where}, and there is no older commit that train.on_bad_step=rollback could go to")
    go_on_from(training, commit.step, commit.manifest.metadata)
    if training.snapshots:
        training.snapshots.clear()
    return commit
