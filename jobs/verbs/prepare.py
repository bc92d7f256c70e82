"""`moray prepare`."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro


def prepare(
    sources: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",),
    *,
    out: str,
    kind: Literal["auto", "text", "chat", "preference", "prompts"] = "auto",
    vocab_size: int = 6400,
    tokenizer: Path | None = None,
    validation: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
    answers: Literal["all", "best", "first"] = "all",
    recipe: str = "none",
    dedup: Literal["auto", "exact", "none"] = "auto",
    workers: int | None = None,
    memory_mb: int | None = None,
    drops: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    scratch: Path | None = None,
    text_field: str = "text",
    max_document_bytes: int = 16 << 20,
    long_documents: Literal["cut", "drop"] = "cut",
    max_bad: int = 100,
    on_damage: Literal["stop", "skip"] = "stop",
    settings: tyro.conf.Suppress[dict[str, str] | None] = None,
) -> int:
    """Turn text into a dataset: tokenizer, shuffled WebDataset shards and their index.

    Args:
        sources: stdlib, or files (.txt .md .rst .py .jsonl .json .tar, with .gz .zst .bz2 .xz; .parquet), folders, and
            fsspec URLs of either (s3://…).
        out: The folder to make, or the fsspec URL.
        kind: What the sources hold: text; chat (dialogues to learn the answers of); preference (pairs of answers, one
            of them preferred); prompts (whose answers can be checked). auto: as the fields of the first record say.
        vocab_size: Entries of the byte-level BPE that is trained.
        tokenizer: A folder with an existing tokenizer to use instead.
        validation: Share of the documents held out for validation, by hash of their key and text; of dialogues, by
            hash of the first thing that a user says, so that all answers to it are on one side.
        seed: Decides on the documents' order.
        overwrite: Replace a finished dataset in `out`.
        answers: Which of several answers to one message become dialogues: all, the best, or the first.
        recipe: What is done to text: web, books, chat, none, or a .toml file with settings. Settings of the command,
            --section.key VALUE, win over it; they stand below.
        dedup: What is kept of equal documents: exact, one of them; none, all. auto: of text one, of other kinds all.
        workers: Processes; as many as there are cores and memory has room for, unless it is said.
        memory_mb: What they may take together, in MB; half of the free memory, unless it is said.
        drops: A .parquet file to list each dropped document in: where it was dropped, why, and which one stayed for it.
        engine: local, processes of this machine; ray, those of all nodes of the Ray of RAY_ADDRESS or, without one, of
            a Ray of this machine (docs/datasets.md says what nodes must share).
        scratch: Where to work when `out` is a URL: a folder on a disk; with --engine ray, on one that all nodes share.
        text_field: The field of JSON and parquet that holds the text; data.text is a field within a field.
        max_document_bytes: A longer document is cut or dropped.
        long_documents: What is done with one: cut (after a paragraph, a line or a word) or drop.
        max_bad: Bad records (not UTF-8, not JSON, without a text) that are left out before it is an error.
        on_damage: Stop at a damaged file, or skip the rest of it.
        settings: Settings by name.
    """
    from moray.data.reading.documents import found_kind
    from moray.data.reading.rules import Rules
    from moray.jobs.datasets.prepare import prepare as run
    from moray.jobs.datasets.recipe import load_recipe

    curation = load_recipe(recipe, settings or {})
    reading = Rules(text_field, max_document_bytes, long_documents, max_bad, on_damage, answers=answers)
    run(
        sources,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        validation=validation,
        seed=seed,
        overwrite=overwrite,
        reading=replace(reading, kind=found_kind(sources, reading) if kind == "auto" else kind),
        dedup=dedup,
        recipe=curation,
        workers=workers,
        memory_mb=memory_mb,
        drops=drops,
        engine=engine,
        scratch=scratch,
    )
    return 0


def show_recipe() -> None:
    """The settings that go with the options."""
    from rich.console import Console

    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.datasets.recipe import Recipe

    show_settings(Recipe, "What is done to text, by --recipe and by settings that win over it:", Console())
