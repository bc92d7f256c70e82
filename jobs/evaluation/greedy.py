"""The likeliest tokens that follow prompts, several prompts at a time."""

# Shapes: B prompts of a batch, D model width, V vocabulary.

from collections.abc import Sequence

import numpy as np
import torch

from moray.jobs.evaluation.scoring import Model, batches, padded
from moray.model import KVCache


@torch.inference_mode()
def continue_greedily(model: Model, prompts: Sequence[np.ndarray], new: int) -> list[list[int]]:
    """For each prompt at most `new` tokens, each the likeliest one, up to and without a stop token.

    Padding stands before a prompt, where no token sees it: a prompt goes on as it would alone.
    Raises FloatingPointError at logits that are not finite.
    """
    written: list[list[int]] = [[] for _ in prompts]
    for indices in batches([len(prompt) + new for prompt in prompts], model.batch_tokens):
        for index, tokens in zip(indices, _continue_batch(model, [prompts[i] for i in indices], new), strict=True):
            written[index] = tokens
    return written


def _continue_batch(model: Model, prompts: list[np.ndarray], new: int) -> list[list[int]]:
    decoder, stops = model.decoder, {*model.tokenizer.stop_ids}
    weight = decoder.embedding.weight
    tokens_BT, documents_BT = padded(prompts, side="left")
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
