"""`moray quality`."""

from pathlib import Path
from typing import Literal

import tyro


def quality(
    action: tyro.conf.Positional[Literal["train"]],
    *,
    good: tuple[str, ...],
    bad: tuple[str, ...],
    out: Path,
    held_out: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
    text_field: str = "text",
) -> int:
    """Train a classifier that tells good documents from bad ones.

    Args:
        action: What is done: train.
        good: Files and folders of documents like those to keep, as `prepare` reads them; some hundreds at least.
        bad: The same, of documents like those to drop.
        out: The file to write (safetensors).
        held_out: Share of the documents, by hash of their text, that are not learnt from and measure the AUC.
        seed: Decides on the order in which documents are learnt from.
        overwrite: Replace a classifier in `out`.
        text_field: The field of JSON and parquet that holds the text; data.text is a field within a field.
    """
    from moray.data.reading.rules import Rules
    from moray.jobs.datasets.quality import train_quality

    assert action == "train"
    print(train_quality(good, bad, out, held_out=held_out, seed=seed, overwrite=overwrite, reading=Rules(text_field)))
    return 0
