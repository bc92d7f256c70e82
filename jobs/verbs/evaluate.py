"""`moray evaluate`."""

import json
from pathlib import Path
from typing import Literal

import tyro

from moray import UserError
from moray.jobs.verbs.say import complain


def evaluate(
    model: tyro.conf.Positional[Path],
    *,
    tasks: tuple[Path, ...],
    last_word: bool = False,
    shots: int = 0,
    limit: int | None = None,
    batch_tokens: int = 8192,
    out: Path | None = None,
    items: bool = False,
    overlap: Path | None = None,
    workers: int = 1,
    launcher: Literal["ray", "torchrun", "slurm"] = "ray",
    tp: int = 1,
    ep: int = 1,
) -> int:
    """Say how good a model is at choosing, at foretelling text and at answering.

    Args:
        model: A run (its newest commit), a commit or a Hugging Face folder.
        tasks: JSON lines, with .gz .zst .bz2 .xz too: {query, choices, gold}, {text}, {question, answer}
            or pairs of answers, chosen and rejected.
        last_word: Of texts, score the prediction of the last word.
        shots: The first items of each file, which become examples in the prompts, and are not scored.
        limit: The most items of each file that are scored.
        batch_tokens: The most tokens of a forward pass, with padding.
        out: A JSON file to write.
        items: Write what was found of every item, too.
        overlap: A dataset: say how many items share runs of words with it, as a model that was trained on it has read.
        workers: Processes that share the model, as in training; 1: this one alone.
        launcher: Who starts them, where they are several: as cluster.launcher.
        tp: How many of them share each matrix product, as layout.tp.
        ep: How many of them share each layer's experts, as layout.ep.
    """
    from moray.jobs.evaluation.evaluate import Asked, table
    from moray.jobs.evaluation.evaluate import evaluate as run
    from moray.jobs.evaluation.spread import Spread, evaluate_spread
    from moray.parallel.layout import Layout

    if not tasks:
        raise UserError("tasks names no file; give JSON lines, for example --tasks arc.jsonl.gz")
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"out={out} must be a file in a folder that exists")
    if items and out is None:
        raise UserError("items=true needs a file that they are written to: --out FILE")
    asked = Asked(tasks, last_word, shots, limit, batch_tokens, items, overlap)
    if workers > 1 or tp > 1 or ep > 1:
        report = evaluate_spread(model, asked, Spread(workers, launcher, Layout(tp=tp, ep=ep)), complain)
        if report is None:  # the first rank tells
            return 0
    else:
        report = run(model, asked, complain)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0
