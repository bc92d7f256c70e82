"""`moray evaluate`."""

import json
from pathlib import Path

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
) -> int:
    """Say how good a model is at choosing, at foretelling text and at answering.

    Args:
        model: A run (its newest commit), a commit or a Hugging Face folder.
        tasks: JSON lines, with .gz .zst .bz2 .xz too: {query, choices, gold}, {text} or {question, answer}.
        last_word: Of texts, score the prediction of the last word.
        shots: The first items of each file, which become examples in the prompts, and are not scored.
        limit: The most items of each file that are scored.
        batch_tokens: The most tokens of a forward pass, with padding.
        out: A JSON file to write.
        items: Write what was found of every item, too.
    """
    from moray.jobs.evaluation.evaluate import Asked, table
    from moray.jobs.evaluation.evaluate import evaluate as run

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"out={out} must be a file in a folder that exists")
    if items and out is None:
        raise UserError("items=true needs a file that they are written to: --out FILE")
    report = run(model, Asked(tasks, last_word, shots, limit, batch_tokens, items), complain)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0
