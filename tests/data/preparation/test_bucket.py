"""The shuffle on disk: nothing lost, nothing twice, and the same result for any reading order, runs and buckets."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moray.data.preparation.bucket import SortBucket, read_bucket
from moray.data.preparation.ledger import Ledger
from moray.data.preparation.near import FindNear, dropped
from moray.data.preparation.runs import BAND, RunWriter, buckets_for, record_of, runs_in
from moray.data.preparation.selection import Selection
from moray.data.preparation.tasks import perform
from moray.data.reading.documents import Document

DOCUMENTS = [Document(f"key-{n}", f"text number {n} " + "x" * (n % 50)) for n in range(500)]
Shuffled = tuple[list[tuple[str, str]], Ledger, list[int]]


def shuffled(
    documents: list[Document],
    folder: Path,
    *,
    seed: int = 0,
    run_bytes: int = 1 << 30,
    n_buckets: int = 1,
    keep_equal: bool = False,
    selection: Selection | None = None,
    scores: dict[str, int] | None = None,
    bands: dict[str, list[int]] | None = None,
    counts_copies: bool = False,
) -> Shuffled:
    """Keys and texts in their order, what was dropped, and their sides."""
    folder.mkdir()
    writer = RunWriter(folder, run_bytes, has_bands=bands is not None, counts_copies=counts_copies)
    for document in documents:
        hashes = None if bands is None else np.array(bands.get(document.key, []), np.uint64)
        writer.add(record_of(document, seed, score=(scores or {}).get(document.key, 0), bands=hashes))
    writer.flush()
    runs, selection = runs_in(folder), selection or Selection()
    assert len(runs) == writer.n_runs
    near = []
    if bands is not None:
        finders = [FindNear(folder / f"near-{n}", runs, selection, n, n_buckets) for n in range(n_buckets)]
        near = [perform(task).folder for task in finders]
    content, ledger, sides = [], Ledger(), []
    for number in range(n_buckets):
        out = folder / f"bucket-{number}"
        done = perform(SortBucket(out, runs, ("all",), tuple(near), selection, keep_equal, number, n_buckets, False))
        records = list(read_bucket(np.load(out / "order.npy"), runs))
        content += [(record.key.decode(), record.text.decode()) for record in records]
        sides += [record.side for record in records]
        ledger.add(Ledger.of_json(done.found["ledger"]))
    return content, ledger, sides


def test_every_document_once_in_an_order_that_only_the_seed_decides(tmp_path: Path) -> None:
    order, *_ = shuffled(DOCUMENTS, tmp_path / "a")
    assert Counter(order) == Counter((document.key, document.text) for document in DOCUMENTS)
    assert shuffled(DOCUMENTS[::-1], tmp_path / "b")[0] == order
    assert shuffled(DOCUMENTS, tmp_path / "c", seed=1)[0] != order
    # A shuffle: about half of the neighbours stand in rising order (500 coin flips, 5 standard deviations).
    numbers = [int(key.removeprefix("key-")) for key, _ in order]
    rising = sum(a < b for a, b in pairwise(numbers))
    assert abs(rising - 250) < 5 * 500**0.5 / 2


def test_exact_duplicates_are_dropped_whatever_the_reading_order(tmp_path: Path) -> None:
    copies = [Document(f"copy-{n}", DOCUMENTS[n % 40].text) for n in range(120)]
    documents = DOCUMENTS + copies
    order, ledger, _ = shuffled(documents, tmp_path / "a")
    assert len(order) == len({text for _, text in order}) == 500
    n_bytes = sum(len(copy.text) for copy in copies)
    assert ledger.total("exact duplicates") == (120, n_bytes)
    kept = dict(order)
    texts = {document.key: document.text for document in documents}
    (samples,) = ledger.samples.values()
    assert len(samples) == 20
    for sample in samples:
        assert sample.key not in kept
        assert kept[sample.kept] == texts[sample.key], "the one that stayed has that text"
    random.Random(0).shuffle(documents)
    again, other, _ = shuffled(documents, tmp_path / "b")
    assert again == order
    assert other.as_json() == ledger.as_json()


def test_equal_texts_may_all_stay_and_are_told_apart(tmp_path: Path) -> None:
    documents = [*DOCUMENTS[:5], *DOCUMENTS[:3], DOCUMENTS[0], Document("other", DOCUMENTS[0].text)]
    order, ledger, _ = shuffled(documents, tmp_path / "a", keep_equal=True)
    keys = sorted(key for key, _ in order)
    assert keys == ["key-0", "key-0#2", "key-0#3", "key-1", "key-1#2", "key-2", "key-2#2", "key-3", "key-4", "other"]
    assert not list(ledger.dropped())
    assert shuffled(documents[::-1], tmp_path / "b", keep_equal=True)[0] == order


@pytest.mark.parametrize("run_bytes", [400, 20_000])
@pytest.mark.parametrize("n_buckets", [2, 64])
def test_runs_and_buckets_of_any_size_change_nothing(tmp_path: Path, run_bytes: int, n_buckets: int) -> None:
    documents = DOCUMENTS + [Document(f"copy-{n}", "the same long text " * 20) for n in range(300)]
    bands = {document.key: [n % 7, (n % 11) << 60] for n, document in enumerate(documents) if n % 3}
    whole = shuffled(documents, tmp_path / "whole", bands=bands)
    cut = shuffled(documents, tmp_path / "cut", bands=bands, run_bytes=run_bytes, n_buckets=n_buckets)
    assert cut[0] == whole[0]
    assert cut[1].as_json() == whole[1].as_json()


@pytest.mark.parametrize("run_bytes", [80_000, 1 << 30])
@pytest.mark.parametrize("selection", [Selection(), Selection(cut=3)])
def test_copies_that_are_only_counted_are_accounted_for_like_others(
    tmp_path: Path, run_bytes: int, selection: Selection
) -> None:
    documents = DOCUMENTS[:50] + [Document(f"copy-{n}", f"a text of {n % 5}") for n in range(600)]
    random.Random(0).shuffle(documents)
    bands = {document.key: [len(document.text)] for document in documents}
    scores = {document.key: int(document.text[-1]) for document in documents if document.text[-1].isdigit()}
    given = {"scores": scores, "bands": bands, "selection": selection}
    whole = shuffled(documents, tmp_path / "whole", **given)  # type: ignore[arg-type]
    counted = shuffled(documents, tmp_path / "counted", run_bytes=run_bytes, counts_copies=True, **given)  # type: ignore[arg-type]
    assert counted[0] == whole[0]
    assert counted[1].as_json() == whole[1].as_json()
    n_written = [len(run.index(0, 1)) for run in runs_in(tmp_path / "counted")]
    assert max(n_written) <= 50 + 5 * 21
    assert sum(n_written) < 600


def test_whoever_shares_a_band_with_a_smaller_digest_is_dropped(tmp_path: Path) -> None:
    """Against all pairs, one by one."""
    chance = random.Random(3)
    bands = {document.key: [chance.randrange(300) for _ in range(3)] for document in DOCUMENTS}
    digests = {document.key: record_of(document, 0).digest for document in DOCUMENTS}
    order, ledger, _ = shuffled(DOCUMENTS, tmp_path / "a", bands=bands, n_buckets=4)
    losers = {
        one for one in bands for other in bands if digests[other] < digests[one] and set(bands[one]) & set(bands[other])
    }
    assert {key for key, _ in order} == bands.keys() - losers
    assert ledger.total("near-duplicates")[0] == len(losers) > 100
    by_digest = {digest.hex(): key for key, digest in digests.items()}
    for sample in ledger.samples["near-duplicates", "MinHash"]:
        assert set(bands[by_digest[sample.kept]]) & set(bands[sample.key])


def test_equal_texts_are_no_near_duplicates_of_each_other() -> None:
    bands = np.array([(1, b"a" * 16, 0), (1, b"a" * 16, 0), (2, b"b" * 16, 0)], BAND)
    assert len(dropped(bands)) == 0
    assert len(dropped(bands[:0])) == 0


def test_who_is_not_good_enough_drops_nobody(tmp_path: Path) -> None:
    bands = {document.key: [0] for document in DOCUMENTS}
    best = {document.key: n for n, document in enumerate(DOCUMENTS)}
    order, ledger, _ = shuffled(DOCUMENTS, tmp_path / "a", bands=bands, scores=best, selection=Selection(cut=499))
    assert order == [("key-499", DOCUMENTS[499].text)]
    assert ledger.total("quality")[0] == 499


def below(limit: int, content: Shuffled) -> set[str]:
    order, _, sides = content
    return {key for (key, _), side in zip(order, sides, strict=True) if side < limit}


def test_sides_stay_when_documents_are_added(tmp_path: Path) -> None:
    limit = (1 << 64) // 10
    few = below(limit, shuffled(DOCUMENTS[:300], tmp_path / "few"))
    many = below(limit, shuffled(DOCUMENTS[::-1], tmp_path / "many", seed=9))
    assert many & {document.key for document in DOCUMENTS[:300]} == few
    assert 15 < len(few) < 45


@pytest.mark.parametrize("id", ["", "same"])
def test_equal_ids_are_split_like_any_others(tmp_path: Path, id: str) -> None:
    documents = [Document(id, document.text) for document in DOCUMENTS]
    _, _, sides = shuffled(documents, tmp_path / "a")
    assert 25 < sum(side < (1 << 64) // 10 for side in sides) < 75


def test_buckets_are_a_power_of_two_that_is_enough() -> None:
    sizes = [buckets_for(n, 64) for n in (0, 1, 64, 65, 128, 129, 1000, 1 << 40)]
    assert sizes == [1, 1, 1, 2, 2, 4, 16, 1 << 16]
