"""Batches a CPU second: moray's stream beside MosaicML Streaming and webdataset, on the same tokens.

    pip install webdataset mosaicml-streaming
    python benchmarks/loader.py DATA [--seq-len 1024] [--batch 64] [--seconds 5] [--rounds 3]

DATA is what `moray prepare` made of a text. The peers get the same sequences as samples of int64 tokens, in their own
shards, and make batches of int64 tokens and targets of them in one process, shuffled; moray's hold positions and
documents as well, and a copy of these four tensors is what memory allows. Contenders take turns; the figures are of
this process's CPU time, with the files in the page cache and malloc as moray's workers set it. A peer that is not
installed is left out.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from moray.cluster.host_memory import keep_freed_memory
from moray.data.dataset import Dataset
from moray.data.stream import Stream, evaluation_batches

Batches = Iterator[tuple[torch.Tensor, ...]]  # int64 [B, T]: tokens and targets first


def sequences(data: Dataset, seq_len: int) -> Iterator[np.ndarray]:
    """All sequences of the training split with the token behind each, int64 [T + 1]."""
    for batch in evaluation_batches(data, "train", seq_len=seq_len, global_batch=64, lanes=range(64)):
        for tokens, targets, documents in zip(batch.tokens_BT, batch.targets_BT, batch.documents_BT, strict=True):
            if documents[-1] >= 0:
                yield torch.cat([tokens, targets[-1:].clamp(min=0)]).numpy()


def moray(data: Dataset, seq_len: int, size: int) -> Batches:
    stream = Stream(data, "train", seq_len=seq_len, global_batch=size, seed=0, lanes=range(size))
    for number in itertools.count():
        batch = stream.batch(number)
        yield batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT


def copied(batches: Batches) -> Batches:
    """One of the batches, again and again."""
    whole = torch.stack(next(batches))
    while True:
        yield whole.clone().unbind()


def mosaic(folder: Path, samples: Iterator[np.ndarray], seq_len: int, size: int) -> Batches:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:int64:{seq_len + 1}"}) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=size)
    while True:
        yield from batched((sample["tokens"] for sample in dataset), size)


def web(folder: Path, samples: Iterator[np.ndarray], size: int) -> Batches:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=4096, verbose=0) as writer:
        for number, sample in enumerate(samples):
            content = io.BytesIO()
            np.save(content, sample)
            writer.write({"__key__": f"{number:08d}", "npy": content.getvalue()})
    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("npy")
    while True:
        yield from batched((sample[0] for sample in dataset), size)


def batched(samples: Iterator[np.ndarray], size: int) -> Batches:
    while len(group := list(itertools.islice(samples, size))) == size:
        both = torch.from_numpy(np.stack(group))
        yield both[:, :-1], both[:, 1:]


def speed(batches: Batches, seconds: float) -> float:
    """Tokens a CPU second."""
    next(batches)
    n, began = 0, time.process_time()
    while (taken := time.process_time() - began) < seconds:
        batch = next(batches)
        assert {tensor.dtype for tensor in batch} == {torch.int64}
        n += batch[0].numel()
    return n / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    data, length, size = Dataset.open(options.data), options.seq_len, options.batch
    with tempfile.TemporaryDirectory() as name:
        folders = {peer: Path(name, peer) for peer in ("mosaic", "web")}
        for folder in folders.values():
            folder.mkdir()
        makers: dict[str, Callable[[], Batches]] = {
            "moray": lambda: moray(data, length, size),
            "a copy of its four tensors": lambda: copied(moray(data, length, size)),
            "MosaicML Streaming": lambda: mosaic(folders["mosaic"], sequences(data, length), length, size),
            "webdataset": lambda: web(folders["web"], sequences(data, length), size),
        }
        contenders: dict[str, Batches] = {}
        for name, make in makers.items():
            batches = make()
            try:
                next(batches)
            except ImportError as error:
                print(f"{name} is left out: {error}")
            else:
                contenders[name] = batches
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, batches in contenders.items():
                found[name].append(speed(batches, options.seconds))
    print("| | million tokens a CPU second | moray's is |\n|---|---|---|")
    own = statistics.median(found["moray"])
    for name, speeds in found.items():
        least, middle, most = (each(speeds) / 1e6 for each in (min, statistics.median, max))
        print(f"| {name} | {middle:.1f} ({least:.1f} to {most:.1f}) | {own / middle / 1e6:.1f} times |")


if __name__ == "__main__":
    main()
