"""The shuffle on disk: nothing lost, nothing twice, and the same result for any reading order and any bucket size."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from moray.data import shuffle
from moray.data.reading.documents import Document
from moray.data.shuffle import ShuffledCorpus, scatter, sort

DOCUMENTS = [Document(f"key-{n}", f"text number {n} " + "x" * (n % 50)) for n in range(500)]


def shuffled(documents: list[Document], folder: Path, seed: int = 0) -> ShuffledCorpus:
    scatter(documents, folder, seed)
    *_, last = sort(folder)
    return last


def content(corpus: ShuffledCorpus) -> list[tuple[str, str]]:
    return [(record.key.decode(), record.text.decode()) for record in corpus]


def test_every_document_once_in_an_order_that_only_the_seed_decides(tmp_path: Path) -> None:
    corpus = shuffled(DOCUMENTS, tmp_path / "a")
    order = content(corpus)
    assert Counter(order) == Counter((document.key, document.text) for document in DOCUMENTS)
    assert order == content(corpus), "may be read again"
    backwards = shuffled(DOCUMENTS[::-1], tmp_path / "b")
    assert content(backwards) == order
    assert content(shuffled(DOCUMENTS, tmp_path / "c", seed=1)) != order
    # A shuffle: about half of the neighbours stand in rising order (500 coin flips, 5 standard deviations).
    numbers = [int(key.removeprefix("key-")) for key, _ in order]
    rising = sum(a < b for a, b in pairwise(numbers))
    assert abs(rising - 250) < 5 * 500**0.5 / 2


def test_exact_duplicates_are_dropped_whatever_the_reading_order(tmp_path: Path) -> None:
    copies = [Document(f"copy-{n}", DOCUMENTS[n % 40].text) for n in range(120)]
    documents = DOCUMENTS + copies
    corpus = shuffled(documents, tmp_path / "a")
    assert (corpus.n_documents, corpus.n_duplicates) == (500, 120)
    assert corpus.n_bytes == sum(len(document.text) for document in DOCUMENTS)
    assert len({text for _, text in content(corpus)}) == 500
    random.Random(0).shuffle(documents)
    assert content(shuffled(documents, tmp_path / "b")) == content(corpus)


def test_large_buckets_are_split_without_changing_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = DOCUMENTS + [Document(f"copy-{n}", "the same long text " * 20) for n in range(300)]
    whole = shuffled(documents, tmp_path / "whole")
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 300)
    split = shuffled(documents, tmp_path / "split")
    assert any(path.parent.suffix == ".split" for path in split.files)
    assert content(split) == content(whole)
    assert (split.n_duplicates, split.sides) == (299, whole.sides)


def validation(corpus: ShuffledCorpus, fraction: float) -> set[str]:
    limit = corpus.validation_limit(fraction)
    return {record.key.decode() for record in corpus if record.side < limit}


def test_the_split_stays_when_documents_are_added(tmp_path: Path) -> None:
    few = validation(shuffled(DOCUMENTS[:300], tmp_path / "few"), 0.1)
    many = validation(shuffled(DOCUMENTS[::-1], tmp_path / "many", seed=9), 0.1)
    assert many & {document.key for document in DOCUMENTS[:300]} == few
    assert 15 < len(few) < 45


@pytest.mark.parametrize("fraction", [1e-12, 0.5, 1 - 1e-12])
def test_both_sides_of_the_split_get_a_document(tmp_path: Path, fraction: float) -> None:
    for n in range(20):
        corpus = shuffled(DOCUMENTS[n : n + 2], tmp_path / str(n))
        assert len(validation(corpus, fraction)) == 1


@pytest.mark.parametrize("id", ["", "same"])
def test_equal_ids_are_split_like_any_others(tmp_path: Path, id: str) -> None:
    documents = [Document(id, document.text) for document in DOCUMENTS]
    corpus = shuffled(documents, tmp_path / "a")
    limit = corpus.validation_limit(0.1)
    few = {record.text for record in corpus if record.side < limit}
    assert 25 < len(few) < 75
    more = shuffled([*documents, *(Document(id, f"more {n}") for n in range(300))], tmp_path / "b", seed=9)
    limit = more.validation_limit(0.1)
    assert {r.text for r in more if r.side < limit and not r.text.startswith(b"more")} == few


def test_one_distinct_document_cannot_be_split(tmp_path: Path) -> None:
    corpus = shuffled([Document("a", "same"), Document("b", "same")], tmp_path / "a")
    with pytest.raises(ValueError, match=r"hold only 1 distinct document, .* needs at least 2"):
        corpus.validation_limit(0.01)
