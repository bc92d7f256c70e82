"""A script that says how many bytes a model's forward pass leaves allocated: python allocated.py MODEL RECOMPUTE."""

import ctypes
import gc
import sys
from typing import Any

import torch

from moray.model import Decoder, ModelConfig
from moray.model.init import initialise
from moray.model.moe.layer import Router

WIDE: dict[str, Any] = {"n_layers": 6, "d_model": 256, "max_seq_len": 512, "vocab_size": 256}
LARGE = {
    "dense": ModelConfig.preset("demo-dense", **WIDE, ffn={"width": 1024}),
    "moe": ModelConfig.preset("demo-moe", **WIDE, moe={"n_experts": 8, "top_k": 4, "expert_width": 256}),
}
BATCH, TOKENS = 4, 512


class Allocations(ctypes.Structure):
    """mallinfo2 of glibc: `uordblks` bytes in use in its heaps, `hblkhd` in mappings of their own."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def allocated() -> int:
    """Bytes, of all that this process has allocated and not freed."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Allocations
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def left_by_a_pass(model: str, how: Any) -> int:
    """But for what the loss keeps of the head's gradient, which it forms at once, in fp32."""
    decoder = Decoder(LARGE[model], how).bfloat16()
    for module in decoder.modules():
        if isinstance(module, Router):
            module.float()
    initialise(decoder, seed=1)
    tokens = torch.randint(256, (BATCH, TOKENS))
    decoder.loss(tokens, tokens).cross_entropy.backward()  # what is allocated only once is so now
    decoder.zero_grad()
    before = allocated()
    losses = decoder.loss(tokens, tokens)
    found = allocated() - before
    losses.cross_entropy.backward()
    return found - 4 * decoder.head.weight.numel()


if __name__ == "__main__":
    print(left_by_a_pass(*sys.argv[1:]))
