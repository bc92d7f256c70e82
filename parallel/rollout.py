"""Answers that a spread decoder writes to learn from: its own modules, layout and weights, with the KV cache.

What is drawn is a function of (weights, seed, step, prompt) alone: a token's numbers are keyed by the sample and its
place in the answer, and the shapes of decoding are the config's. A rank gathers its weights once, and then exchanges no
more than tensor and expert parallelism ask for.
"""

# Shapes: P prompts of a batch, T tokens of the longest, N = P * group_size samples of them, B sequences of a pass, L
# layers with experts, K experts per token.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moray import UserError
from moray.model.attention.cache import KVCache
from moray.model.config.architecture import ModelConfig
from moray.model.context import Routes
from moray.model.decoder import Decoder
from moray.model.moe.layer import MoE
from moray.model.randomness import Randomness
from moray.model.sharded import local
from moray.parallel.dispatch.dispatcher import ExpertDispatcher
from moray.parallel.gradients import forget_counts, of_all_ranks, world_sum
from moray.parallel.shard import gathered


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Raises UserError naming the setting that makes no sense.

    Temperature alone shapes what is drawn: with top-k or top-p, the log-probabilities would be another policy's.
    """

    temperature: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """What ends an answer, and belongs to it."""
    group_size: int
    """Answers to each prompt."""
    groups_per_batch: int
    """Prompts whose answers are written at the same time: neighbours in the global order, so that it is no layout that
    decides which."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature={self.temperature} must be above 0 and finite: what is learnt from must be drawn"
            )
        for name in ("max_new_tokens", "group_size", "groups_per_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def samples_per_batch(self) -> int:
        return self.group_size * self.groups_per_batch


@dataclass(frozen=True)
class Answer:
    """Of one sample. tokens: ids (int64), the stop token included. logp: of each, its log-probability under
    softmax(logits / temperature), fp32 at least. has_ended: by a stop token, and not for want of room.

    routes: where they are recorded, the experts (int16) that the tokens of prompt and answer chose in each of the L
    layers with experts; but for the answer's last token, which nobody reads: [prompt + answer - 1, L, K].
    """

    tokens: np.ndarray
    logp: np.ndarray
    has_ended: bool
    routes: np.ndarray | None = None


def check_rollable(config: ModelConfig) -> None:
    """Raises UserError where the model that trains is another function than the one that writes answers."""
    if config.moe:
        config.moe.check_same_function(
            "answers would have the log-probabilities of another policy than the one that learns"
        )


@torch.no_grad()
def rollout(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    ids: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    records_routes: bool = False,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[Answer]]:
    """For each of this rank's prompts, `group_size` answers.

    ids: each prompt's place in the global order, which names its samples: sample g of prompt i is i * group_size + g.
    Prompts whose ids divided by groups_per_batch agree are computed together: where ranks have whole batches, shapes
    are the same on every number of them. Tensor-parallel peers have the same prompts; a rank may have none.
    records_routes: answers say which experts their tokens chose; those of a dense model say nothing.
    on_token: called after each token of a batch. Collective.

    Raises UserError for what cannot be answered, and FloatingPointError where logits are not finite.
    """
    check_rollable(decoder.config)
    records_routes = records_routes and decoder.config.n_moe_layers > 0
    _check(decoder, prompts, ids, sampling)
    batches: dict[int, dict[int, int]] = {}
    for index, place in enumerate(ids):
        number, row = divmod(place, sampling.groups_per_batch)
        batches.setdefault(number, {})[row] = index
    # Who shares experts takes part in all that the others compute.
    is_shared = any(isinstance(m, MoE) and isinstance(m.dispatcher, ExpertDispatcher) for m in decoder.modules())
    idle = int(max(of_all_ranks(len(batches)))) - len(batches) if is_shared else 0
    samples = torch.arange(sampling.samples_per_batch, device=next(decoder.parameters()).device)
    answers: dict[int, list[Answer]] = {}
    was_training = decoder.training
    decoder.eval()
    # Graphs of layers would be compiled anew for every length of the cache.
    with gathered(decoder), torch.compiler.set_stance("force_eager"):
        for number in [*sorted(batches), *[0] * idle]:
            rows = batches.pop(number, {})
            draws = Randomness(seed, step, number * len(samples) + samples)
            asked = {row: prompts[index] for row, index in rows.items()}
            written = _write(decoder, asked, draws, sampling, is_shared, records_routes, on_token)
            answers |= {index: written[row] for row, index in rows.items()}
    forget_counts(decoder)  # what travelled here is no step's
    decoder.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def _write(
    decoder: Decoder,
    asked: dict[int, np.ndarray],
    draws: Randomness,
    sampling: Sampling,
    is_shared: bool,
    records_routes: bool,
    on_token: Callable[[], None],
) -> dict[int, list[Answer]]:
    """The answers to a batch's prompts by their rows; in the others, nothing is asked."""
    device, group = draws.sequences_B.device, sampling.group_size
    tokens_PT, documents_PT = _left_padded(asked, sampling.groups_per_batch, decoder.vocabulary.tokens.size)
    weight = local(decoder.embedding.weight)
    cache = KVCache(decoder.config, len(tokens_PT), tokens_PT.shape[1] + sampling.max_new_tokens, weight)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
    is_going_N = torch.tensor([row in asked for row in range(len(tokens_PT))], device=device).repeat_interleave(group)
    length_N = torch.zeros_like(draws.sequences_B)
    drawn, logp, read = [], [], []
    new_BT = tokens_PT.to(device)
    for place in range(sampling.max_new_tokens):
        keys_N = draws.keys("rollout", torch.full_like(length_N, place)[:, None])[:, 0]
        if place == 1:
            cache.branch(group)
        documents_BT, routes = None if place else documents_PT, Routes() if records_routes else None
        token_N, logp_N = decoder.sample(new_BT, cache, keys_N, sampling.temperature, documents_BT, routes)
        if routes:
            read.append(routes.of_layers().to(torch.int16))
        drawn.append(token_N)
        logp.append(logp_N)
        length_N += is_going_N
        is_going_N = is_going_N & ~torch.isin(token_N, stops)
        on_token()
        is_left, is_finite = torch.stack((is_going_N.any(), logp_N.isfinite().all())).tolist()
        if not is_finite:
            raise FloatingPointError(
                f"the logits of an answer's token {place} are not finite: the model's weights are damaged, or training "
                "diverged"
            )
        # Whoever left alone would be waited for.
        if not (world_sum(torch.tensor(float(is_left))) if is_shared else is_left):
            break
        new_BT = torch.where(is_going_N, token_N, 0)[None]
    tokens_NT, logp_NT = (torch.stack(parts, 1).cpu().numpy() for parts in (drawn, logp))
    ends = zip(length_N.tolist(), is_going_N.logical_not().tolist(), strict=True)
    answers = [Answer(tokens_NT[n, :end], logp_NT[n, :end], ended) for n, (end, ended) in enumerate(ends)]
    if read:
        answers = _with_routes(answers, read, (documents_PT < 0).sum(1).tolist())
    return {row: answers[row * group : (row + 1) * group] for row in asked}


def _with_routes(answers: list[Answer], read: list[Tensor], padding_P: list[int]) -> list[Answer]:
    """read: first of the prompts, [P, T, L, K], then a token of each answer, [1, N, L, K]."""
    prompts_PTLK, group = read[0].cpu().numpy(), len(answers) // len(padding_P)
    tokens_TNLK = torch.cat([read[0].new_empty(0, len(answers), *read[0].shape[2:]), *read[1:]]).cpu().numpy()
    found = []
    for n, answer in enumerate(answers):
        of_prompt_TLK = prompts_PTLK[n // group, padding_P[n // group] :]
        of_answer_TLK = tokens_TNLK[: max(len(answer.tokens) - 1, 0), n]
        found.append(replace(answer, routes=np.concatenate((of_prompt_TLK, of_answer_TLK))))
    return found


def _left_padded(asked: dict[int, np.ndarray], rows: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Prompts in their rows with padding before them, and documents, where padding is -1; [P, T] each, on the CPU.

    A row without a prompt has one of a token, so that it is like the others.
    """
    lengths = {row: len(prompt) for row, prompt in asked.items()}
    width = math.ceil(max(lengths.values(), default=1) / multiple) * multiple
    tokens_PT, documents_PT = torch.zeros(rows, width, dtype=torch.int64), torch.full((rows, width), -1)
    for row in range(rows):
        start = width - lengths.get(row, 1)
        documents_PT[row, start:] = 0
        if row in asked:
            tokens_PT[row, start:] = torch.from_numpy(asked[row].astype(np.int64))
    return tokens_PT, documents_PT


def _check(decoder: Decoder, prompts: Sequence[np.ndarray], ids: Sequence[int], sampling: Sampling) -> None:
    """Raises UserError naming what cannot be answered."""
    longest, new, tp = decoder.config.max_seq_len, sampling.max_new_tokens, decoder.vocabulary.tokens.size
    if sampling.samples_per_batch % tp:
        raise UserError(
            f"groups_per_batch={sampling.groups_per_batch} times group_size={sampling.group_size} must be a multiple "
            f"of layout.tp={tp}: the answers are what tensor parallelism cuts, when each gets one token"
        )
    if len(set(ids)) != len(prompts):
        raise UserError(f"{len(prompts)} prompts have {len(set(ids))} different ids; each must have its own")
    for place, prompt in zip(ids, prompts, strict=True):
        if not 0 < len(prompt) <= longest - new:
            raise UserError(
                f"prompt {place} has {len(prompt)} tokens; with max_new_tokens={new} and model.max_seq_len={longest} "
                f"it may have 1 to {longest - new}"
            )
