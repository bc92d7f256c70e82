"""Answers of a step: written and judged by each rank for its own prompts, and then known to all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moray.data.prompts import Prompt
from moray.data.tokenizer import Tokenizer
from moray.jobs.alignment.judge import Judge
from moray.jobs.alignment.rewards import Sample
from moray.parallel.control_plane import ControlPlane, meet
from moray.parallel.rollout import Answer


@dataclass(frozen=True)
class Written:
    """number: of the sample in the whole run: its prompt's times the size of a group, and its place in that. values: by
    reward, but for those of reward models.
    """

    number: int
    prompt: np.ndarray
    answer: Answer
    sample: Sample
    values: dict[str, float]


def judged(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Answer]],
    judge: Judge,
    tokenizer: Tokenizer,
    on_value: Callable[[], None],
) -> list[Written]:
    """A rank's own answers to its prompts. Raises UserError as `Judge.score` does."""
    found = []
    for prompt, group in zip(prompts, groups, strict=True):
        samples = [sample_of(prompt, answer, tokenizer) for answer in group]
        values = judge.score(samples, on_value)
        for place, (answer, sample) in enumerate(zip(group, samples, strict=True)):
            own = {name: float(of_all[place]) for name, of_all in values.items()}
            found.append(Written(prompt.position * len(group) + place, prompt.tokens, answer, sample, own))
    return found


def sample_of(prompt: Prompt, answer: Answer, tokenizer: Tokenizer) -> Sample:
    tokens = answer.tokens.tolist()
    text = tokenizer.decode(tokens[:-1] if answer.has_ended else tokens)
    asked = tokenizer.decode(prompt.tokens.tolist())
    return Sample(prompt.key, asked, text, prompt.reference, answer.has_ended, tuple(tokens))


def of_all_ranks(ranks: ControlPlane, make: Callable[[], list[Written]], on_wait: Callable[[], None]) -> list[Written]:
    """What every rank makes, in the order of numbers, on all of them; what peers have alike is there once. Collective.

    Raises on all ranks what is raised on any. on_wait: called meanwhile, once a second: another's rewards may be slow.
    """
    own: list[Written] | Exception
    try:
        own = make()
    except Exception as error:
        own = error
    meet(on_wait, ranks.group)
    found: dict[int, Written] = {}
    for of_rank in ranks.gather(own):
        if isinstance(of_rank, Exception):
            raise of_rank
        found |= {written.number: written for written in of_rank}
    return [found[number] for number in sorted(found)]
