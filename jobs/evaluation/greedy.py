"""The likeliest tokens that follow prompts, several prompts at a time."""

# Shapes: B prompts of a batch, D model width, V vocabulary.

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moray.jobs.evaluation.ranks import Pass
from moray.jobs.evaluation.scoring import Model
from moray.model import KVCache
from moray.parallel.generation import write_greedily


@torch.no_grad()
def continue_greedily(model: Model, prompts: Sequence[np.ndarray], new: int) -> list[list[int]]:
    """For each prompt at most `new` tokens, each the likeliest one, up to and without a stop token.

    Padding stands where no token sees it: a prompt goes on as it would alone. A spread decoder computes all of a
    sequence for each token (`parallel.generation`).
    Raises FloatingPointError at logits that are not finite, unless the decoder is spread.
    """
    compute = _write_together if model.ranks.are_several else _continue_batch
    lengths = [len(prompt) + new for prompt in prompts]
    return model.ranks.share(lengths, model.batch_tokens, lambda part: compute(model, prompts, new, part))


def _write_together(model: Model, prompts: Sequence[np.ndarray], new: int, part: Pass) -> list[list[int]]:
    stops, mine = model.tokenizer.stop_ids, [prompts[index] for index in part.indices]
    found = write_greedily(
        model.decoder, mine, new, stops, rows=part.rows, width=part.width, on_token=model.ranks.on_pass
    )
    return [tokens[:-1] if tokens[-1] in stops else tokens for tokens in found]


def _continue_batch(model: Model, all_prompts: Sequence[np.ndarray], new: int, part: Pass) -> list[list[int]]:
    prompts = [all_prompts[index] for index in part.indices]
    decoder, stops = model.decoder, {*model.tokenizer.stop_ids}
    weight = decoder.embedding.weight
    tokens_BT, documents_BT = _padded(prompts)
    cache = KVCache(decoder.config, len(prompts), tokens_BT.shape[1] + new, weight)
    x_BTD = decoder.hidden(tokens_BT.to(weight.device), documents_BT=documents_BT, cache=cache)
    written: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for n in range(1, new + 1):
        logits_BV = decoder.logits(x_BTD[:, -1])
        if not (highest := logits_BV.amax()).isfinite():
            raise FloatingPointError(f"logits reach {highest}: the model's weights are damaged, or training diverged")
        token_B = logits_BV.argmax(-1)
        for row, token in enumerate(token_B.tolist()):
            if row in going and token in stops:
                going.remove(row)
            elif row in going:
                written[row].append(token)
        if not going or n == new:
            break
        x_BTD = decoder.hidden(token_B[:, None], cache=cache)
    return written


def _padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Tokens and documents (-1: padding) of prompts that end together, [B, T] each."""
    width = max(map(len, prompts))
    tokens_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
    documents_BT = torch.full((len(prompts), width), -1)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        documents_BT[row, width - len(prompt) :] = 0
    return tokens_BT, documents_BT
