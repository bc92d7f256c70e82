"""What a model that is tuned on dialogues answers to some that are held out, at each validation."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moray.data.blocks import FIRST, BlockReader
from moray.data.dataset import Dataset
from moray.data.shards import TRAINED
from moray.data.tokenizer import load_tokenizer
from moray.jobs.training.begin import Training
from moray.parallel.generation import write_greedily

ANSWERS, NEW_TOKENS = 4, 64
READ_TOKENS = 1 << 16


def answer_some(training: Training) -> dict[str, Any]:
    """The likeliest answers, beside those that people gave, and the share that ended by itself. Collective.

    Nothing where no dialogue of the validation split leaves room for an answer.
    """
    room = training.config.model.max_seq_len - NEW_TOKENS
    some = list(islice(_exchanges(training.dataset, room), ANSWERS))
    if not some:
        return {}
    tokenizer = load_tokenizer(Path(training.config.run.dir) / "tokenizer")
    prompts, answers = zip(*some, strict=True)
    written = write_greedily(
        training.decoder,
        prompts,
        NEW_TOKENS,
        tokenizer.stop_ids,
        tp=training.layout.tp,
        on_token=training.pulse.again,
    )
    ended = [tokens[-1] in tokenizer.stop_ids for tokens in written]
    told = [
        {
            "prompt": tokenizer.decode(prompt),
            "written": tokenizer.decode(tokens),
            "expected": tokenizer.decode(answer),
            "ended": has_ended,
        }
        for prompt, tokens, answer, has_ended in zip(prompts, written, answers, ended, strict=True)
    ]
    training.note("answered", step=training.step, **told[0])
    return {"answers": told, "answers_ended": sum(ended) / len(ended)}


def _exchanges(dataset: Dataset, room: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What stands before the first answer of dialogues of the validation split, and that answer, in file order."""
    reader = BlockReader(dataset, "validation", cache_bytes=0)
    for shard in range(len(dataset.splits["validation"])):
        tokens, flags = reader.read(shard, 0, READ_TOKENS)
        starts = np.flatnonzero(flags & FIRST)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            trained = flags[start:end] & TRAINED > 0
            if trained.any() and (first := int(trained.argmax())) <= room:
                length = int((~trained[first:]).argmax()) or len(trained) - first
                yield tokens[start : start + first], tokens[start + first : start + first + length]
