"""`moray inspect DATASET`: what a dataset holds, and a few of its documents."""

import json

import numpy as np
from rich.console import Console
from rich.table import Table

from moray import UserError
from moray.data.blocks import CACHE_BYTES
from moray.data.dataset import Dataset
from moray.data.index import Split
from moray.data.order import sequence_counts
from moray.data.preparation.ledger import Ledger
from moray.data.rows import DialogueRows, rows_of
from moray.data.tokenizer import load_tokenizer, tokenizer_in
from moray.jobs.datasets.report import REPORT, lines_of
from moray.jobs.datasets.survey import Sources, Texts, survey_names, survey_texts
from moray.jobs.datasets.visible import named, visible
from moray.jobs.models.units import binary

EXCERPT = 400  # characters
MOST_SOURCES = 30
QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}


def inspect_dataset(folder: str, seq_len: int, samples: int, seed: int, *, as_json: bool, console: Console) -> None:
    """Prints what the dataset in a folder, or at a URL, is made of.

    seed: chooses samples, and what of a large one is measured. Raises UserError for what is no whole dataset.
    """
    if seq_len < 1:
        raise UserError(f"--seq-len {seq_len} must be at least 1")
    if samples < 0:
        raise UserError(f"--samples {samples} must be at least 0")
    dataset = Dataset.open(folder, "source")
    sources = survey_names(dataset, seq_len, seed)
    with tokenizer_in(folder) as place:
        tokenizer = load_tokenizer(place)
    texts = survey_texts(dataset, tokenizer, samples, seed)
    splits = {name: _sizes(split) for name, split in dataset.splits.items()}
    fill, ledger = _fill(dataset, sources, seq_len), _ledger(dataset)
    if as_json:
        identity = {"kind": dataset.kind, "fingerprint": dataset.fingerprint, "vocab_size": dataset.vocab_size}
        measured = {
            "splits": splits,
            "sources": {name: [count, sources.tokens[name]] for name, count in sources.documents.most_common()},
            "lengths": _lengths(sources.lengths),
            "bytes_per_token": _bytes_per_token(texts),
            "fill": fill,
            "measured_on": {"names": sources.blocks, "texts": texts.blocks, "of": sources.of},
            "samples": [dict(zip(("split", "key", "text"), sample, strict=True)) for sample in texts.samples],
            "report": ledger.as_json() if ledger else None,
        }
        console.print_json(json.dumps({"source": folder, **identity, **measured}))
        return
    console.print(folder, style="bold", markup=False, soft_wrap=True)
    console.print(
        f"{dataset.kind}, vocabulary {dataset.vocab_size:,}, fingerprint {dataset.fingerprint}", soft_wrap=True
    )
    console.print(_table_of(splits), _table_of_sources(sources))
    lengths = ", ".join(f"{name} {length:,}" for name, length in _lengths(sources.lengths).items())
    console.print(f"tokens of a document: {lengths}{_of_blocks(sources.blocks, sources.of)}", soft_wrap=True)
    console.print(_table_of_scripts(texts, sources.of))
    for line in fill.values():
        console.print(line, soft_wrap=True)
    if ledger:
        console.print("\nwhat became of the documents that were read", style="bold")
        for line in lines_of(ledger):
            console.print(line, markup=False, soft_wrap=True)
    for split, key, text in texts.samples:
        print(f"\n{split}: {named(key)}")
        for line in visible(text[:EXCERPT] + ("…" if len(text) > EXCERPT else "")).split("\n"):
            print(f"    {line}".rstrip())


def _sizes(split: Split) -> dict[str, int]:
    sizes = {"documents": split.n_documents, "tokens": split.n_tokens}
    return {**sizes, "shards": len(split), "bytes": int(split.shards["size"].sum())}


def _lengths(lengths: np.ndarray) -> dict[str, int]:
    """The shortest length that so many documents do not exceed."""
    if not lengths.size:
        return {}
    found = np.quantile(lengths, [*QUANTILES.values()], method="inverted_cdf").tolist()
    return dict(zip(QUANTILES, found, strict=True))


def _bytes_per_token(texts: Texts) -> dict[str, float]:
    found = {"all": texts.bytes.total() / max(texts.tokens.total(), 1)}
    return found | {script: texts.bytes[script] / count for script, count in texts.tokens.most_common()}


def _fill(dataset: Dataset, sources: Sources, seq_len: int) -> dict[str, str]:
    """How full rows are, in words, by split or as `documents`."""
    if dataset.kind == "chat":
        filled = {}
        for name in dataset.splits:
            rows = rows_of(dataset, name, seq_len, CACHE_BYTES, "cut")
            assert isinstance(rows, DialogueRows)
            filled[name] = f"{name}: {rows.fill}"
        return filled
    if dataset.kind != "text":
        return {}
    found = {}
    for name, split in dataset.splits.items():
        targets = split.n_tokens - len(split)  # but for each shard's first token
        n_rows = int(sequence_counts(split.shards["n_tokens"], seq_len).sum())
        share = targets / max(n_rows * seq_len, 1)
        found[name] = f"{name}: {n_rows:,} rows of {seq_len:,} tokens, {share:.1%} filled"
    inside = sources.n_inside / max(len(sources.lengths), 1)
    measured = _of_blocks(sources.blocks, sources.of)
    found["documents"] = f"{inside:.1%} of the documents lie in one row, the others are cut where a row ends{measured}"
    return found


def _ledger(dataset: Dataset) -> Ledger | None:
    """None: it was prepared before there were ledgers, or without one."""
    content = dataset.file(REPORT)
    if content is None:
        return None
    try:
        return Ledger.of_json(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:
        what = f"{dataset.folder}/{REPORT} is damaged ({error!r})"
        raise UserError(f"{what}; restore it from a copy, or move it away") from None


def _of_blocks(blocks: int, of: int) -> str:
    return f" (of a sample: {blocks:,} of {of:,} blocks)" if blocks < of else ""


def _table_of(splits: dict[str, dict[str, int]]) -> Table:
    table = _table("", "split", "documents", "tokens", "shards", "bytes")
    for name, sizes in splits.items():
        *counts, size = sizes.values()
        table.add_row(name, *(f"{count:,}" for count in counts), binary(size))
    return table


def _table_of_sources(sources: Sources) -> Table:
    title = f"Sources{_of_blocks(sources.blocks, sources.of)}"
    table = _table(title, "keys begin with", "documents", "tokens", "share")
    total = max(sources.tokens.total(), 1)
    by_size = sources.tokens.most_common()
    for name, tokens in by_size[:MOST_SOURCES]:
        name_of = visible(name).replace("[", "\\[")
        table.add_row(name_of, f"{sources.documents[name]:,}", f"{tokens:,}", f"{tokens / total:.1%}")
    if others := by_size[MOST_SOURCES:]:
        tokens = sum(count for _, count in others)
        documents = sum(sources.documents[name] for name, _ in others)
        table.add_row(f"{len(others):,} others", f"{documents:,}", f"{tokens:,}", f"{tokens / total:.1%}")
    return table


def _table_of_scripts(texts: Texts, of: int) -> Table:
    title = f"Bytes a token, by the script of most letters{_of_blocks(texts.blocks, of)}"
    table = _table(title, "script", "bytes a token", "share of tokens")
    total = max(texts.tokens.total(), 1)
    for script, ratio in _bytes_per_token(texts).items():
        share = 1.0 if script == "all" else texts.tokens[script] / total
        table.add_row(script, f"{ratio:.2f}", f"{share:.1%}")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title or None, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    return table
