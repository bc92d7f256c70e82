"""Whether a document reads more like good text or like bad: logistic regression on hashed words and pairs of words.

Trained in floating point, it scores in integers alone: a document's bin is the same bits on every machine and in any
batch. Sources: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016 (the mean of the weights of words
and pairs, hashed); Duchi, Hazan and Singer, "Adaptive Subgradient Methods", 2011 (AdaGrad, eq. 1, diagonal); Brown et
al., 2020, appendix A (quality by a linear classifier of hashed features).
"""

# Shapes: D documents, F features of one or of all of them, H weights.

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moray import UserError
from moray.data.curation.words import Words, folded

N_BINS = 1 << 16
ZERO_BIN = N_BINS // 2
BINS_PER_UNIT = 2048
"""A bin is 1/2048 of a logit, and bin 32768 begins at logit 0: bins reach from -16 to 16."""

_VERSION = 1
_FEATURES = "folded words and pairs of words, hashed to 18 bits, as a set"
_BITS = 18
_METADATA, _WEIGHTS = "moray.quality", "weights"
_EPOCHS, _STEP = 5, 3.0
_TEXTS = 200  # of training, read at a time


@dataclass(frozen=True, eq=False)
class Classifier:
    """weights: int16 [H], in units of 2^-shift logits. auc: of documents held out, n_held_out of them good and bad."""

    weights: np.ndarray
    shift: int
    auc: float
    n_trained: tuple[int, int]
    n_held_out: tuple[int, int]

    def score(self, words: Words) -> np.ndarray:
        """The bin of each document, int64 [D], from 0 (bad) to 65535 (good). `words` are those of folded texts.

        Its logit is the mean of the weights of its different words and pairs; without any, it is 0.
        """
        places, first = _features(words)
        sums = np.diff(np.concatenate([[0], np.cumsum(self.weights[places], dtype=np.int64)])[first])
        counts = np.maximum(np.diff(first), 1)
        # Integers throughout, rounded down; within 64 bits, as there are 2^18 features and shift is 30 at most.
        return np.clip(ZERO_BIN + sums * BINS_PER_UNIT // (counts << self.shift), 0, N_BINS - 1)

    @property
    def fingerprint(self) -> str:
        """Of all that decides on scores: equal ones score alike."""
        decides = json.dumps([_VERSION, _FEATURES, BINS_PER_UNIT, self.shift]).encode()
        return hashlib.sha256(decides + self.weights.astype("<i2").tobytes()).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """A safetensors file: the weights, and in its metadata JSON of all else."""
        about = {"version": _VERSION, "features": _FEATURES, "shift": self.shift, "auc": self.auc,
                 "n_trained": self.n_trained, "n_held_out": self.n_held_out, "fingerprint": self.fingerprint}  # fmt: skip
        # One entry: safetensors would write several in an order that is another each time.
        return save({_WEIGHTS: self.weights}, {_METADATA: json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Raises UserError naming the file where it is no classifier, damaged, or of another version."""
        about = about_of(path)
        if (about["version"], about.get("features")) != (_VERSION, _FEATURES):
            raise UserError(
                f"{path} is a quality classifier of version {about['version']} and this moray reads {_VERSION}; "
                "train it again"
            )
        with safe_open(path, "np") as file:
            weights = file.get_tensor(_WEIGHTS)
        found = cls(weights, about["shift"], about["auc"], tuple(about["n_trained"]), tuple(about["n_held_out"]))
        if found.fingerprint != about["fingerprint"]:
            raise UserError(f"{path} is damaged: its weights are not those that were saved; fetch or train it again")
        return found


def about_of(path: Path) -> dict[str, Any]:
    """What a classifier's file says of it, of whatever version. Raises UserError, naming it, for any other file."""
    try:
        with safe_open(path, "np") as file:
            return dict(json.loads((file.metadata() or {})[_METADATA]))
    except (SafetensorError, OSError, KeyError) as error:
        why = "none of moray's" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no quality classifier ({why}); `moray quality train` makes one") from None


def probability_of(bin: int) -> float:
    """That a document of this bin is good, where as many are bad."""
    return 1 / (1 + math.exp((ZERO_BIN - bin) / BINS_PER_UNIT))


def bin_of(probability: float) -> int:
    """The bin nearest to a probability. Raises UserError for what is none."""
    if not 0 <= probability <= 1:
        raise UserError(f"probability={probability} must lie between 0 and 1, for example 0.5")
    if probability in (0, 1):
        return int(probability) * (N_BINS - 1)
    bin = ZERO_BIN + round(math.log(probability / (1 - probability)) * BINS_PER_UNIT)
    return min(max(bin, 0), N_BINS - 1)


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    """How often a good document has a higher score than a bad one, a tie being half: the area under the ROC curve.

    Source: Hanley and McNeil, 1982, by the ranks of Mann and Whitney.
    """
    _, number, counts = np.unique(np.concatenate([good, bad]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]  # those of a tie share their mean
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def train_classifier(good: Iterable[str], bad: Iterable[str], *, seed: int, held_out: float = 0.1) -> Classifier:
    """Learns good from bad, both as important, however many there are of each.

    Of equal texts one counts, and their order does not: the texts and the seed decide. Of each, the share `held_out`, by
    hash of the text, and one at least, is not learnt from and measures the AUC.
    Memory: the texts, and about as much again for their features. Raises UserError for fewer than two different texts
    of a kind, for a share that is none and for a negative seed.
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
    scores = [np.concatenate([found.score(words) for words in _words(kept)]) for kept in (good_kept, bad_kept)]
    return replace(found, auc=auc(*scores))


def _split(name: str, texts: Iterable[str], held_out: float) -> tuple[list[str], list[str]]:
    """Those to learn from and those held out, each in the order of their digests."""
    by_digest = {hashlib.blake2b(text.encode(), digest_size=16).digest(): text for text in texts}
    if len(by_digest) < 2:
        raise UserError(
            f"{name} holds {len(by_digest)} documents that differ; a classifier takes two at least, one to learn from "
            "and one to measure it by, and some hundreds to be of use"
        )
    ordered = [by_digest[digest] for digest in sorted(by_digest)]
    n_kept = min(math.ceil(held_out * len(ordered)), len(ordered) - 1)
    return ordered[n_kept:], ordered[:n_kept]


def _words(texts: Sequence[str]) -> Iterator[Words]:
    for low in range(0, len(texts), _TEXTS):
        yield Words.of([folded(text) for text in texts[low : low + _TEXTS]])


def _features(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Of each document's different words and pairs: the places of their weights, int64 [F], ascending, and where each
    document's begin, int64 [D + 1].

    As a set: what comes often says less of quality than that it comes (books from web pages, held out: AUC 0.999; by
    count 0.996).
    """
    n_documents = np.int64(len(words.counts))
    keys = [
        np.repeat(np.arange(n_documents) << _BITS, np.diff(first)) | (hashes >> np.uint64(64 - _BITS)).astype(np.int64)
        for hashes, first in ((words.hashes, words.first), words.ngrams(2))
    ]
    of_documents = np.sort(np.concatenate(keys))
    of_documents = of_documents[np.diff(of_documents, prepend=-1) != 0]
    first = np.searchsorted(of_documents, np.arange(n_documents + 1) << _BITS)
    return of_documents & ((1 << _BITS) - 1), first


def _fit(good: Sequence[str], bad: Sequence[str], seed: int) -> np.ndarray:
    """Weights, float64 [H], by AdaGrad on the log loss, a document at a time in an order that the seed decides."""
    documents = []
    for label, texts in ((1.0, good), (0.0, bad)):
        share = (len(good) + len(bad)) / (2 * len(texts))  # of the loss: good and bad count alike
        for words in _words(texts):
            places, first = _features(words)
            documents += [
                (places[begin:end].astype(np.int32), label, share)
                for begin, end in pairwise(first.tolist())
                if begin < end
            ]
    weights, squares = np.zeros(1 << _BITS), np.full(1 << _BITS, 1e-8)
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
