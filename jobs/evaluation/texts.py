"""Texts: how many bits each byte costs, or whether the model foretells the last word."""

import math
from collections.abc import Sequence
from typing import Any

from moray import UserError
from moray.jobs.evaluation.choices import BETWEEN_ITEMS
from moray.jobs.evaluation.metrics import Metric, perplexity, proportion, ratio
from moray.jobs.evaluation.scoring import Model, score
from moray.jobs.evaluation.sequences import Continuation, continuations, encode, windows
from moray.jobs.evaluation.tasks import Task, Text


def weigh(model: Model, task: Task) -> list[dict[str, Any]]:
    """For each text: the bits that all its tokens cost, and its bytes.

    A text begins as the tokenizer begins a document; where that is with a BOS, all tokens of the text are predicted,
    else all but the first. Its end (EOS) is not. Long texts are cut into windows (see `windows`).
    Raises UserError for a text of one token that nothing precedes.
    """
    texts = [item.text for item in task.items]
    documents = list(encode(model, texts, model.tokenizer.document_start))
    for item, tokens in zip(task.items, documents, strict=True):
        if len(tokens) < 2:
            raise UserError(f"{item.place}: the text is one token, and the tokenizer has no BOS to predict it from")
    parts = [windows(model, tokens) for tokens in documents]
    scores = iter(score(model, [part for each in parts for part in each]))
    return [
        {
            "bits": -math.fsum(next(scores).log_likelihood for _ in each) / math.log(2),
            "bytes": len(text.encode()),
            "tokens": len(tokens) - 1,
            "cut": len(each) > 1,
        }
        for text, tokens, each in zip(texts, documents, parts, strict=True)
    ]


def text_metrics(results: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    return {"bits_per_byte": ratio([each["bits"] for each in results], [each["bytes"] for each in results])}


def foretell(model: Model, task: Task) -> list[dict[str, Any]]:
    """For each text: the log-likelihood of its last word given the rest, and whether greedy prediction gives it whole.

    A word is what stands behind the last white space, with the stop or comma that it ends in. Raises UserError for a
    text of one word.
    """
    examples = "".join(item.text.rstrip() + BETWEEN_ITEMS for item in task.examples)
    texts = [_parted(item, examples) for item in task.items]
    sequences = continuations(model, texts)
    scores = score(model, [each for each, _ in sequences])
    return [
        {"word": text.after.strip(), "log_likelihood": found.log_likelihood, "correct": found.is_greedy, "cut": cut}
        for text, found, (_, cut) in zip(texts, scores, sequences, strict=True)
    ]


def _parted(item: Text, examples: str) -> Continuation:
    """All but the last word, and that with the white space before it."""
    whole, words = item.text.rstrip(), item.text.split()
    if len(words) < 2:
        raise UserError(f"{item.place}: text={item.text[:80]!r} must have two words for the last one to be foretold")
    before = whole[: -len(words[-1])].rstrip()
    return Continuation(item.place, examples + before, whole[len(before) :])


def word_metrics(results: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    return {
        "acc": proportion([each["correct"] for each in results]),
        "perplexity": perplexity([each["log_likelihood"] for each in results]),
    }
