"""A model of moray's as EleutherAI's lm-eval asks it: their tasks, their metrics, our forward passes.

The only file that imports `lm_eval`, which nothing else needs: pip install lm_eval.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from moray import UserError
from moray.jobs.evaluation.greedy import continue_greedily
from moray.jobs.evaluation.questions import NEW_TOKENS
from moray.jobs.evaluation.scoring import Model, Scored, score
from moray.jobs.evaluation.sequences import Continuation, continuations, encode, windows
from moray.jobs.generation.generate import load_run


class MorayLM(LM):  # type: ignore[misc,unused-ignore]
    """A run, a commit or a Hugging Face folder, for `lm_eval.simple_evaluate(model=MorayLM("runs/first"), tasks=…)`.

    Raises UserError for what cannot be opened.
    """

    def __init__(self, folder: str | Path, batch_tokens: int = 8192) -> None:
        super().__init__()
        decoder, tokenizer = load_run(Path(folder), lambda message: print(message, file=sys.stderr))
        self.model = Model(decoder, tokenizer, batch_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether it is the greedy one."""
        texts = [Continuation(f"request {n}", *request.args) for n, request in enumerate(requests)]
        scores = score(self.model, [sequence for sequence, _ in continuations(self.model, texts)])
        return [(each.log_likelihood, each.is_greedy) for each in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): the log-likelihood of all its tokens; the last window has full context, as they ask for.

        A text begins with one BOS; lm-eval's own HFLM gives two where the tokenizer brings one by itself.
        """
        texts = (request.args[0] for request in requests)
        parts = [self._rolling(tokens) for tokens in encode(self.model, texts, self.model.tokenizer.document_start)]
        scores = iter(score(self.model, [part for each in parts for part in each]))
        return [sum(next(scores).log_likelihood for _ in each) for each in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the greedy text, up to the first of `until`, or `max_gen_toks` tokens (256).

        Raises UserError for settings that ask for draws.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for n, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError(f"request {n} asks for draws ({settings}); MorayLM writes the likeliest tokens alone")
            by_length[settings.get("max_gen_toks", NEW_TOKENS)].append(n)
        written = [""] * len(requests)
        for new, numbers in by_length.items():
            if new >= self.model.longest:
                raise UserError(f"max_gen_toks={new} must be less than the model's max_seq_len={self.model.longest}")
            texts = (requests[n].args[0] for n in numbers)
            prompts = list(encode(self.model, texts, self.model.tokenizer.prompt_start))
            found = continue_greedily(self.model, [each[new - self.model.longest :] for each in prompts], new)
            for n, tokens in zip(numbers, found, strict=True):
                written[n] = _until(self.model.tokenizer.decode(tokens), requests[n].args[1].get("until") or [])
        return written

    def _rolling(self, tokens: np.ndarray) -> list[Scored]:
        if len(tokens) < 2:
            return []
        *parts, last = windows(self.model, tokens)
        return [*parts, Scored(tokens[-self.model.longest - 1 :], last.n_scored)]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """What stands before the first of the stops."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
