"""Texts into the sequences that are scored."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moray import UserError
from moray.jobs.evaluation.scoring import Model, Scored


def encode(model: Model, texts: Iterable[str], start: tuple[int, ...]) -> Iterator[np.ndarray]:
    """`start` and the ids of each text. A special token that is written in a text is plain text, as in training.

    Raises UserError for tokens that the model does not have.
    """
    begin, entries = len(model.tokenizer.document_start), model.decoder.config.vocab_size
    for document in model.tokenizer.encode_documents(texts):
        tokens = np.concatenate([np.array(start, document.dtype), document[begin:-1]])
        if len(tokens) and (highest := int(tokens.max())) >= entries:
            raise UserError(f"a text holds token {highest} and the model's vocab_size={entries}: another's tokenizer")
        yield tokens


class Continuation(NamedTuple):
    """Where it comes from (file and line), what stands before, and what is scored."""

    place: str
    before: str
    after: str


def continuations(model: Model, texts: Sequence[Continuation]) -> list[tuple[Scored, bool]]:
    """For each: the sequence that scores `after`, and whether its context had to be cut.

    Both texts are tokenized as one, as the model saw them in training. The context is what that has in common with
    the tokens of `before` alone; all behind it is scored, so where a token reaches over the border it is scored whole.
    White space that `before` ends in is always scored, as in lm-eval: some choices join it to their first token, others
    leave it alone, and their scores would not compare.
    A context that is too long loses its beginning, BOS too.
    Raises UserError, naming the place, where `after` has no tokens, or more than the model's longest sequence.
    """
    start = model.tokenizer.prompt_start
    befores = encode(model, (each.before.rstrip() for each in texts), start)
    wholes = encode(model, (each.before + each.after for each in texts), start)
    return [_continuation(model, *each) for each in zip(texts, befores, wholes, strict=True)]


def _continuation(model: Model, text: Continuation, before: np.ndarray, whole: np.ndarray) -> tuple[Scored, bool]:
    place, _, after = text
    common = _common(before, whole)
    if not common:  # nothing predicts the first token, and BOS does where the tokenizer has one
        first = np.array(model.tokenizer.document_start, whole.dtype)
        whole, common = np.concatenate([first, whole]), len(first)
    n_scored, longest = len(whole) - common, model.longest
    if not common:
        raise UserError(f"{place}: nothing stands before {after!r}, and the tokenizer has no BOS that could")
    if not n_scored:
        raise UserError(f"{place}: {after!r} has no tokens of its own; leave it out, or write what is to be scored")
    if n_scored > longest:
        raise UserError(f"{place}: {after[:40]!r} … has {n_scored} tokens; the model takes max_seq_len={longest}")
    return Scored(whole[-longest - 1 :], n_scored), len(whole) > longest + 1


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    differing = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differing[0]) if len(differing) else shorter


def windows(model: Model, tokens: np.ndarray) -> list[Scored]:
    """A document in windows of the model's longest sequence that do not overlap: each token but the first, once.

    A token is predicted from those before it in its window alone. So the first of a window has one token before it
    (the last that the window before predicts), and long documents cost more bits than by windows that overlap.
    """
    starts = range(0, len(tokens) - 1, model.longest)
    parts = [tokens[start : start + model.longest + 1] for start in starts]
    return [Scored(part, len(part) - 1) for part in parts]
