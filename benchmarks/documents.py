"""Useful tokens a second on real documents: moray packs them; others pad or cut each to 340 tokens.

    python benchmarks/documents.py FILE.jsonl [FILE.jsonl …] [--rounds 8]

FILE has a document's text in each line's "text". Both sides have MiniMind-3's shapes, the same tokenizer and the same
documents in an order of their own; the peer is transformers as MiniMind uses it: one document a row, an attention mask,
no loss on padding. A token is useful if it is none of padding. Both sides take turns, step by step.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from training_step import transformers_model

from moray.cluster.host_memory import keep_freed_memory
from moray.data.dataset import Dataset
from moray.data.stream import Stream
from moray.data.tokenizer import load_tokenizer
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.optimizer import build_optimizer
from moray.model import ModelConfig
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder, initialise_shards

ROW, DOCUMENT = 512, 340
VOCABULARY = 6400
CPU = torch.device("cpu")
Step = Callable[[], int]
"""One optimizer step; returns its useful tokens."""


def moray_step(config: ModelConfig, data: Path, rows: int) -> Step:
    meshes = Layout(dp_shard=1).meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float32, compute_dtype=torch.float32)
    initialise_shards(decoder, seed=0)
    optimizer = build_optimizer(decoder, OptimizerSection())
    stream = Stream(Dataset.open(str(data)), "train", seq_len=ROW, global_batch=rows, seed=0, lanes=range(rows))
    batches = stream.batches(0)

    def step() -> int:
        batch = next(batches)
        tensors = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
        accumulate_gradients(decoder, [MicroBatch.of(*tensors, CPU)])
        optimizer.step()
        optimizer.zero_grad()
        return int((batch.documents_BT >= 0).sum())

    return step


def padded_step(config: ModelConfig, documents: Iterator[list[int]], rows: int) -> Step:
    peer = transformers_model(config)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True)

    def step() -> int:
        tokens = torch.zeros(rows, DOCUMENT, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row in range(rows):
            document = next(documents)[:DOCUMENT]
            tokens[row, : len(document)] = torch.tensor(document)
            mask[row, : len(document)] = 1
        peer(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(mask.sum())

    return step


def tokenized(files: list[Path], data: Path) -> Iterator[list[int]]:
    """All documents in a random order, again and again."""
    tokenizer = load_tokenizer(data)
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    order = random.Random(0)
    while True:
        for text in order.sample(texts, len(texts)):
            yield tokenizer.encode(text[: 20 * DOCUMENT])  # more is cut off anyway


def rate(step: Step) -> float:
    began = time.perf_counter()
    return step() / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = ModelConfig.preset("minimind-3", vocab_size=VOCABULARY)
    print("| documents | moray: useful tokens/s | padded to 340 | ratio |")
    print("|---|---|---|---|")
    for files in [[file] for file in options.files] + ([options.files] if len(options.files) > 1 else []):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data")
            prepare(PrepareConfig(sources=tuple(files), out=data, vocab_size=VOCABULARY), Console(quiet=True))
            ours = moray_step(config, data, rows=4)
            theirs = padded_step(config, tokenized(files, data), rows=6)
            rate(ours), rate(theirs)
            pairs = [(rate(ours), rate(theirs)) for _ in range(options.rounds)]
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"| {' + '.join(file.stem for file in files)} | {a:,.0f} | {b:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
