"""Tokens that a spread decoder writes while it is trained: a few short answers, to see what it has learnt.

Each token is a forward pass over all of the sequences, without a cache: tensor parallelism cuts sequences into slices,
and one token has none. `jobs/generation` is fast, on one device.
"""

# Shapes: B prompts, T tokens of the longest with room for what is written.

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from moray.model.decoder import Decoder
from moray.parallel.gradients import forget_counts


@torch.no_grad()
def write_greedily(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    stops: Sequence[int],
    *,
    tp: int = 1,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """For each prompt at most `new` tokens, each the likeliest; a stop token is the last.

    Every rank has the same prompts, and gets the same tokens. Collective.
    """
    device, lengths = next(decoder.parameters()).device, [len(prompt) for prompt in prompts]
    width = -(-(max(lengths) + new) // tp) * tp
    tokens_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
    for number, prompt in enumerate(prompts):
        tokens_BT[number, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    tokens_BT, end_B = tokens_BT.to(device), torch.tensor(lengths, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    decoder.eval()
    for _ in range(new):
        token_B = decoder.likeliest(tokens_BT, end_B - 1)
        if dist.is_initialized():
            dist.broadcast(token_B, 0)  # ranks that went apart here would wait for each other for ever
        for row, token in zip(written, token_B.tolist(), strict=True):
            if not (row and row[-1] in stops):
                row.append(token)
        on_token()
        if all(row[-1] in stops for row in written):
            break
        tokens_BT.scatter_(1, end_B[:, None], token_B[:, None])
        end_B += 1
    forget_counts(decoder)  # what travelled here is no step's
    return written
