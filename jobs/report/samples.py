"""How a run's newest commit continues the beginnings of documents that it was not trained on."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from moray import UserError
from moray.data.chat.exchanges import documents, exchanges
from moray.data.dataset import Dataset
from moray.data.sources import Sources, in_turn
from moray.data.tokenizer import Tokenizer
from moray.jobs.generation.generate import Sampling, generate_tokens, load_run, stream_text
from moray.model import Decoder
from moray.parallel.checkpoint.commits import list_commits

PROMPT_TOKENS, NEW_TOKENS = 32, 96
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


class Sample(NamedTuple):
    """What the model was given, what it wrote, and what the document itself goes on with."""

    prompt: str
    written: str
    truth: str


def draw_samples(run: Path, data: Mapping[str, str], count: int) -> tuple[list[Sample], list[str]]:
    """So many, always the same, from each source in turn; and what there is to say of them: why there are none, or of a
    commit passed over.
    """
    told: list[str] = []
    if not count:
        return [], ["left out, as --samples is 0"]
    try:
        sources = Sources.open(data)
        for commit in list_commits(run / "checkpoints")[-1:]:
            sources.check_fingerprint(commit.manifest.metadata["data"]["fingerprint"])
        decoder, tokenizer = load_run(run, told.append)
        each = (_beginnings(dataset, decoder.config.max_seq_len) for dataset in sources.datasets.values())
        beginnings = islice(in_turn(each), count)
        samples = [_continue(decoder, tokenizer, *beginning) for beginning in beginnings]
        return samples, told if samples else [*told, "the validation split holds no document"]
    except (UserError, OSError, ValueError, KeyError, RuntimeError, FloatingPointError, MemoryError) as error:
        # A page about a run that cannot be loaded here (no memory, no data) is what one wants all the more.
        return [], [*told, str(error) or type(error).__name__]


def _continue(decoder: Decoder, tokenizer: Tokenizer, prompt: list[int], truth: list[int]) -> Sample:
    tokens = generate_tokens(decoder, prompt, min(NEW_TOKENS, decoder.config.max_seq_len - len(prompt)), SAMPLING)
    start = list(tokenizer.document_start)
    shown = prompt[len(start) :] if prompt[: len(start)] == start else prompt
    written = "".join(stream_text(tokenizer, tokens, shown))
    return Sample(tokenizer.decode(shown), written, tokenizer.decode(truth))


def _beginnings(dataset: Dataset, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """What documents of the validation split begin with, or what is asked in them, and how they go on."""
    if dataset.kind == "chat":
        for prompt, answer in exchanges(dataset, "validation", longest - NEW_TOKENS):
            yield prompt.tolist(), answer[:NEW_TOKENS].tolist()
        return
    for tokens, _ in documents(dataset, "validation"):
        document = tokens[: PROMPT_TOKENS + NEW_TOKENS].tolist()
        at = max(min(PROMPT_TOKENS, len(document) // 2, longest // 2), 1)
        yield document[:at], document[at:]
