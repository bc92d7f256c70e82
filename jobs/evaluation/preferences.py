"""Pairs of answers: whether the model finds the preferred one likelier."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moray import UserError
from moray.data.chat.turns import Rendered, Turn
from moray.data.shards import TRAINED
from moray.jobs.evaluation.metrics import Metric, proportion
from moray.jobs.evaluation.scoring import Model, Scored, score
from moray.jobs.evaluation.tasks import Task


def prefer(model: Model, task: Task) -> list[dict[str, Any]]:
    """For each pair the log-likelihoods of the preferred answer and of the other, with the ends of their turns.

    Dialogues are written by the model's chat template. Bytes are those of an answer in UTF-8. Raises UserError where
    there is no template, or it cannot write a pair.
    """
    if model.template is None:
        raise UserError(f"{task.path} holds pairs of answers, and the model's tokenizer has no chat template for them")
    wholes = [[*item.turns, answer] for item in task.items for answer in (item.chosen, item.rejected)]
    places = [item.place for item in task.items for _ in range(2)]
    sequences = [
        _scored(model, place, found) for place, found in zip(places, model.template.render(wholes), strict=True)
    ]
    scores = score(model, [each for each, _ in sequences])
    pairs = list(zip(wholes, scores, (cut for _, cut in sequences), strict=True))
    return [_result(better, worse) for better, worse in zip(pairs[::2], pairs[1::2], strict=True)]


def _scored(model: Model, place: str, dialogue: Rendered | str) -> tuple[Scored, bool]:
    if isinstance(dialogue, str):
        raise UserError(f"{place}: the chat template cannot write it: {dialogue}")
    trained = np.flatnonzero(dialogue.flags & TRAINED)
    begins = trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]]
    tokens, n_scored = dialogue.tokens[: trained[-1] + 1], int(trained[-1] + 1 - begins)
    if n_scored > model.longest:
        raise UserError(f"{place}: an answer has {n_scored} tokens; the model takes max_seq_len={model.longest}")
    return Scored(tokens[-model.longest - 1 :], n_scored), len(tokens) > model.longest + 1


def _result(better: tuple[list[Turn], Any, bool], worse: tuple[list[Turn], Any, bool]) -> dict[str, Any]:
    found = [score.log_likelihood for _, score, _ in (better, worse)]
    lengths = [len(turns[-1].text.strip().encode()) for turns, _, _ in (better, worse)]
    per_byte = [value / length for value, length in zip(found, lengths, strict=True)]
    return {
        "log_likelihoods": found,
        "preferred": found[0] > found[1],  # a tie is none
        "preferred_per_byte": per_byte[0] > per_byte[1],
        "cut": better[2] or worse[2],
    }


def preference_metrics(results: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    return {
        "acc": proportion([each["preferred"] for each in results]),
        "acc_per_byte": proportion([each["preferred_per_byte"] for each in results]),
    }
