"""From a person's settings to what the stages are told."""

import hashlib
import shutil
import unicodedata
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from moray import UserError
from moray.data.curation.classifier import Classifier, bin_of, probability_of
from moray.data.curation.cleaning import Cleaning, clean
from moray.data.curation.contamination import Benchmarks
from moray.data.preparation.curate import Curation, save_benchmarks
from moray.data.preparation.selection import SCORES, Selection, by_pareto, cut_for
from moray.data.tokenizer import tokenizer_digest
from moray.jobs.config.load import flatten
from moray.jobs.datasets.benchmarks import texts_of_tasks
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.plan import name_of
from moray.jobs.datasets.recipe import QualitySection

SCRATCH_VERSION = 2
"""Of the files by which tasks hear of each other."""
MADE_WITH = ("numpy", "tokenizers", "sentencex", "ftfy")
VERSION = 1
"""Of what is done to documents: what another one has begun is not gone on with."""
WHERE_AND_HOW = {"sources", "out", "overwrite", "scratch", "drops", "engine", "workers", "memory_mb"}
NOT_OF_THE_DATASET = WHERE_AND_HOW | {"max_bad", "on_damage"}


def versions() -> str:
    """What a preparation must be gone on with: characters and words are those of Python's Unicode."""
    found = {f"Unicode {unicodedata.unidata_version}", f"scratch files {SCRATCH_VERSION}"}
    for name in MADE_WITH:
        with suppress(PackageNotFoundError):
            found.add(f"{name} {version(name)}")
    return ", ".join(sorted(found))


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """All that decides about the dataset beside its sources, flat; of files and folders the digests.

    Raises UserError for a file that is no such.
    """
    said = dict(flatten(config.model_dump(mode="json", exclude=NOT_OF_THE_DATASET)))
    if config.tokenizer is not None:
        said |= {"vocab_size": None, "tokenizer": tokenizer_digest(config.tokenizer)}
    if config.quality.classifier:
        said["quality.classifier"] = Classifier.load(Path(config.quality.classifier)).fingerprint
    said["benchmarks.tasks"] = [_digest(Path(path)) for path in config.benchmarks.tasks]
    return {"version": VERSION, **said}


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"benchmarks.tasks: {path} cannot be read ({error.strerror})") from None


def curation_of(config: PrepareConfig, scratch: Path) -> Curation:
    """What is done to each document by itself. Puts what all processes need into `scratch`."""
    benchmarks = None
    if config.benchmarks.tasks:
        texts = texts_of_tasks([Path(path) for path in config.benchmarks.tasks])
        found = Benchmarks.of(texts)
        if not found.n_texts:
            raise UserError(
                f"benchmarks.tasks: none of {found.n_short:,} items has 8 words, by which it could be found"
            )
        # Named by what it holds: processes keep what they have read of a file.
        benchmarks = scratch / f"benchmarks-{name_of(found.hashes.tobytes())}.npz"
        save_benchmarks(found, benchmarks)
    classifier = None
    if config.quality.classifier:
        path = Path(config.quality.classifier)
        classifier = scratch / f"classifier-{Classifier.load(path).fingerprint[:16]}.safetensors"
        shutil.copyfile(path, classifier)
    cleaning = Cleaning(**config.clean.model_dump())
    clean("text", cleaning)  # which says what is not installed
    return Curation(
        cleaning=cleaning if cleaning != Cleaning(characters=False) else None,
        rules=config.rules.rules,
        bands=config.duplicates.bands,
        classifier=classifier,
        benchmarks=benchmarks,
    )


def selection_of(quality: QualitySection, scores: np.ndarray) -> Selection:
    """Which scores stay, of documents counted by score, int64 [65,536]."""
    if quality.sample:
        return Selection(chances=by_pareto(np.array([probability_of(score) for score in range(SCORES)])))
    if quality.keep is not None:
        return Selection(cut=cut_for(scores, quality.keep))
    return Selection(cut=0 if quality.cut is None else bin_of(quality.cut))
