"""Whether a document reads more like good text or like bad: logistic regression on hashed words and pairs of words.

It scores in integers alone: a document's bin is the same on every machine and in any batch.
Sources: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016 (the mean of the weights of words and
pairs, hashed); Brown et al., 2020, appendix A (quality by a linear classifier of hashed features).
"""

# Shapes: D documents, F features of all of them, H weights.

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moray import UserError
from moray.data.curation.words import Words, parts_of, stretches

N_BINS = 1 << 16
ZERO_BIN = N_BINS // 2
BINS_PER_UNIT = 2048
"""A bin is 1/2048 of a logit, and bin 32768 begins at logit 0: bins reach from -16 to 16."""

FEATURE_BITS = 18
_VERSION = 1
_FEATURES = "folded words and pairs of words, hashed to 18 bits, as a set"
_METADATA, _WEIGHTS = "moray.quality", "weights"


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
        places, first = features(words)
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
        about = {
            "version": _VERSION,
            "features": _FEATURES,
            "shift": self.shift,
            "auc": self.auc,
            "n_trained": self.n_trained,
            "n_held_out": self.n_held_out,
            "fingerprint": self.fingerprint,
        }
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
    except (SafetensorError, OSError, KeyError, ValueError) as error:
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


def features(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Of each document's different words and pairs: the places of their weights, int64 [F], ascending, and where each
    document's begin, int64 [D + 1].

    As a set: what comes often says less of quality than that it comes (books from web pages, held out: AUC 0.999; by
    count 0.996).
    """
    n_documents, n_other_bits = len(words.counts), np.uint64(64 - FEATURE_BITS)
    keys = [
        _distinct(parts_of(first, low, high) << FEATURE_BITS | (hashes[low:high] >> n_other_bits).astype(np.int64))
        for hashes, first in ((words.hashes, words.first), words.ngrams(2))
        for low, high in stretches(len(hashes))
    ]
    of_documents = _distinct(np.concatenate([np.zeros(0, np.int64), *keys]))
    first = np.searchsorted(of_documents, np.arange(n_documents + 1) << FEATURE_BITS)
    return of_documents & ((1 << FEATURE_BITS) - 1), first


def _distinct(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    return values[np.diff(values, prepend=-1) != 0]
