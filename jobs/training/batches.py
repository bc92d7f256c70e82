"""A rank's lanes of a global batch: out of the stream, and into the model in pieces.

Of pairs, a lane is two rows: chosen and rejected answers.
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch

from moray.data.blocks import CACHE_BYTES
from moray.data.prompts import PromptStream
from moray.data.sources import Sources
from moray.data.stream import Batch, Stream
from moray.jobs.config.run import RunConfig
from moray.jobs.training.begin import Training
from moray.model import Randomness
from moray.model.alignment.pairs import PairBatch
from moray.model.objective import MicroBatch


def batches_of(training: Training) -> Generator[Any, None, None]:
    """What the steps that are left are taken on, a `Batch` or a `PromptBatch` each; to be closed."""
    config, first = training.config, training.position // training.config.train.global_batch
    if not config.is_reinforcement:
        return stream_of(training.sources, config, training.lanes).batches(first)
    return PromptStream(
        [*training.sources.datasets.values()],
        most_tokens=config.most_prompt_tokens,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        lanes=training.lanes,
        mixture=config.mixture,
    ).batches(first)


def stream_of(sources: Sources, config: RunConfig, lanes: Sequence[int], cache_bytes: int = CACHE_BYTES) -> Stream:
    """The training split, as a run with these settings reads it."""
    train = config.train
    return Stream(
        [*sources.datasets.values()],
        "train",
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        seed=train.seed,
        lanes=lanes,
        mixture=config.mixture,
        cache_bytes=cache_bytes,
        long_dialogues=config.data.long_dialogues,
    )


def micro_batches(training: Training, batch: Batch, lanes: Sequence[int]) -> list[MicroBatch]:
    """These lanes of a global batch in pieces of at most micro_batch lanes, on this rank's device."""
    train, device = training.config.train, training.context.device
    sequences_B = batch.first + torch.tensor(lanes)
    tensors = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
    # Models that stay as they are take their forward passes, a third of what learning takes.
    asked = 1 + len(training.frozen) / 3
    pieces: list[MicroBatch] = []
    for sequences, *rest in zip(*(tensor.split(train.micro_batch) for tensor in (sequences_B, *tensors)), strict=True):
        tokens, targets, positions, documents = rest
        flops = asked * training.work.flops(documents.flatten(0, -2))
        if training.sources.kind == "preference":
            pieces.append(PairBatch.of_lanes(tokens, targets, positions, documents, device, flops))
        else:
            randomness = Randomness(train.seed, training.step, sequences.to(device))
            pieces.append(MicroBatch.of(tokens, targets, positions, documents, device, randomness, flops))
    return pieces
