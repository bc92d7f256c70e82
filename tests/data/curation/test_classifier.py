"""Scores against Python's own integers; learning, on made-up text; the AUC, by comparing every pair."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from moray import UserError
from moray.data.curation.classifier import N_BINS, ZERO_BIN, Classifier, about_of, bin_of, probability_of
from moray.data.curation.learning import auc, train_classifier
from moray.data.curation.words import Words

COMMON = [f"w{number}" for number in range(300)]


def texts(n: int, own: list[str], seed: int) -> list[str]:
    """Of 80 common words, and of 8 of their own kind."""
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        words = chance.choices(COMMON, k=80) + chance.choices(own, k=8)
        chance.shuffle(words)
        found.append(" ".join(words))
    return found


def made_up(shift: int) -> Classifier:
    weights = np.random.default_rng(0).integers(-32767, 32768, 1 << 18).astype(np.int16)
    return Classifier(weights, shift, 0.75, (10, 20), (3, 4))


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(texts(300, ["good", "fine"], 0), texts(200, ["bad", "poor"], 1), seed=0)


@pytest.mark.parametrize("shift", [0, 7, 11, 30])
def test_bins_are_exact(shift: int) -> None:
    classifier = made_up(shift)
    documents = ["a b a b c", "", "one", *texts(20, ["x"], 0)]
    for text, bin in zip(documents, classifier.score(Words.of(documents)).tolist(), strict=True):
        words = Words.of([text])
        pairs = words.ngrams(2)[0].tolist()
        places = {value >> 46 for value in [*words.hashes.tolist(), *pairs]}
        total = sum(int(classifier.weights[place]) for place in places)
        by_hand = 32768 + (total * 2048) // (len(places) * 2**shift) if places else 32768
        assert bin == min(max(by_hand, 0), 65535)


def test_a_document_scores_alike_in_any_batch(monkeypatch: pytest.MonkeyPatch, trained: Classifier) -> None:
    documents = ["", *texts(30, ["good", "poor"], 5), "床前明月光", "good"]
    alone = [int(trained.score(Words.of([text]))[0]) for text in documents]
    monkeypatch.setattr("moray.data.curation.words.STRETCH", 7)
    assert trained.score(Words.of(documents)).tolist() == alone
    assert trained.score(Words.of(documents[::-1])).tolist() == alone[::-1]
    assert alone[0] == ZERO_BIN
    assert trained.score(Words.of([])).tolist() == []


def test_what_differs_is_learnt(trained: Classifier) -> None:
    assert trained.auc == 1.0
    assert (trained.n_trained, trained.n_held_out) == ((270, 180), (30, 20))
    good, bad = (trained.score(Words.of(texts(50, own, 9))) for own in (["good", "fine"], ["bad", "poor"]))
    assert good.min() > ZERO_BIN > bad.max()


def test_what_does_not_differ_is_told_by_chance() -> None:
    """The deviation of the AUC of n against n without a difference is sqrt((2n + 1) / 12) / n."""
    n = 200
    found = train_classifier(texts(n, ["x"], 2), texts(n, ["x"], 3), seed=0, held_out=0.5)
    assert abs(found.auc - 0.5) < 4 * math.sqrt((n + 1) / 12) / (n / 2)


def test_training_again_gives_the_same_bits_whatever_the_order(trained: Classifier) -> None:
    good, bad = texts(300, ["good", "fine"], 0), texts(200, ["bad", "poor"], 1)
    again = train_classifier(iter([*good[::-1], good[0]]), bad[100:] + bad[:100], seed=0)
    assert again.to_bytes() == trained.to_bytes()
    other = train_classifier(good, bad, seed=1)
    assert other.fingerprint != trained.fingerprint


def test_a_few_bad_documents_are_told_from_many_good_ones() -> None:
    found = train_classifier(texts(400, ["good"], 0), texts(20, ["bad"], 1), seed=0)
    good, bad = (found.score(Words.of(texts(50, own, 7))) for own in (["good"], ["bad"]))
    assert auc(good, bad) > 0.99
    assert np.median(bad) < ZERO_BIN < np.median(good)  # as of both alike, though there are twenty times as many


def test_long_documents_are_learnt_in_pieces_and_held_out_whole() -> None:
    good = [" ".join(texts(40, ["good"], seed)) for seed in range(6)]
    found = train_classifier(good, texts(200, ["bad"], 99), seed=0)
    assert (found.n_trained[0], found.n_held_out[0], found.auc) == (5, 1, 1.0)
    assert found.score(Words.of(texts(20, ["good"], 50))).min() > ZERO_BIN


@pytest.mark.parametrize(("good", "bad", "said"), [
    ([], ["a", "b"], "good holds 0 documents that differ"),
    (["a", "b"], ["a", "a"], "bad holds 1 documents that differ"),
])  # fmt: skip
def test_too_few_documents_are_told(good: list[str], bad: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_classifier(good, bad, seed=0)


def test_two_documents_of_a_kind_do_and_may_be_without_words() -> None:
    assert train_classifier(["a", "b"], ["c", "d"], seed=0, held_out=0.99).n_trained == (1, 1)
    assert train_classifier(["", "."], ["!", "?"], seed=0).auc == 0.5


@pytest.mark.parametrize(("options", "said"), [({"held_out": 0.0}, "held_out=0.0"), ({"seed": -1}, "seed=-1")])
def test_settings_that_cannot_be_are_told(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_classifier(["a", "b"], ["c", "d"], **{"seed": 0, **options})  # type: ignore[arg-type]


def test_the_auc_is_that_of_all_pairs() -> None:
    chance = np.random.default_rng(0)
    for _ in range(20):
        good, bad = chance.integers(0, 9, 31), chance.integers(0, 7, 17)
        pairs = [(g > b) + (g == b) / 2 for g in good.tolist() for b in bad.tolist()]
        assert auc(good, bad) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_bins_and_probabilities_are_each_others() -> None:
    assert [bin_of(probability_of(bin)) for bin in range(N_BINS)] == list(range(N_BINS))
    assert probability_of(ZERO_BIN) == 0.5
    assert probability_of(ZERO_BIN + 2048) == pytest.approx(1 / (1 + math.exp(-1)))
    assert [bin_of(value) for value in (0, 1e-300, 0.5, 1 - 1e-16, 1)] == [0, 0, ZERO_BIN, 65535, 65535]
    with pytest.raises(UserError, match=r"probability=1.5"):
        bin_of(1.5)


def test_a_file_gives_back_the_same_classifier(tmp_path: Path, trained: Classifier) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(trained.to_bytes())
    loaded = Classifier.load(path)
    assert loaded.to_bytes() == trained.to_bytes()
    assert (loaded.fingerprint, loaded.auc, loaded.n_trained) == (trained.fingerprint, 1.0, (270, 180))
    assert about_of(path)["fingerprint"] == trained.fingerprint


def test_fingerprints_tell_what_decides_on_scores() -> None:
    one = made_up(7)
    assert one.fingerprint == replace(one, auc=0.1, n_trained=(1, 1)).fingerprint
    assert one.fingerprint != replace(one, shift=8).fingerprint
    assert one.fingerprint != replace(one, weights=one.weights[::-1].copy()).fingerprint


def test_what_is_no_classifier_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    for content in (b"", b"not at all one", save({"weights": np.zeros(3)}), made_up(1).to_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"q.safetensors is no quality classifier"):
            Classifier.load(path)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"{missing} is no quality classifier"):
            Classifier.load(missing)


def test_another_version_and_damage_are_told(tmp_path: Path) -> None:
    path, whole = tmp_path / "q.safetensors", made_up(1).to_bytes()
    path.write_bytes(whole.replace(rb"\"version\": 1", rb"\"version\": 2"))
    with pytest.raises(UserError, match=r"q.safetensors is a quality classifier of version 2 .* reads 1"):
        Classifier.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"q.safetensors is damaged"):
        Classifier.load(path)
    path.write_bytes(save({"other": np.zeros(1)}, {"moray.quality": json.dumps({"version": 9})}))
    with pytest.raises(UserError, match="version 9"):
        Classifier.load(path)
