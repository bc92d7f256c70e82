"""What a model that is tuned on dialogues answers to some that are held out, at each validation."""

from itertools import islice
from pathlib import Path
from typing import Any

from moray.data.chat.exchanges import exchanges
from moray.data.sources import in_turn
from moray.data.tokenizer import load_tokenizer
from moray.jobs.training.begin import Training
from moray.parallel.generation import write_greedily

ANSWERS, NEW_TOKENS = 8, 48
MOST_ASKED = 192
"""Tokens of a prompt. All of a sequence is computed for each token of its answer: this is to cost a few steps."""


def answer_some(training: Training) -> dict[str, Any]:
    """The likeliest answers, beside those that people gave, and the share that ended by itself. Collective.

    Nothing where no dialogue of the validation split is short enough.
    """
    room = min(MOST_ASKED, training.config.model.max_seq_len - NEW_TOKENS)
    each = (exchanges(dataset, "validation", room) for dataset in training.sources.datasets.values())
    some = list(islice(in_turn(each), ANSWERS))
    if not some:
        return {}
    tokenizer = load_tokenizer(Path(training.config.run.dir) / "tokenizer")
    prompts, answers = zip(*some, strict=True)
    written = write_greedily(
        training.decoder,
        prompts,
        NEW_TOKENS,
        tokenizer.stop_ids,
        width=-(-(max(map(len, prompts)) + NEW_TOKENS) // training.layout.tp) * training.layout.tp,
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
