"""A step of reinforcement learning, as one worker runs it: read it from top to bottom as its story.

Prompts of this rank's lanes -> answers -> rewards -> all of them on every rank -> what each token is worth -> updates.
The answers lie in rows that are the same on every rank, whatever the layout, of which each learns from its share: a
step that was killed is done again alike, and nothing of it needs to be kept. GRPO and PPO differ in one of the arrows
(`worth.py`), and in that PPO's critic learns, too.
"""

# Shapes: P prompts, G answers to each, S = P * G samples in the order of their numbers.

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from moray.data.prompts import Prompt, PromptBatch, evaluation_prompts
from moray.jobs.alignment.answers import Written, judged, of_all_ranks
from moray.jobs.alignment.lessons import Lesson, lesson
from moray.jobs.alignment.observed import Minibatch, Mismatch, minibatch, observe, plain
from moray.jobs.alignment.reinforcement import Reinforcement
from moray.jobs.alignment.scores import Scores, combine
from moray.jobs.alignment.worth import WORTH
from moray.jobs.training.bad_steps import STEADIER
from moray.jobs.training.begin import Training
from moray.jobs.training.metrics import expert_metrics
from moray.jobs.training.optimizer import set_learning_rate
from moray.jobs.training.placing import note_load
from moray.jobs.training.schedule import learning_rate
from moray.model import Decoder
from moray.model.objective import Objective, Piece
from moray.parallel.gradients import accumulate_gradients, clip_gradients, forget_counts, update_routing_bias
from moray.parallel.reduction import Reduction
from moray.parallel.rollout import Sampling, rollout

VALIDATION = -1
"""The step that answers of a validation are drawn in: with the same numbers each time."""


def learn_from(training: Training, rl: Reinforcement, batch: PromptBatch) -> dict[str, Any]:
    """One step on the answers to these prompts; its row of numbers. Collective.

    Raises UserError where an answer cannot be judged, and FloatingPointError where a loss or gradient is not finite.
    """
    config, settings = training.config, training.config.rl
    everyone, seconds = _answered(training, rl, batch.prompts, rl.sampling, batch.step)
    size = len(everyone) // settings.minibatches  # of whole groups
    parts = [minibatch(training, everyone, range(at, at + size)) for at in range(0, len(everyone), size)]
    scores = _scored(training, rl, everyone, parts)
    has_ended = [written.answer.has_ended for written in everyone]
    is_valid_S = torch.tensor(has_ended) | (not settings.mask_overlong)
    lengths_S = torch.tensor([len(written.answer.tokens) for written in everyone])
    started = time.perf_counter()
    training.decoder.train()
    seen = [(part, observe(training, part, everyone)) for part in parts]
    find_worth, totals_S = WORTH[config.train.objective], torch.from_numpy(scores.totals_S)
    worth = find_worth(settings, totals_S, lengths_S, is_valid_S, seen, rl.ranks)
    rate = _set_learning_rates(training)
    told: dict[str, float] = {"loss": 0.0, "grad_norm": 0.0, "flops": 0.0, "updates": 0}
    is_learnt_S = worth.teaches_S & is_valid_S
    # An update by nothing would still move the weights: by the momentum of those before.
    if learnt := [each for each in seen if is_learnt_S[each[0].samples].any()]:
        told = _updates(training, [lesson(training, *each, worth, lengths_S, is_valid_S) for each in learnt])
    seconds["update_seconds"] = time.perf_counter() - started
    load = update_routing_bias(training.decoder)
    note_load(training, load)
    training.note_applied(told["loss"], told["grad_norm"], batch.first + config.train.global_batch)
    return {
        "step": training.step,
        **told,
        **worth.told,
        **_of_all(rl, [one.mismatch for _, pieces in seen for one in pieces]),
        "reward": float(scores.totals_S.mean()),
        **{f"reward/{name}": mean for name, mean in scores.means.items()},
        "answer_tokens": float(lengths_S.double().mean()),
        "ended": float(np.mean(has_ended)),
        "tokens": int(lengths_S.sum()),
        "positions": [batch.first, training.position],
        "lr": rate,
        **expert_metrics(load, config.model.moe, sampled=False),
        "generation": training.context.generation,
        "layout": str(training.layout),
        **seconds,
    }


def validate_policy(training: Training, rl: Reinforcement) -> dict[str, float]:
    """Mean reward of an answer to each of the first prompts that are held out, at the training's temperature."""
    dp, rank = training.layout.dp, training.layout.dp_rank(training.context.rank)
    sampling, found = replace(rl.sampling, group_size=1, groups_per_batch=rl.sampling.samples_per_batch), []
    for dataset in training.sources.datasets.values():
        prompts = evaluation_prompts(
            dataset,
            training.config.most_prompt_tokens,
            training.config.rl.validation_prompts,
            lambda position: position // sampling.groups_per_batch % dp == rank,
        )
        everyone, _ = _answered(training, rl, prompts, sampling, VALIDATION)
        whole = minibatch(training, everyone, range(len(everyone)))
        found.append(_scored(training, rl, everyone, [whole]).totals_S)
    return {"validation_reward": float(np.concatenate(found).mean())}


