"""Questions whose answers are numbers: the model writes its answer, and the number in it is compared."""

from collections.abc import Sequence
from typing import Any

from moray.jobs.evaluation.choices import BETWEEN_ITEMS
from moray.jobs.evaluation.greedy import continue_greedily
from moray.jobs.evaluation.metrics import Metric, proportion
from moray.jobs.evaluation.numbers import are_equal, number_of
from moray.jobs.evaluation.scoring import Model
from moray.jobs.evaluation.sequences import encode
from moray.jobs.evaluation.tasks import Question, Task

NEW_TOKENS = 256
ASKED, ANSWERED = "Question: ", "\nAnswer:"


def answer(model: Model, task: Task) -> list[dict[str, Any]]:
    """For each question: what the model writes, greedily, and the number that it comes to.

    At most 256 tokens, or half of the model's longest sequence; a prompt that leaves no room for them loses its
    beginning. What the model writes ends where it goes on to ask a question itself, as examples teach it to.
    """
    examples = "".join(f"{_asked(each)} {each.answer}{BETWEEN_ITEMS}" for each in task.examples)
    new = min(NEW_TOKENS, model.longest // 2)
    texts = (examples + _asked(item) for item in task.items)
    wholes = list(encode(model, texts, model.tokenizer.prompt_start))
    room = model.longest - new
    written = continue_greedily(model, [prompt[-room:] for prompt in wholes], new)
    return [
        _result(item, model.tokenizer.decode(tokens), cut=len(whole) > room)
        for item, tokens, whole in zip(task.items, written, wholes, strict=True)
    ]


def _asked(item: Question) -> str:
    return f"{ASKED}{item.question}{ANSWERED}"


def _result(item: Question, written: str, *, cut: bool) -> dict[str, Any]:
    own, _, _ = written.partition("\n" + ASKED.rstrip())
    found = number_of(own)
    return {"gold": item.gold, "found": found, "correct": are_equal(item.gold, found), "written": own, "cut": cut}


def answer_metrics(results: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    return {"exact_match": proportion([each["correct"] for each in results])}
