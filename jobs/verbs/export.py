"""`moray export`."""

from pathlib import Path
from typing import Literal

import tyro

from moray.jobs.verbs.say import complain


def export(
    run: tyro.conf.Positional[Path],
    *,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    peft: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Write a run's newest commit as a folder that transformers loads and serves.

    Args:
        run: The run's folder.
        out: The folder to make.
        dtype: What the weights are rounded to.
        peft: Write a LoRA run's adapters alone, as peft loads them, in place of whole weights.
    """
    import torch

    from moray.jobs.models.export import export as run_export
    from moray.jobs.models.export import export_adapters

    if peft:
        base = export_adapters(run, out, getattr(torch, dtype), complain)
        print(f"{out}: adapters that peft.PeftModel.from_pretrained(model, '{out}') adds to a model of {base}")
        return 0
    model_type = run_export(run, out, getattr(torch, dtype), complain)
    print(f"{out}: a Hugging Face folder of model_type {model_type}")
    return 0
