"""`moray generate`: text from a run's newest commit or a Hugging Face folder, a token at a time, with a KV cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moray import UserError
from moray.data.tokenizer import Tokenizer, load_tokenizer
from moray.jobs.models.weights import Weights, open_whole
from moray.model import Decoder, KVCache
from moray.model.tensors import tensor_shapes, whole

USUAL_NEW_TOKENS = 200


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

    A run's tokenizer starts a prompt as it did the documents that the model was trained on, whatever its own default.
    Says of each damaged commit that it passes over what is wrong with it. Raises UserError where none is whole.
    """
    return load(open_whole(folder, on_refused))


def load(weights: Weights) -> tuple[Decoder, Tokenizer]:
    """A model in one process, in fp32, on a GPU if there is one; its tokenizer."""
    with torch.device("meta"):
        decoder = Decoder(weights.config)
    decoder = decoder.to_empty(device="cuda" if torch.cuda.is_available() else "cpu").eval()
    state = decoder.state_dict()
    for name, shape in tensor_shapes(weights.config).items():
        state[name].copy_(weights.read(name, whole(shape)))
    return decoder, tokenizer_for(weights)


def tokenizer_for(weights: Weights) -> Tokenizer:
    """That of a model, which starts a prompt as documents were in training, where that was here."""
    tokenizer = load_tokenizer(weights.tokenizer)
    return replace(tokenizer, prompt_start=tokenizer.document_start) if weights.is_commit else tokenizer


def prompt_start(tokenizer: Tokenizer, bos: Literal["auto", "yes", "no"]) -> tuple[int, ...]:
    """The ids before a prompt's own. Raises UserError for a BOS that the tokenizer does not have."""
    if bos == "auto":
        return tokenizer.prompt_start
    if bos == "no":
        return ()
    if tokenizer.bos_id is None:
        raise UserError("bos=yes, and the tokenizer has no BOS token; leave it out, or name a bos_token")
    return (tokenizer.bos_id,)


def generate_tokens(
    decoder: Decoder, prompt: list[int], max_new_tokens: int | None, sampling: Sampling
) -> Iterator[int]:
    """Token after token. The prompt is computed once; each token after it costs one token's pass.

    max_new_tokens: None takes USUAL_NEW_TOKENS, or as many as the model has room for.
    Raises UserError, before the first token, when prompt and new tokens exceed the model's longest sequence, or the
    prompt its vocabulary; and FloatingPointError at a token whose logits are not finite.
    """
    longest = decoder.config.max_seq_len
    if not prompt:
        raise UserError("the prompt is empty; it needs one token at least")
    if len(prompt) >= longest:
        raise UserError(f"{len(prompt)} prompt tokens leave no room for others: max_seq_len={longest}")
    if max_new_tokens is None:
        max_new_tokens = min(USUAL_NEW_TOKENS, longest - len(prompt))
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
    """One token id drawn from the logits. Raises FloatingPointError where the likeliest is not a number."""
    if not (highest := logits_V.amax()).isfinite():  # a NaN anywhere makes the maximum one
        raise FloatingPointError(f"the model's logits reach {highest}: its weights are damaged, or training diverged")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # In fp64 and with the highest at 0, no temperature is too small to divide by.
    scaled_V = (logits_V - highest).double() / sampling.temperature
    probabilities, ids = torch.softmax(scaled_V, -1).sort(descending=True, stable=True)
    if sampling.top_k:
        # The nucleus is cut from what is left, as in transformers.
        probabilities[sampling.top_k :] = 0
        probabilities /= probabilities.sum()
    # A token stays while those before it fall short of p: the likeliest always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decodes as tokens come, holding back a character whose bytes are not all there yet. Ends at a stop token.

    prompt: the ids of the text that they continue, without what was put before it.
    """
    # Many tokenizers write a token differently at the beginning of a text: those before it are decoded along.
    context, pending = list(prompt), list[int]()
    for token in tokens:
        if token in tokenizer.stop_ids:
            break
        pending.append(token)
        text = _continuation(tokenizer, context, pending)
        if not text.endswith("\ufffd"):
            yield text
            context, pending = pending, []
    yield _continuation(tokenizer, context, pending)


def _continuation(tokenizer: Tokenizer, context: list[int], new: list[int]) -> str:
    before, text = tokenizer.decode(context), tokenizer.decode(context + new)
    # Half a character after whole ones can undo them in a decoder that takes bytes together: they have been shown.
    return text[len(before) :] if text.startswith(before) else tokenizer.decode(new)
