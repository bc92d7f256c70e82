"""The work of a packed batch: that of each of its documents alone, and nothing for padding."""

import pytest
import torch
from architectures import PIECES

from moray.model import ModelConfig
from moray.model.accounting.cost import forward_flops
from moray.model.accounting.work import Work
from moray.model.lora import LoRA

ROWS = [[3, 9], [12], [1, 1, 10], [5]]  # documents of each row of 12 tokens; what is left is padding


@pytest.mark.parametrize("config", [config for config, _ in PIECES.values()], ids=PIECES)
def test_a_batch_asks_for_what_its_documents_ask_for(config: ModelConfig) -> None:
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ROWS]
    documents_BT = torch.stack([torch.nn.functional.pad(row, (0, 12 - len(row)), value=-1) for row in ids])
    alone = sum(3 * sum(forward_flops(config, length).values()) * length for row in ROWS for length in row)
    assert Work.of(config).flops(documents_BT) == pytest.approx(alone, rel=1e-12)


def test_padding_alone_asks_for_nothing() -> None:
    config = PIECES["sliding windows, soft-caps, sandwich norms, Gemma's offset"][0]
    assert Work.of(config).flops(torch.full((2, 5), -1)) == 0


def test_of_frozen_matrices_no_gradient_is_formed() -> None:
    """By hand: 8 experts, of which a token passes 2; no scores, as every document is one token of a batch of one."""
    config = ModelConfig.preset(
        "demo-dense", n_layers=1, d_model=32, vocab_size=64, ffn={"width": 48}, tied_embeddings=False,
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "qk_norm": None},
    ).but(moe={"n_experts": 8, "top_k": 2, "expert_width": 16})  # fmt: skip
    wide = 32 * 8 * (4 + 2 + 2 + 4) + 8 * 32 + 2 * 3 * 32 * 16 + 64 * 32  # attention, router, experts, head
    thin = 8 * ((32 + 32) + 2 * (32 + 16) + (32 + 32)) + 2 * 8 * 3 * (32 + 16)  # of rank 8: attention, experts
    scores = 2 * 2 * 32  # a token sees itself
    found = Work.of(config, LoRA(8, 16.0, ("attention", "experts"))).flops(torch.zeros(1, 1, dtype=torch.int64))
    assert found == 2 * 2 * wide + 3 * 2 * thin + 3 * scores
