"""What a worker has in memory while it trains a model under a layout: a column for each way to spend less of it."""

from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from rich.table import Table

from moray.model import ModelConfig
from moray.model.recompute import Recompute
from moray.parallel.layout import Layout
from moray.parallel.memory import RankMemory, rank_memory
from moray.parallel.reduction import Stage

Ways = dict[tuple[Stage, Recompute], RankMemory]


@dataclass(frozen=True)
class TrainingPlan:
    """How it is trained: a resolved layout, sequences of a forward pass on a worker, dtype of the products."""

    layout: Layout
    micro_batch: int
    dtype: str

    def memory(self, config: ModelConfig, seq_len: int) -> Ways:
        """By ZeRO's stage and by what is computed again; stage 3 alone where no worker has a peer to share with."""
        stages: tuple[Stage, ...] = get_args(Stage) if self.layout.world_size > 1 else (3,)
        ways: list[tuple[Stage, Recompute]] = list(product(stages, get_args(Recompute)))
        return {
            (stage, recompute): rank_memory(
                config,
                self.layout,
                seq_len=seq_len,
                micro_batch=self.micro_batch,
                dtype=getattr(torch, self.dtype),
                stage=stage,
                recompute=recompute,
            )
            for stage, recompute in ways
        }

    def to_json(self, memory: Ways) -> dict[str, Any]:
        found = [
            {"zero_stage": stage, "recompute": recompute, **held._asdict(), "total": held.total}
            for (stage, recompute), held in memory.items()
        ]
        return {"layout": str(self.layout), "micro_batch": self.micro_batch, "dtype": self.dtype, "bytes": found}

    def table(self, memory: Ways) -> Table:
        title = f"Memory of a worker, GiB: {self.layout}, micro-batches of {self.micro_batch} in {self.dtype}"
        table = Table("train.zero_stage\ntrain.recompute", title=title, title_justify="left")
        for stage, recompute in memory:
            table.add_column(f"{stage}\n{recompute}", justify="right")
        for name in RankMemory._fields:
            table.add_row(name, *(f"{getattr(held, name) / 2**30:,.3f}" for held in memory.values()))
        table.add_section()
        table.add_row("together", *(f"{held.total / 2**30:,.3f}" for held in memory.values()))
        return table
