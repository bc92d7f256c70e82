"""`moray generate`: text from a run's newest commit, a token at a time, with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from jobs.run_folder import newest_commit
from model import Decoder, KVCache, ModelConfig
from parallel.checkpoint import read_tensors


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises ValueError naming the setting that makes no sense."""

    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest whose probabilities reach p (nucleus sampling, Holtzman et al., 2020)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and at most at 1")


def load_run(run: Path) -> tuple[Decoder, Tokenizer]:
    """The model of a run's newest commit, whatever layout wrote it, and its tokenizer."""
    commit = newest_commit(run)
    config = commit.manifest.metadata["config"]
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(**config["model"]))
    decoder = decoder.to_empty(device="cuda" if torch.cuda.is_available() else "cpu").eval()
    if decoder.config.tied_embeddings:
        decoder.head.weight = decoder.embedding.weight
    state = decoder.state_dict()
    for name, tensor in read_tensors(commit, [f"model.{name}" for name in state]):
        state[name.removeprefix("model.")].copy_(tensor)
    return decoder, load_tokenizer(run / "tokenizer")


def generate_tokens(decoder: Decoder, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
    """Token after token. The prompt is computed once; each token after it costs one token's pass.

    Raises ValueError, before the first token, when prompt and new tokens exceed the model's longest sequence.
    """
    longest = decoder.config.max_seq_len
    if not prompt:
        raise ValueError("the prompt is empty; it needs one token at least")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if len(prompt) + max_new_tokens > longest:
        raise ValueError(
            f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} exceed max_seq_len={longest}"
        )
    return _generate(decoder, prompt, max_new_tokens, sampling)


@torch.inference_mode()
def _generate(decoder: Decoder, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
    weight = decoder.embedding.weight
    cache = KVCache(decoder.config, 1, len(prompt) + max_new_tokens, weight)
    generator = torch.Generator().manual_seed(sampling.seed)
    new = torch.tensor([prompt], device=weight.device)
    for _ in range(max_new_tokens):
        logits_V = decoder(new, cache=cache)[0, -1].float().cpu()
        token = draw(logits_V, sampling, generator)
        yield token
        new = torch.tensor([[token]], device=weight.device)


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id drawn from the logits."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = torch.softmax(logits_V / sampling.temperature, -1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    # A token stays while those before it fall short of p: the likeliest always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decodes as tokens come, holding back a character whose bytes are not all there yet. Ends with EOS."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]
