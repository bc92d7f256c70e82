"""Whether a model may have read a task: runs of words that its items share with a prepared dataset.

Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C: runs of 13 words, or of all words of an
item that has 8 to 12; below that, chance is as good an explanation.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moray.data.blocks import FIRST, BlockReader
from moray.data.curation.contamination import FEWEST_WORDS, MOST_WORDS
from moray.data.dataset import Dataset
from moray.data.tokenizer import load_tokenizer
from moray.jobs.evaluation.tasks import Choice, Item, Pair, Question, Task, Text

_WORD = re.compile(r"\w+")
Run = tuple[str, ...]


def overlap(tasks: Sequence[Task], folder: Path) -> list[dict[str, Any]]:
    """For each task: the items that can be judged, those that share a run of words with the training split, and which.

    Reads all of that split. Memory: the tasks' runs of words, and a document. Raises UserError for what is no dataset.
    """
    runs: dict[int, dict[Run, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
    judged = [0] * len(tasks)
    for number, task in enumerate(tasks):
        for index, item in enumerate(task.items):
            words = _words(text_of(item))
            judged[number] += len(words) >= FEWEST_WORDS
            length = min(MOST_WORDS, len(words))
            for run in _runs(words, length) if length >= FEWEST_WORDS else ():
                runs[length][run].add((number, index))
    found: set[tuple[int, int]] = set()
    for text in _texts(Dataset.open(folder), folder):
        words = _words(text)
        for length, known in runs.items():
            for run in _runs(words, length):
                found |= known.get(run, set())
    return [
        {
            "judged": judged[number],
            "overlapping": sum(task_number == number for task_number, _ in found),
            "lines": sorted(task.items[index].line for task_number, index in found if task_number == number),
        }
        for number, task in enumerate(tasks)
    ]


def text_of(item: Item) -> str:
    """What of an item would give it away: what is asked, and the right answer."""
    if isinstance(item, Choice):
        return f"{item.query} {item.choices[item.gold]}"
    if isinstance(item, Question):
        return item.question
    if isinstance(item, Pair):
        return " ".join(turn.text for turn in (*item.turns, item.chosen))
    assert isinstance(item, Text)
    return item.text


def _texts(dataset: Dataset, folder: Path) -> Iterator[str]:
    tokenizer, reader = load_tokenizer(folder), BlockReader(dataset, "train", cache_bytes=0)
    for number, shard in enumerate(dataset.splits["train"]):
        for start, stop in pairwise(shard.starts.tolist()):  # blocks hold whole documents
            tokens, flags = reader.read(number, start, stop)
            edges = [*(flags & FIRST).nonzero()[0].tolist(), len(tokens)]
            for first, end in pairwise(edges):
                yield tokenizer.decode(tokens[first:end].tolist())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[Run]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))
