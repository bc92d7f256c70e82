"""`moray upcycle`: a run or Hugging Face folder without experts becomes the weights of a MoE, a tensor at a time."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from moray.data.staging import staged_folder
from moray.data.tokenizer import copy_tokenizer_files
from moray.jobs.models.weights import open_whole
from moray.model.accounting.cost import count_parameters
from moray.model.surgery.upcycle import Upcycled, Upcycling
from moray.model.tensors import tensor_shapes
from moray.parallel.checkpoint.weights import write_weights


def upcycle(source: Path, options: Upcycling, out: Path, console: Console, on_refused: Callable[[str], None]) -> None:
    """Writes a run folder with one commit, of weights alone, at step 0, and the tokenizer; it appears whole.

    Raises UserError, before anything is written, for a model or options that do not go together, and an `out` in use.
    """
    weights = open_whole(source, on_refused)
    upcycled = Upcycled(weights.config, weights.read, options)
    config = upcycled.config
    metadata = {
        "config": {"model": config.model_dump()},
        "upcycled": {"from": str(source.resolve()), **asdict(options)},
    }
    with staged_folder(out, overwrite=False) as folder:
        (folder / "tokenizer").mkdir()
        copy_tokenizer_files(weights.tokenizer, folder / "tokenizer")
        write_weights(folder / "checkpoints", 0, metadata, tensor_shapes(config), upcycled.read)
    total, active = count_parameters(config)
    console.print(
        f"{out}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active; "
        f"`moray pretrain --model.from {out} …` starts from it",
        soft_wrap=True,
    )
    if options.top_k == options.routed_slices:
        console.print(
            f"top_k={options.top_k} is one copy a token, whose gates sum to one whichever it is: at first the router "
            "learns from the balance loss alone",
            soft_wrap=True,
        )
