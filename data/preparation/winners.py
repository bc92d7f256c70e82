"""Who stayed for a near-duplicate: buckets know the digest alone, as that document may lie in any other bucket."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from moray.data.curation.minhash import SHINGLE_WORDS
from moray.data.curation.words import Words, folded
from moray.data.preparation.ledger import SAMPLES, Ledger
from moray.data.preparation.runs import Run, whole


def name_winners(ledger: Ledger, runs: Sequence[Run]) -> None:
    """Puts into the samples of near-duplicates who stayed for them, and how alike the two are."""
    for (stage, _), samples in ledger.samples.items():
        if stage == "near-duplicates":
            shown = sorted(samples)[:SAMPLES]
            found = documents_of({name for sample in shown for name in (sample.digest, sample.kept)}, runs)
            samples[:] = [
                replace(
                    sample,
                    kept=found[sample.kept][0],
                    value=f"Jaccard index {jaccard(found[sample.digest][1], found[sample.kept][1]):.2f}",
                )
                for sample in shown
            ]


def jaccard(one: str, other: str) -> float:
    """Of two texts' sets of 5-word shingles: what MinHash estimates."""
    words = Words.of([folded(one), folded(other)])
    hashes, first = words.ngrams(SHINGLE_WORDS)
    mine, theirs = set(hashes[: first[1]].tolist()), set(hashes[first[1] :].tolist())
    return len(mine & theirs) / max(len(mine | theirs), 1)


def documents_of(digests: Collection[str], runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Keys and texts of documents in runs, by digests in hexadecimal; of equal texts, the key of the one that stays."""
    wanted = sorted(bytes.fromhex(digest) for digest in digests)
    found: dict[str, tuple[int, bytes, bytes]] = {}
    for run in runs if wanted else ():
        index = np.load(run.path.with_suffix(".index.npy"), mmap_mode="r")
        begins, ends = (np.searchsorted(index["digest"], wanted, side) for side in ("left", "right"))
        with open(run.path, "rb") as file:
            for row in (row for begin, end in zip(begins, ends, strict=True) for row in index[begin:end]):
                file.seek(int(row["offset"]))
                candidate = int(row["side"]), file.read(int(row["key_bytes"])), file.read(int(row["text_bytes"]))
                name = whole(row["digest"]).hex()
                found[name] = min(found.get(name, candidate), candidate)  # as `SortBucket` decides
    return {name: (key.decode(), text.decode()) for name, (_, key, text) in found.items()}
