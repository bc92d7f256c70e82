"""`moray prepare`."""

from pathlib import Path

import tyro


def prepare(
    sources: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",),
    *,
    out: Path,
    vocab_size: int = 6400,
    tokenizer: Path | None = None,
    validation: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Turn text into a dataset: tokenizer, shuffled WebDataset shards and their index.

    Args:
        sources: stdlib, folders (.py .md .rst .txt), .txt, .jsonl[.gz|.zst], .parquet or WebDataset .tar files.
        out: The folder to make.
        vocab_size: Entries of the byte-level BPE that is trained.
        tokenizer: A folder with an existing tokenizer to use instead.
        validation: Share of the documents held out for validation, by hash of their key.
        seed: Decides on the documents' order.
        overwrite: Replace a finished dataset in `out`.
    """
    from moray.jobs.datasets.prepare import prepare as run

    run(
        sources,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        validation=validation,
        seed=seed,
        overwrite=overwrite,
    )
    return 0
