"""`moray evaluate`: a model, task files, and how good the one is at the others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray import UserError
from moray.data.chat.templates import chat_template_of
from moray.data.chat.turns import ChatTemplate
from moray.data.curation.contamination import FEWEST_WORDS, MOST_WORDS
from moray.jobs.evaluation.choices import choice_metrics, choose
from moray.jobs.evaluation.metrics import Metric
from moray.jobs.evaluation.overlap import overlap
from moray.jobs.evaluation.preferences import prefer, preference_metrics
from moray.jobs.evaluation.questions import answer, answer_metrics
from moray.jobs.evaluation.scoring import Model
from moray.jobs.evaluation.tasks import Choice, Item, Pair, Question, Task, Text, read_task
from moray.jobs.evaluation.texts import foretell, text_metrics, weigh, word_metrics
from moray.jobs.generation.generate import load
from moray.jobs.models.weights import Weights, open_whole
from moray.parallel.checkpoint.commits import read_commit

Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of task: its name, what it finds of each item, and what that makes together."""

    name: str
    results: Callable[[Model, Task], Results]
    metrics: Callable[[Results], dict[str, Metric]]


LAST_WORD = Kind("last word", foretell, word_metrics)
KINDS: dict[type[Item], Kind] = {
    Choice: Kind("multiple choice", choose, choice_metrics),
    Pair: Kind("preference", prefer, preference_metrics),
    Question: Kind("question", answer, answer_metrics),
    Text: Kind("text", weigh, text_metrics),
}


@dataclass(frozen=True)
class Asked:
    """What is evaluated, as a person may set it. Raises UserError for what cannot be."""

    tasks: tuple[Path, ...]
    last_word: bool = False
    shots: int = 0
    limit: int | None = None
    batch_tokens: int = 8192
    items: bool = False
    overlap: Path | None = None

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise UserError(f"shots={self.shots} must be 0 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} must be at least 1")
        if self.batch_tokens < 1:
            raise UserError(f"batch_tokens={self.batch_tokens} must be at least 1, and is best some thousands")


def evaluate(source: Path, asked: Asked, on_refused: Callable[[str], None]) -> dict[str, Any]:
    """What `--out` holds: the model, and for each task file its digest, its metrics and, if asked for, its items.

    Says of each damaged commit that it passes over what is wrong with it. Raises UserError for what cannot be read.
    """
    weights = open_whole(source, on_refused)
    decoder, tokenizer = load(weights)
    model = Model(decoder, tokenizer, asked.batch_tokens, template=template_of(weights.tokenizer))
    return report_of(model, weights, asked)


def template_of(folder: Path) -> ChatTemplate | None:
    """The chat template of a tokenizer's folder; None where it has none and ChatML does not suit it either."""
    try:
        return chat_template_of(folder)
    except UserError:
        return None


def report_of(model: Model, weights: Weights, asked: Asked) -> dict[str, Any]:
    """The same of a model that is loaded, on every rank that shares it."""
    commit = read_commit(weights.path).manifest.digest if weights.is_commit else None
    found = [_evaluated(model, task, kind, asked) for task, kind in list(read_tasks(asked))]
    report = {"model": {"folder": str(weights.path.resolve()), "commit": commit}, "tasks": found}
    return with_overlap(report, asked)


def with_overlap(report: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The report, with what its tasks share with a dataset, if that is asked."""
    if not asked.overlap:
        return report
    shared = overlap([task for task, _ in read_tasks(asked)], asked.overlap)
    tasks = [each | {"overlap": of_task} for each, of_task in zip(report["tasks"], shared, strict=True)]
    return report | {"tasks": tasks}


def evaluate_tasks(model: Model, asked: Asked) -> Iterator[dict[str, Metric]]:
    """The metrics of each task file."""
    return (kind.metrics(kind.results(model, task)) for task, kind in list(read_tasks(asked)))


def read_tasks(asked: Asked) -> Iterator[tuple[Task, Kind]]:
    """The task files, each with its kind. Raises UserError for one that is none."""
    tasks = [read_task(path, asked.shots, asked.limit) for path in asked.tasks]
    if asked.last_word and not any(task.kind is Text for task in tasks):
        raise UserError("last_word=true is for files of texts, and none of the tasks is one")
    for task in tasks:
        kind = LAST_WORD if asked.last_word and task.kind is Text else KINDS[task.kind]
        if asked.shots and kind is KINDS[Text]:
            raise UserError(f"shots={asked.shots} must be 0 for {task.path}: a text's bits are its own")
        if asked.shots and kind is KINDS[Pair]:
            raise UserError(f"shots={asked.shots} must be 0 for {task.path}: a dialogue needs no examples")
        yield task, kind


def _evaluated(model: Model, task: Task, kind: Kind, asked: Asked) -> dict[str, Any]:
    results = kind.results(model, task)
    found = {
        "file": str(task.path),
        "sha256": task.sha256,
        "kind": kind.name,
        "n": len(results),
        "shots": len(task.examples),
        "cut": sum(each["cut"] for each in results),
        "metrics": {name: metric._asdict() for name, metric in kind.metrics(results).items()},
    }
    if asked.items:
        # By line: several items may have the same id.
        named = [{"line": item.line} | ({} if item.identity is None else {"id": item.identity}) for item in task.items]
        found["items"] = [name | result for name, result in zip(named, results, strict=True)]
    return found


def table(report: dict[str, Any]) -> str:
    """A line for each metric, with its standard error."""
    rows = [("task", "kind", "n", "metric", "value", "standard error")]
    for task in report["tasks"]:
        for name, metric in task["metrics"].items():
            error = metric["standard_error"]
            numbers = (_shown(metric["value"]), "" if error is None else _shown(error))
            rows.append((Path(task["file"]).name, task["kind"], str(task["n"]), name, *numbers))
    cuts = [f"{Path(task['file']).name}: {_cut(task)}" for task in report["tasks"] if task["cut"]]
    shared = [f"{Path(task['file']).name}: {_shared(task['overlap'])}" for task in report["tasks"] if "overlap" in task]
    return "\n".join([*_aligned(rows), *cuts, *shared])


def _shared(found: dict[str, Any]) -> str:
    words = f"a run of {FEWEST_WORDS} to {MOST_WORDS} words"
    return f"{found['overlapping']} of {found['judged']} items that are long enough share {words} with the data"


def _cut(task: dict[str, Any]) -> str:
    how = (
        "longer than the model, and cut into windows"
        if task["kind"] == "text"
        else "with a context cut at its beginning"
    )
    return f"{task['cut']} of {task['n']} items {how}"


def _shown(value: float) -> str:
    return f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
