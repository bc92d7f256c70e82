"""Useful tokens a second on dialogues: packed into rows, and each padded to the row's length, as most trainers do.

    python benchmarks/packing.py DATA [--seq-len 512] [--rows 8] [--rounds 8]

DATA is what `moray prepare --kind chat` made. Both sides have the same model, in fp32 on a CPU, and rows of the same
length; dialogues that are longer are left out of both. A token is useful if it is none of padding. Both sides take
turns, step by step; a step is forward, backward and AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import torch

from moray.cluster.host_memory import keep_freed_memory
from moray.data.chat.exchanges import documents
from moray.data.dataset import Dataset
from moray.data.rows import IGNORE
from moray.data.shards import TRAINED
from moray.data.stream import Stream
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer
from moray.model import Decoder, ModelConfig, initialise
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients

CPU = torch.device("cpu")


def packed(data: Dataset, seq_len: int, rows: int) -> Iterator[MicroBatch]:
    stream = Stream(data, "train", seq_len=seq_len, global_batch=rows, seed=0, lanes=range(rows), long_dialogues="drop")
    for batch in stream.batches(0):
        yield MicroBatch.of(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT, CPU)


def padded(data: Dataset, seq_len: int, rows: int) -> Iterator[MicroBatch]:
    """A dialogue a row, in file order, which is a shuffled one."""
    fitting = cycle([each for each in documents(data, "train") if len(each[0]) <= seq_len])
    while True:
        tokens_BT, documents_BT = torch.zeros(rows, seq_len, dtype=torch.int64), torch.full((rows, seq_len), -1)
        targets_BT = torch.full((rows, seq_len), IGNORE)
        for row, (tokens, flags) in enumerate(islice(fitting, rows)):
            n = len(tokens)
            tokens_BT[row, :n], documents_BT[row, :n] = torch.from_numpy(tokens), 0
            following = torch.from_numpy(tokens[1:])
            targets_BT[row, : n - 1] = torch.where(torch.from_numpy(flags[1:] & TRAINED > 0), following, IGNORE)
        positions_BT = torch.arange(seq_len).expand(rows, -1)
        yield MicroBatch.of(tokens_BT, targets_BT, positions_BT, documents_BT, CPU)


def side(batches: Iterator[MicroBatch], config: ModelConfig) -> Callable[[], int]:
    decoder = Decoder(config)
    initialise(decoder, 0)
    optimizer = build_optimizer(decoder, OptimizerSection())

    def step() -> int:
        batch = next(batches)
        accumulate_gradients(decoder, [batch])
        optimizer.step()
        optimizer.zero_grad()
        assert batch.documents.valid_BT is not None
        return int(batch.documents.valid_BT.sum())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    keep_freed_memory()
    data = Dataset.open(options.data)
    config = ModelConfig.preset("minimind-3", n_layers=4, d_model=256, ffn={"width": 704}, vocab_size=data.vocab_size)
    sides = {
        name: side(make(data, options.seq_len, options.rows), config)
        for name, make in (("packed", packed), ("padded", padded))
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    useful: dict[str, list[int]] = {name: [] for name in sides}
    for round in range(options.rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            tokens = step()
            if round:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - began))
                useful[name].append(tokens)
    for name in sides:
        share = statistics.mean(useful[name]) / (options.rows * options.seq_len)
        print(f"{name}: {statistics.median(rates[name]):,.0f} useful tokens/s, {share:.1%} of a row")
    ratio = statistics.median(a / b for a, b in zip(rates["packed"], rates["padded"], strict=True))
    print(f"packed over padded: {ratio:.2f}")


if __name__ == "__main__":
    main()
