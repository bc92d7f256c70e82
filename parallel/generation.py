"""Tokens that a spread decoder writes while it is trained: a few short answers, to see what it has learnt.

Each token is a forward pass over all of the sequences, without a cache: tensor parallelism cuts sequences into slices,
and one token has none. `jobs/generation` is fast, on one device.
"""

# Shapes: B prompts, T tokens of the longest with room for what is written.

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moray.model.decoder import Decoder
from moray.parallel.gradients import forget_counts, world_sum


@torch.no_grad()
def write_greedily(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    new: int,
    stops: Sequence[int],
    *,
    rows: int = 0,
    width: int = 0,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """For each prompt at most `new` tokens, each the likeliest; a stop token is the last.

    rows, width: of the batch, at least, padding included; the same on all ranks, whose prompts may be others. Those
    that share slices of sequences have the same. Collective.
    """
    device, lengths = next(decoder.parameters()).device, [len(prompt) for prompt in prompts]
    tokens_BT = torch.zeros(max(rows, len(prompts)), max(width, max(lengths) + new), dtype=torch.int64)
    lengths += [1] * (len(tokens_BT) - len(prompts))
    for number, prompt in enumerate(prompts):
        tokens_BT[number, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    tokens_BT, end_B = tokens_BT.to(device), torch.tensor(lengths, device=device)
    written: list[list[int]] = [[] for _ in prompts]
    decoder.eval()
    for _ in range(new):
        token_B = decoder.likeliest(tokens_BT, end_B - 1)
        for row, token in zip(written, token_B.tolist(), strict=False):
            if not (row and row[-1] in stops):
                row.append(token)
        on_token()
        # A rank that left alone would be waited for.
        if not world_sum(torch.tensor(float(any(row[-1] not in stops for row in written)))):
            break
        tokens_BT.scatter_(1, end_B[:, None], token_B[:, None])
        end_B += 1
    forget_counts(decoder)  # what travelled here is no step's
    return written
