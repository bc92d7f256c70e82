"""What cleaning, rules and near-duplicates cost: moray beside datatrove and datasketch, on the same documents.

    pip install datatrove spacy orjson xxhash datasketch scipy
    python benchmarks/preparation.py SOURCE … [--mb 20] [--document-bytes 3000] [--rounds 2] [--into docs/data.md]

Every contender is a process of its own with one thread and gets the same .jsonl file, made of the sources' texts cut to
documents of about that size, a tenth of which are there twice with a few words changed. The figures are the system's:
CPU seconds of the process and its children, and the most memory that one of them held. Peers that are not installed are
left out. What they do is what FineWeb's recipe asks for and moray's `web` does: C4's, Gopher's and FineWeb's rules,
masked addresses, and near-duplicates of 5-word shingles in 14 bands of 8 hashes.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from parity_table import replaced

from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules
from moray.data.reading.texts import cut

SETTINGS = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def corpus(sources: list[str], path: Path, n_bytes: int, document_bytes: int) -> tuple[int, int]:
    """Writes the .jsonl; returns documents and bytes."""
    chance, n, total = random.Random(0), 0, 0
    with open(path, "w") as file:

        def write(text: str) -> None:
            nonlocal n, total
            file.write(json.dumps({"text": text, "id": str(n)}) + "\n")
            n, total = n + 1, total + len(text.encode())

        documents = read_documents(sources, Account(Rules()))
        for piece in (piece for each in documents for piece in cut([each.text.encode()], document_bytes)):
            text = piece.decode()
            write(text)
            if chance.random() < 0.1:
                words = text.split(" ")
                for _ in range(len(words) // 100):
                    words[chance.randrange(len(words))] = "changed"
                write(" ".join(words))
            if total >= n_bytes:
                break
    return n, total


def moray_tasks(path: Path, folder: Path, *, recipe: str, near: bool) -> int:
    """The stages up to the shuffle; returns how many documents stay."""
    import numpy as np

    from moray.data.preparation.bucket import SortBucket
    from moray.data.preparation.near import FindNear
    from moray.data.preparation.read import ReadPart, parts_of
    from moray.data.preparation.runs import RUN_BYTES, runs_in
    from moray.data.preparation.selection import Selection
    from moray.data.preparation.tasks import perform
    from moray.data.reading.sources import find
    from moray.jobs.datasets.config import load_preparation
    from moray.jobs.datasets.curation import curation_of

    chosen = load_preparation(recipe, {"duplicates.paragraphs": "false", "duplicates.near": "0.72" if near else "none"})
    curation = curation_of(chosen, folder)
    (source,) = find([path])
    how = Rules(), curation, 0, RUN_BYTES, False
    pieces = tuple(piece for part in parts_of(source) for piece in part)
    part = perform(ReadPart(folder / "part", pieces, source.label, *how)).folder
    runs, selection = tuple(runs_in(part, 0)), Selection()
    found = (perform(FindNear(folder / "near", runs, selection, 0, 1)).folder,) if near else ()
    done = perform(SortBucket(folder / "bucket", runs, (source.label,), found, selection, False, 0, 1, False))
    return len(np.load(done.folder / "order.npy"))


def moray_recipe(path: Path, folder: Path) -> int:
    return moray_tasks(path, folder, recipe="web", near=True)


def moray_rules(path: Path, folder: Path) -> int:
    return moray_tasks(path, folder, recipe="web", near=False)


def moray_reading(path: Path, folder: Path) -> int:
    return moray_tasks(path, folder, recipe="none", near=False)


def moray_near(path: Path, folder: Path) -> int:
    return moray_tasks(path, folder, recipe="none", near=True)


def moray_tokenizing(path: Path, folder: Path) -> int:
    """A whole preparation without any of it, but without training the tokenizer."""
    from moray.data.tokenizer import load_tokenizer, train_tokenizer

    tokenizer = path.parent / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir()
        texts = (json.loads(line)["text"] for _, line in zip(range(1000), open(path), strict=False))  # noqa: SIM115
        train_tokenizer(texts, tokenizer, 6400)
    backend = load_tokenizer(tokenizer)
    texts = (json.loads(line)["text"] for line in open(path))  # noqa: SIM115
    return sum(1 for _ in backend.encode_documents(texts))


def _datatrove(path: Path, folder: Path, *, rules: bool, near: bool) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    def run(*steps: object) -> None:
        number = len(list((folder / "logs").glob("*"))) if (folder / "logs").exists() else 0
        logs = str(folder / "logs" / str(number))
        LocalPipelineExecutor(pipeline=list(steps), tasks=1, workers=1, logging_dir=logs).run()

    source, name = str(path.parent), path.name
    if rules:
        run(
            JsonlReader(source, glob_pattern=name),
            C4QualityFilter(filter_no_terminal_punct=True),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            FineWebQualityFilter(),
            PIIFormatter(),
            JsonlWriter(str(folder / "kept"), compression=None),
        )
        source, name = str(folder / "kept"), "*.jsonl"
    if near:
        config, part = (
            MinhashConfig(),
            {part: str(folder / part) for part in ("signatures", "buckets", "remove", "out")},
        )
        run(JsonlReader(source, glob_pattern=name), MinhashDedupSignature(part["signatures"], config=config))
        buckets = MinhashDedupBuckets(part["signatures"], part["buckets"], config=config)
        logs = str(folder / "logs" / "buckets")
        LocalPipelineExecutor(pipeline=[buckets], tasks=config.num_buckets, workers=1, logging_dir=logs).run()
        run(MinhashDedupCluster(part["buckets"], part["remove"], config=config))
        out = JsonlWriter(part["out"], compression=None)
        run(JsonlReader(source, glob_pattern=name), MinhashDedupFilter(part["remove"]), out)
        source = part["out"]
    return sum(1 for file in Path(source).glob("*.jsonl") for _ in open(file))


def datatrove_recipe(path: Path, folder: Path) -> int:
    return _datatrove(path, folder, rules=True, near=True)


def datatrove_rules(path: Path, folder: Path) -> int:
    return _datatrove(path, folder, rules=True, near=False)


def datatrove_near(path: Path, folder: Path) -> int:
    return _datatrove(path, folder, rules=False, near=True)


def datasketch_near(path: Path, folder: Path) -> int:
    from datasketch import MinHash, MinHashLSH

    lsh, kept = MinHashLSH(num_perm=112, params=(14, 8)), 0
    for line in open(path):  # noqa: SIM115
        record = json.loads(line)
        words = record["text"].lower().split()
        minhash = MinHash(num_perm=112)
        minhash.update_batch([" ".join(words[n : n + 5]).encode() for n in range(max(len(words) - 4, 1))])
        if not lsh.query(minhash):
            lsh.insert(record["id"], minhash)
            kept += 1
    return kept


CONTENDERS: dict[str, Callable[[Path, Path], int]] = {
    each.__name__: each
    for each in (
        moray_recipe,
        datatrove_recipe,
        moray_rules,
        datatrove_rules,
        moray_reading,
        moray_near,
        datatrove_near,
        datasketch_near,
        moray_tokenizing,
    )
}


def measured(name: str, path: Path) -> tuple[float, float, int] | None:
    """CPU seconds, MiB, and the documents that stay; None where the peer is not installed."""
    package = name.partition("_")[0]
    if package != "moray" and importlib.util.find_spec(package) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", name, "--path", str(path), "--folder", folder]
        done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    return found["cpu_s"], found["mib"], found["kept"]


def one(name: str, path: Path, folder: Path) -> None:
    kept = CONTENDERS[name](path, folder)
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    print(json.dumps({"cpu_s": cpu_s, "mib": max(own.ru_maxrss, children.ru_maxrss) / 1024, "kept": kept}))


def rounds_of(path: Path, n_rounds: int) -> Iterator[tuple[str, float, float, int]]:
    """The best of some rounds, in which contenders take turns."""
    best: dict[str, tuple[float, float, int]] = {}
    for _ in range(n_rounds):
        for name in CONTENDERS:
            if (found := measured(name, path)) is not None:
                best[name] = min(best.get(name, found), found)
    for name, found in best.items():
        yield name, *found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--document-bytes", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.path, options.folder)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "documents.jsonl"
        n, n_bytes = corpus(options.sources or ["stdlib"], path, int(options.mb * 1e6), options.document_bytes)
        print(f"{n:,} documents, {n_bytes / 1e6:.1f} MB")
        found, table = {}, ["| | CPU s | MB a CPU s | MiB | documents kept |", "|---|---|---|---|---|"]
        for name, cpu_s, mib, kept in rounds_of(path, options.rounds):
            found[name] = cpu_s
            what = name.replace("_", ", ")
            table.append(f"| {what} | {cpu_s:.1f} | {n_bytes / 1e6 / cpu_s:.2f} | {mib:.0f} | {kept:,} |")
        print("\n".join(table))
        for what in ("recipe", "rules", "near"):
            for peer in ("datatrove", "datasketch"):
                if {f"{peer}_{what}", f"moray_{what}"} <= found.keys():
                    print(f"{what}: moray is {found[f'{peer}_{what}'] / found[f'moray_{what}']:.1f} times {peer}")
        near = found["moray_near"] - found["moray_reading"]
        print(f"near-duplicates add {near / found['moray_tokenizing']:.1%} to the time of tokenizing")
        if options.into:
            options.into.write_text(replaced(options.into.read_text(), "preparation table", "\n".join(table)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
