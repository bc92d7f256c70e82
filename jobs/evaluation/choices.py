"""Multiple choice: which of several texts the model finds the likeliest after the query."""

from collections.abc import Sequence
from typing import Any

from moray.jobs.evaluation.metrics import Metric, proportion
from moray.jobs.evaluation.scoring import Model, score
from moray.jobs.evaluation.sequences import Continuation, continuations
from moray.jobs.evaluation.tasks import Choice, Task

BETWEEN_ITEMS = "\n\n"


def choose(model: Model, task: Task) -> list[dict[str, Any]]:
    """For each item: every choice's log-likelihood, and the likeliest, in all and per byte; of equals, the first.

    Bytes are those of the choice in UTF-8, without a space before it.
    """
    examples = "".join(
        f"{each.query}{gap(each.query, each.choices[each.gold])}{each.choices[each.gold]}{BETWEEN_ITEMS}"
        for each in task.examples
    )
    texts = [
        Continuation(item.place, examples + item.query, gap(item.query, choice) + choice)
        for item in task.items
        for choice in item.choices
    ]
    sequences = continuations(model, texts)
    scores = iter(zip(score(model, [each for each, _ in sequences]), (cut for _, cut in sequences), strict=True))
    return [_result(item, [next(scores) for _ in item.choices]) for item in task.items]


def _result(item: Choice, scores: list[tuple[Any, bool]]) -> dict[str, Any]:
    found = [each.log_likelihood for each, _ in scores]
    per_byte = [value / len(choice.encode()) for value, choice in zip(found, item.choices, strict=True)]
    return {
        "gold": item.gold,
        "chosen": found.index(max(found)),
        "chosen_per_byte": per_byte.index(max(per_byte)),
        "log_likelihoods": found,
        "cut": any(cut for _, cut in scores),
    }


def gap(before: str, after: str) -> str:
    """A space, unless one of them brings its own."""
    return "" if before[-1:].isspace() or after[:1].isspace() else " "


def choice_metrics(results: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    return {
        name: proportion([each[chosen] == each["gold"] for each in results])
        for name, chosen in (("acc", "chosen"), ("acc_per_byte", "chosen_per_byte"))
    }
