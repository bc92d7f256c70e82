"""Who stayed for a near-duplicate: buckets know the digest alone, as that document may lie in any other bucket."""

from collections.abc import Collection, Sequence

import numpy as np

from moray.data.preparation.runs import Run, whole


def keys_of(digests: Collection[str], runs: Sequence[Run]) -> dict[str, str]:
    """The keys of documents in runs, by digests in hexadecimal; of equal texts, the key of the one that is kept.

    Goes once through the runs' indexes. Memory: one of them, and the keys asked for.
    """
    if not digests:
        return {}
    wanted = np.sort(np.array([bytes.fromhex(digest) for digest in digests], "S16"))
    found: dict[str, tuple[int, bytes]] = {}
    for run in runs:
        index = run.index(0, 1)
        at = np.minimum(np.searchsorted(wanted, index["digest"]), len(wanted) - 1)
        rows = index[wanted[at] == index["digest"]]
        with open(run.path, "rb") as file:
            for row in rows:
                file.seek(int(row["offset"]))
                candidate = int(row["side"]), file.read(int(row["key_bytes"]))
                name = whole(row["digest"]).hex()
                found[name] = min(found.get(name, candidate), candidate)  # as `SortBucket` decides
    return {name: key.decode() for name, (_, key) in found.items()}
