"""How a quality classifier learns, by AdaGrad, and how well it then tells documents that it has not seen.

Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", 2011 (diagonal, eq. 1).
"""

# Shapes: H weights.

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from moray import UserError
from moray.data.curation.classifier import FEATURE_BITS, Classifier, features
from moray.data.curation.words import folded_words

_EPOCHS, _STEP, _DAMPING = 5, 10.0, 1e-6
"""Books from web pages, 3 kB of each, learnt and held out by book and page: AUC 0.998. Less damping lets words that
were seen once decide."""
_PIECE = 4096  # code points: a longer document is learnt in pieces, as it has more to learn from


def train_classifier(good: Iterable[str], bad: Iterable[str], *, seed: int, held_out: float = 0.1) -> Classifier:
    """Learns good from bad, both as important, however many there are of each.

    Of equal texts one counts, and their order does not: the texts and the seed decide. The share `held_out` of either,
    by hash of the text, and one document at least, is not learnt from and measures the AUC.
    Memory: the texts twice, and about as much again for their features.
    Raises UserError for fewer than two different texts of a kind, for a share that is none and for a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed={seed} must be 0 or more")
    if not 0 < held_out < 1:
        raise UserError(f"held_out={held_out} must lie between 0 and 1, for example 0.1")
    good_trained, good_kept = _split("good", good, held_out)
    bad_trained, bad_kept = _split("bad", bad, held_out)
    weights, shift = _quantised(_fit(good_trained, bad_trained, seed))
    sizes = (len(good_trained), len(bad_trained)), (len(good_kept), len(bad_kept))
    found = Classifier(weights, shift, math.nan, *sizes)
    scores = [np.concatenate([found.score(words) for words in folded_words(kept)]) for kept in (good_kept, bad_kept)]
    return replace(found, auc=auc(*scores))


def _split(name: str, texts: Iterable[str], held_out: float) -> tuple[list[str], list[str]]:
    """Those to learn from and those held out, each in the order of their digests."""
    by_digest = {hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest(): text for text in texts}
    if len(by_digest) < 2:
        raise UserError(
            f"{name} holds {len(by_digest)} documents that differ; a classifier takes two at least, one to learn from "
            "and one to measure it by, and some hundreds to be of use"
        )
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    n_kept = min(math.ceil(held_out * len(ordered)), len(ordered) - 1)
    return ordered[n_kept:], ordered[:n_kept]


def _pieces(texts: Sequence[str]) -> list[str]:
    """The texts, longer ones in pieces of about the same size."""
    pieces = []
    for text in texts:
        size = math.ceil(len(text) / max(1, math.ceil(len(text) / _PIECE)))
        pieces += [text[start : start + size] for start in range(0, len(text), max(size, 1))]
    return pieces


def _fit(good: Sequence[str], bad: Sequence[str], seed: int) -> np.ndarray:
    """Weights, float64 [H], by AdaGrad on the log loss, a document at a time in an order that the seed decides."""
    documents = []
    good, bad = _pieces(good), _pieces(bad)
    for label, texts in ((1.0, good), (0.0, bad)):
        share = (len(good) + len(bad)) / max(2 * len(texts), 1)  # of the loss: good and bad count alike
        for words in folded_words(texts):
            places, first = features(words)
            documents += [
                (places[begin:end].astype(np.int32), label, share)
                for begin, end in pairwise(first.tolist())
                if begin < end
            ]
    weights, squares = np.zeros(1 << FEATURE_BITS), np.full(1 << FEATURE_BITS, _DAMPING)
    chance = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        for number in chance.permutation(len(documents)).tolist():
            places, label, share = documents[number]
            expected = (1 + math.tanh(weights[places].mean() / 2)) / 2
            gradient = share * (expected - label) / len(places)
            squares[places] += gradient * gradient
            weights[places] -= _STEP * gradient / np.sqrt(squares[places])
    return weights


def _quantised(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """int16 [H] and how many bits are behind the point: as many as the largest weight leaves, so that no division by
    another scale is needed to score.
    """
    _, exponent = math.frexp(np.abs(weights).max())  # it is below 2^exponent
    shift = min(max(15 - exponent, 0), 30)
    return np.rint(weights * 2.0**shift).clip(-32767, 32767).astype(np.int16), shift


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    """How often a good document has a higher score than a bad one, a tie being half: the area under the ROC curve.

    Source: Hanley and McNeil, 1982, by the ranks of Mann and Whitney.
    """
    _, number, counts = np.unique(np.concatenate([good, bad]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]  # those of a tie share their mean
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))
