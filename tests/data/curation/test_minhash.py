"""Signatures and bands, against sets of shingles in Python and the closed forms of the S-curve."""

import random
from itertools import pairwise

import numpy as np
import pytest

from moray import UserError
from moray.data.curation.minhash import N_HASHES, NO_KEY, band_keys, banding, probability, signatures, threshold_of
from moray.data.curation.words import Words

ENGLISH = ["".join(random.Random(n).choices("etaoinshrdlu", k=n % 7 + 2)) for n in range(3000)]
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def signature(*texts: str, n_hashes: int = N_HASHES) -> np.ndarray:
    return signatures(Words.of(texts), n_hashes)


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + 5]) for start in range(max(len(words) - 4, 1))}


def pairs(vocabulary: list[str], join: str, n: int) -> tuple[list[str], np.ndarray]:
    """2n texts, every other one made of the one before it, and the Jaccard index of each pair by brute force."""
    chance = random.Random(join)
    texts, jaccard = [], []
    for _ in range(n):
        words = chance.choices(vocabulary, k=400)
        changed = [*words]
        for place in chance.sample(range(400), chance.randrange(1, 36)):
            changed[place] = chance.choice(vocabulary)
        one, other = shingles(words), shingles(changed)
        jaccard.append(len(one & other) / len(one | other))
        texts += [join.join(words), join.join(changed)]
    return texts, np.array(jaccard)


@pytest.fixture(scope="module", params=[(ENGLISH, " "), (HAN, "")], ids=["English", "Chinese"])
def planted(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Signatures [pairs, 2, K] and Jaccard indices [pairs]."""
    texts, jaccard = pairs(*request.param, n=1000)
    return signature(*texts).reshape(len(jaccard), 2, N_HASHES), jaccard


def test_equal_places_estimate_the_jaccard_index(planted: tuple[np.ndarray, np.ndarray]) -> None:
    """The error's deviation is sqrt(J (1 - J) / K); of a normal one the mean size is sqrt(2 / pi) of that."""
    found, jaccard = planted
    error = (found[:, 0] == found[:, 1]).mean(axis=1) - jaccard
    deviation = np.sqrt(jaccard * (1 - jaccard) / N_HASHES)
    assert np.abs(error).mean() == pytest.approx(np.sqrt(2 / np.pi) * deviation.mean(), rel=0.1)
    assert abs((error / deviation).mean()) < 4 / np.sqrt(len(jaccard))  # no bias


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (20, 5)])
def test_pairs_are_found_as_often_as_the_closed_form_says(
    planted: tuple[np.ndarray, np.ndarray], bands: int, rows: int
) -> None:
    found, jaccard = planted
    keys = band_keys(found.reshape(-1, N_HASHES), bands, rows).reshape(len(jaccard), 2, bands)
    shared = (keys[:, 0] == keys[:, 1]).any(axis=1)
    for low, high in pairwise((0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)):
        here = (low <= jaccard) & (jaccard < high)
        chances = np.array([probability(value, bands, rows) for value in jaccard[here].tolist()])
        assert abs(shared[here].sum() - chances.sum()) < 4 * np.sqrt((chances * (1 - chances)).sum()) + 1
    # Texts of different pairs have nothing in common.
    assert not np.intersect1d(keys[:500], keys[500:]).size


@pytest.mark.parametrize(("bands", "rows", "expected"), [
    (14, 8, [0.053, 0.211, 0.565, 0.772, 0.924, 0.988]), (20, 13, [0.002, 0.026, 0.177, 0.382, 0.677, 0.924])
])  # fmt: skip
def test_the_curve_is_the_published_one(bands: int, rows: int, expected: list[float]) -> None:
    found = [probability(jaccard, bands, rows) for jaccard in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85)]
    assert found == pytest.approx(expected, abs=6e-4)


def test_signatures_and_keys_stay_what_they_are() -> None:
    """What is a duplicate may not change from one version to the next."""
    found = signature("one two three four five six", "明月光", n_hashes=4)
    assert found.tolist() == [
        [10264369, 2865788060, 337143588, 2545054387],
        [2790305542, 1209005146, 3169219654, 1502357458],
    ]
    assert band_keys(found, 2, 2).tolist() == [
        [1387817081463284383, 12234923977167799141],
        [3045939486307683035, 17096976249000276171],
    ]


def by_hand(shingle_hashes: list[int], factor: int) -> int:
    return min((value >> 32) * factor % (1 << 32) for value in shingle_hashes)


def test_signatures_are_minima_of_products() -> None:
    texts = ["a b c d e f g h", "明月", "a"]
    words = Words.of(texts)
    hashes, first = words.ngrams(5)
    spans = [hashes[begin:end].tolist() for begin, end in pairwise(first.tolist())]
    splitmix64 = (0xE220A8397B1DCDAF, 0x910A2DEC89025CC1)  # of 0 and 1, as published
    factors = [value % (1 << 32) | 1 for value in splitmix64]
    assert signature(*texts, n_hashes=2).tolist() == [[by_hand(span, factor) for factor in factors] for span in spans]


def test_a_text_has_one_signature_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", *pairs(ENGLISH, " ", 5)[0], "床前明月光", "one", "", "x " * 3000, ""]
    alone = np.concatenate([signature(text) for text in texts])
    assert (signature(*texts) == alone).all()
    assert (signature(*texts[::-1]) == alone[::-1]).all()
    monkeypatch.setattr("moray.data.curation.minhash._CHUNK", 7)
    monkeypatch.setattr("moray.data.curation.words.STRETCH", 11)
    assert (signature(*texts) == alone).all()
    assert signature().shape == (0, N_HASHES)


def test_short_texts_are_one_shingle_and_wordless_ones_are_alike_to_none() -> None:
    keys = band_keys(signature("one two", "one two.", "one two three", "", "...", "—"), 14, 8)
    assert (keys[0] == keys[1]).all()
    assert not np.intersect1d(keys[0], keys[2]).size
    assert (keys[3:] == NO_KEY).all()
    assert (keys[:3] != NO_KEY).all()


def test_bands_of_equal_numbers_have_different_keys() -> None:
    same = np.full((1, 112), 7, np.uint32)
    assert len(np.unique(band_keys(same, 14, 8))) == 14


def test_banding_comes_near_to_what_is_asked() -> None:
    assert banding(0.72) == (14, 8)
    assert banding(0.76, 112) == (12, 9)
    assert banding(0.8, 9000)[0] * banding(0.8, 9000)[1] > 8500
    for threshold in np.linspace(0.3, 0.98, 30).tolist():
        bands, rows = banding(threshold, 450)
        assert bands * rows <= 450
        assert abs(threshold_of(bands, rows) - threshold) <= 0.05


@pytest.mark.parametrize(
    ("threshold", "said"), [(0.22, "try 0.13 or 0.30"), (1.2, "0.01 to 0.99; try 0.99"), (-1, "try 0.01")]
)
def test_a_threshold_out_of_reach_is_told(threshold: float, said: str) -> None:
    with pytest.raises(UserError, match=said):
        banding(threshold)