def _answered(
    training: Training, rl: Reinforcement, prompts: Sequence[Prompt], sampling: Sampling, step: int
) -> tuple[list[Written], dict[str, float]]:
    """All answers of all ranks, judged but by reward models; and how long that took."""
    started = time.perf_counter()
    groups = rollout(
        training.decoder,
        [prompt.tokens for prompt in prompts],
        [prompt.position for prompt in prompts],
        sampling,
        seed=training.config.train.seed,
        step=step,
        records_routes=step != VALIDATION,
        on_token=training.pulse.again,
    )
    written = time.perf_counter()
    # Tensor-parallel peers have the same answers.
    is_first = training.context.rank % training.layout.tp == 0
    make = partial(judged, prompts, groups, rl.judge, rl.tokenizer, training.pulse.again)
    everyone = of_all_ranks(rl.ranks, make if is_first else list, training.pulse.again)
    return everyone, {"rollout_seconds": written - started, "reward_seconds": time.perf_counter() - written}


def _scored(training: Training, rl: Reinforcement, everyone: Sequence[Written], parts: Sequence[Minibatch]) -> Scores:
    """All rewards of all samples; those of reward models are computed here."""
    values: dict[str, np.ndarray] = {}
    rewards = training.config.rl.parsed
    for reward in rewards:
        if reward.kind == "model":
            values[reward.name] = _by_model(training, rl, training.frozen[reward.name].decoder, parts)
        else:
            values[reward.name] = np.array([written.values[reward.name] for written in everyone])
    return combine(rewards, [written.sample for written in everyone], values)


@torch.no_grad()
def _by_model(training: Training, rl: Reinforcement, scorer: Decoder, parts: Sequence[Minibatch]) -> np.ndarray:
    """The score of each answer's last token, of all samples."""
    own: dict[int, float] = {}
    for part in parts:
        for piece in part.pieces:
            batch = plain(training, part.rows, piece)
            scores = scorer.values(batch.tokens_BT, batch.positions_BT, batch.documents).flatten().tolist()
            first = piece.start * part.rows.tokens_RT.shape[1]
            own |= {part.samples[at]: scores[part.rows.ends_S[at] - first] for at in part.rows.samples_in(piece)}
            training.pulse.again()
    forget_counts(scorer)
    found: dict[int, float] = {}
    for of_rank in rl.ranks.gather(own):
        found |= of_rank
    return np.array([found[sample] for sample in sorted(found)])


def _set_learning_rates(training: Training) -> float:
    """The policy's rate, which the critic's goes along with."""
    settings = training.config.optimizer
    rate = learning_rate(training.step, training.config.train.steps, settings)
    set_learning_rate(training.optimizer, rate)
    if training.critic:
        set_learning_rate(training.critic.optimizer, rate * training.config.rl.critic_lr / settings.lr)
    return rate


def _updates(training: Training, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Learns from all minibatches, epoch after epoch. Returns what the updates told, on average."""
    told, critic = [], training.critic
    for of in [*lessons] * training.config.rl.epochs:
        row = _update(training, training.decoder, training.optimizer, training.reduction, training.objective, of.policy)
        if critic:
            found = _update(training, critic.decoder, critic.optimizer, critic.reduction, critic.objective, of.values)
            row["flops"] += found.pop("flops")
            row |= {name if name in ("value", "return") else f"value_{name}": value for name, value in found.items()}
            forget_counts(critic.decoder)
        told.append(row)
    means = {name: math.fsum(update[name] for update in told) / len(told) for name in told[0]}
    return {**means, "flops": means["flops"] * len(told), "updates": len(told)}


def _update(
    training: Training,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    reduction: Reduction,
    objective: Objective[Any],
    pieces: Sequence[Piece],
) -> dict[str, float]:
    losses = accumulate_gradients(decoder, pieces, reduction, objective=objective)
    norm = clip_gradients(decoder.parameters(), training.config.optimizer.clip_norm)
    if not (math.isfinite(losses.loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {training.step + 1}: {type(objective).__name__.lower()} loss {losses.loss}, gradient norm {norm}; "
            f"nothing of it is committed. {STEADIER}"
        )
    optimizer.step()
    optimizer.zero_grad()
    training.pulse.again()
    return {**losses.values, "grad_norm": norm, "flops": losses.flops}


def _of_all(rl: Reinforcement, own: Sequence[Mismatch]) -> dict[str, float]:
    """How far what tokens were drawn by is from what the training computes, over all ranks."""
    found = [each for of_rank in rl.ranks.gather([*own]) for each in of_rank]
    n_tokens, n_routes = sum(each.n_tokens for each in found), sum(each.n_routes for each in found)
    told = {
        "rollout_dlogp": math.fsum(each.total for each in found) / max(n_tokens, 1),
        "rollout_dlogp_max": max(each.highest for each in found),
    }
    flips = sum(each.flips for each in found) / max(n_routes, 1)
    return told | ({"rollout_flips": flips} if n_routes else {})
