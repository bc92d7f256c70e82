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


def keys_of(digests: Collection[str], runs: Sequence[Run]) -> dict[str, str]:
    """The keys of documents in runs, by digests in hexadecimal; of equal texts, the key of the one that is kept.

    Goes once through the runs' indexes. Memory: one of them, and the keys asked for.
    """
    return {name: key for name, (key, _) in _found(digests, runs, with_text=False).items()}


def documents_of(digests: Collection[str], runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """As `keys_of`: the keys and the texts."""
    return _found(digests, runs, with_text=True)


def _found(digests: Collection[str], runs: Sequence[Run], *, with_text: bool) -> dict[str, tuple[str, str]]:
    if not digests:
        return {}
    wanted = np.sort(np.array([bytes.fromhex(digest) for digest in digests], "S16"))
    found: dict[str, tuple[int, bytes, bytes]] = {}
    for run in runs:
        index = run.index(0, 1)
        at = np.minimum(np.searchsorted(wanted, index["digest"]), len(wanted) - 1)
        rows = index[wanted[at] == index["digest"]]
        with open(run.path, "rb") as file:
            for row in rows:
                file.seek(int(row["offset"]))
                key = file.read(int(row["key_bytes"]))
                text = file.read(int(row["text_bytes"])) if with_text else b""
                candidate = int(row["side"]), key, text
                name = whole(row["digest"]).hex()
                found[name] = min(found.get(name, candidate), candidate)  # as `SortBucket` decides
    return {name: (key.decode(), text.decode()) for name, (_, key, text) in found.items()}
