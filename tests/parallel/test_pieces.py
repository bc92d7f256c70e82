"""Law 1 for every piece of an architecture that parallelism touches, each on the layouts that split it."""

from typing import Any

import pytest
import torch
from architectures import PIECES
from law1 import check, spread, truth
from pool import Pool

from moray.parallel.layout import Layout

CASES = [
    pytest.param(name, layout, id=f"{name}, {layout}") for name, (_, layouts) in PIECES.items() for layout in layouts
]
TRUTHS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout_computes_what_one_process_computes(pool: Pool, name: str, layout: Layout) -> None:
    config = PIECES[name][0]
    if name not in TRUTHS:
        TRUTHS[name] = truth(config, torch.float64)
    found = pool.run(spread, layout.world_size, config, layout, torch.float64)[0]
    check(found, TRUTHS[name], torch.float64)
