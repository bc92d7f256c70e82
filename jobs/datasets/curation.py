"""From a person's recipe to what the stages are told."""

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
from moray.jobs.config.load import flatten
from moray.jobs.datasets.benchmarks import texts_of_tasks
from moray.jobs.datasets.plan import name_of
from moray.jobs.datasets.recipe import QualitySection, Recipe

SCRATCH_VERSION = 2
"""Of the files by which tasks hear of each other."""
MADE_WITH = ("numpy", "tokenizers", "sentencex", "ftfy")


def versions() -> str:
    """What a preparation must be gone on with: characters and words are those of Python's Unicode."""
    found = {f"Unicode {unicodedata.unidata_version}", f"scratch files {SCRATCH_VERSION}"}
    for name in MADE_WITH:
        with suppress(PackageNotFoundError):
            found.add(f"{name} {version(name)}")
    return ", ".join(sorted(found))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe for a plan: with the digests of the files that it names. Raises UserError for one that is no such."""
    settings: dict[str, Any] = dict(flatten(recipe.model_dump(mode="json")))
    if recipe.quality.classifier:
        settings["quality.classifier"] = Classifier.load(Path(recipe.quality.classifier)).fingerprint
    settings["benchmarks.tasks"] = [_digest(Path(path)) for path in recipe.benchmarks.tasks]
    return settings


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"benchmarks.tasks: {path} cannot be read ({error.strerror})") from None


def curation_of(recipe: Recipe, scratch: Path) -> Curation:
    """What is done to each document by itself. Puts what all processes need into `scratch`."""
    benchmarks = None
    if recipe.benchmarks.tasks:
        texts = texts_of_tasks([Path(path) for path in recipe.benchmarks.tasks])
        found = Benchmarks.of(texts)
        if not found.n_texts:
            raise UserError(
                f"benchmarks.tasks: none of {found.n_short:,} items has 8 words, by which it could be found"
            )
        # Named by what it holds: processes keep what they have read of a file.
        benchmarks = scratch / f"benchmarks-{name_of(found.hashes.tobytes())}.npz"
        save_benchmarks(found, benchmarks)
    classifier = None
    if recipe.quality.classifier:
        path = Path(recipe.quality.classifier)
        classifier = scratch / f"classifier-{Classifier.load(path).fingerprint[:16]}.safetensors"
        shutil.copyfile(path, classifier)
    cleaning = Cleaning(**recipe.clean.model_dump())
    clean("text", cleaning)  # which says what is not installed
    return Curation(
        cleaning=cleaning if cleaning != Cleaning(characters=False) else None,
        rules=recipe.rules.rules,
        bands=recipe.duplicates.bands,
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
