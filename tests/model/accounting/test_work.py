"""The work of a packed batch: that of each of its documents alone, and nothing for padding."""

import pytest
import torch
from architectures import PIECES

from moray.model import ModelConfig
from moray.model.accounting.cost import forward_flops
from moray.model.accounting.work import Work

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
