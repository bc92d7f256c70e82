"""`moray generate`: text from a run's newest commit or a Hugging Face folder, a token at a time, with a KV cache."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moray import UserError
from moray.data.tokenizer import Tokenizer, load_tokenizer
from moray.jobs.models.weights import open_whole
from moray.model import Decoder, KVCache
from moray.model.tensors import tensor_shapes, whole


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises UserError naming the setting that makes no sense."""

    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest whose probabilities reach p (nucleus sampling, Holtzman et al., 2020)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie above 0 and at most at 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be 0 or more, and less than 2**63")


def load_run(folder: Path, on_refused: Callable[[str], None]) -> tuple[Decoder, Tokenizer]:
    """The model of a run's newest whole commit, whatever layout wrote it, or of a Hugging Face folder; its tokenizer.

    Says of each damaged commit that it passes over what is wrong with it. Raises UserError where none is whole.
    """
    weights = open_whole(folder, on_refused)
    with torch.device("meta"):
        decoder = Decoder(weights.config)
    decoder = decoder.to_empty(device="cuda" if torch.cuda.is_available() else "cpu").eval()
    if decoder.config.tied_embeddings:
        decoder.head.weight = decoder.embedding.weight
    state = decoder.state_dict()
    for name, shape in tensor_shapes(weights.config).items():
        state[name].copy_(weights.read(name, whole(shape)))
    return decoder, load_tokenizer(weights.tokenizer)


def generate_tokens(decoder: Decoder, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
    """Token after token. The prompt is computed once; each token after it costs one token's pass.

    Raises UserError, before the first token, when prompt and new tokens exceed the model's longest sequence, or the
    prompt its vocabulary.
    """
    longest = decoder.config.max_seq_len
    if not prompt:
        raise UserError("the prompt is empty; it needs one token at least")
    if max(prompt) >= (entries := decoder.config.vocab_size):
        raise UserError(
            f"the prompt holds token {max(prompt)} and the model's vocab_size={entries}: another model's tokenizer"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if len(prompt) + max_new_tokens > longest:
        raise UserError(f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} exceed max_seq_len={longest}")
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
        # The nucleus is cut from what is left, as in transformers.
        probabilities[sampling.top_k :] = 0
        probabilities /= probabilities.sum()
    # A token stays while those before it fall short of p: the likeliest always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decodes as tokens come, holding back a character whose bytes are not all there yet. Ends with EOS."""
    # Some tokenizers write a token differently after another one: those shown last are decoded along.
    context: list[int] = []
    pending: list[int] = []
    shown = 0
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        pending.append(token)
        text = tokenizer.decode(context + pending)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            context, pending = pending, []
            shown = len(tokenizer.decode(context))
    yield tokenizer.decode(context + pending)[shown:]
