"""A step of reinforcement learning, as one worker runs it: read it from top to bottom as its story.

Prompts of this rank's lanes -> answers -> rewards -> all of them on every rank -> advantages -> updates. The answers
lie in rows that are the same on every rank, whatever the layout, of which each learns from its share: a step that was
killed is done again alike, and nothing of it needs to be kept.
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
from torch import Tensor

from moray.data.prompts import Prompt, PromptBatch, evaluation_prompts
from moray.jobs.alignment.answers import Written, judged, of_all_ranks
from moray.jobs.alignment.lessons import Minibatch, Mismatch, lesson, minibatch, plain
from moray.jobs.alignment.reinforcement import Reinforcement
from moray.jobs.alignment.scores import Scores, combine
from moray.jobs.training.bad_steps import STEADIER
from moray.jobs.training.begin import Training
from moray.jobs.training.metrics import expert_metrics
from moray.jobs.training.optimizer import set_learning_rate
from moray.jobs.training.placing import note_load
from moray.jobs.training.schedule import learning_rate
from moray.model import Decoder
from moray.model.alignment.advantages import group_advantages
from moray.parallel.gradients import accumulate_gradients, clip_gradients, forget_counts, update_routing_bias
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
    rewards_PG = torch.from_numpy(scores.totals_S).view(-1, settings.group_size)
    deviation = None if settings.variant == "dr_grpo" else settings.deviation
    advantages_PG, n_dead = group_advantages(rewards_PG, deviation, settings.deviation_epsilon)
    has_ended = [written.answer.has_ended for written in everyone]
    is_valid_S = torch.tensor(has_ended) | (not settings.mask_overlong)
    rate = learning_rate(training.step, config.train.steps, config.optimizer)
    set_learning_rate(training.optimizer, rate)
    started, teaches = time.perf_counter(), n_dead < len(advantages_PG) or settings.kl_coefficient > 0
    told: dict[str, float] = {"loss": 0.0, "grad_norm": 0.0, "flops": 0.0, "updates": 0}
    if teaches and is_valid_S.any():
        told = _updates(training, rl, everyone, parts, advantages_PG.flatten(), is_valid_S)
    seconds["update_seconds"] = time.perf_counter() - started
    load = update_routing_bias(training.decoder)
    note_load(training, load)
    training.note_applied(told["loss"], told["grad_norm"], batch.first + config.train.global_batch)
    lengths = [len(written.answer.tokens) for written in everyone]
    return {
        "step": training.step,
        **told,
        "reward": float(scores.totals_S.mean()),
        **{f"reward/{name}": mean for name, mean in scores.means.items()},
        "dead_groups": n_dead,
        "answer_tokens": float(np.mean(lengths)),
        "ended": float(np.mean(has_ended)),
        "tokens": sum(lengths),
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
    everyone = of_all_ranks(rl.ranks, make if is_first else list)
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


def _updates(
    training: Training,
    rl: Reinforcement,
    everyone: Sequence[Written],
    parts: Sequence[Minibatch],
    advantages_S: Tensor,
    is_valid_S: Tensor,
) -> dict[str, float]:
    """Learns from all minibatches, epoch after epoch. Returns what the updates told, on average."""
    config, decoder = training.config, training.decoder
    decoder.train()
    lessons = [lesson(training, part, everyone, advantages_S, is_valid_S) for part in parts]
    mismatch = [each for _, of_part in lessons for each in of_part]
    told = []
    for pieces, _ in lessons * config.rl.epochs:
        losses = accumulate_gradients(decoder, pieces, training.reduction, objective=training.objective)
        norm = clip_gradients(decoder.parameters(), config.optimizer.clip_norm)
        if not (math.isfinite(losses.loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {training.step + 1}: loss {losses.loss}, gradient norm {norm}; nothing of it is committed. "
                f"{STEADIER}"
            )
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.pulse.again()
        told.append({**losses.values, "grad_norm": norm, "flops": losses.flops * len(lessons) * config.rl.epochs})
    means = {name: math.fsum(update[name] for update in told) / len(told) for name in told[0]}
    return {**means, "updates": len(told), **_of_all(rl, mismatch)}


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
