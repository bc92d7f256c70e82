"""Adapters as a folder that peft loads beside a transformers model of the base."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.hf.places import Place, Table, places
from moray.model.lora import LoRA, adapter_shapes, adapters_of
from moray.model.tensors import Read, whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of a module's name within peft's own."""


def write_adapters(
    folder: Path, config: ModelConfig, lora: LoRA, table: Table, read: Read, base: str, dtype: torch.dtype
) -> None:
    """Writes peft's two files. `table` is that of the base's family, `base` where peft finds it by itself.

    Raises UserError for what peft has no words for: matrices of theirs that several of ours are parts of, and experts.
    """
    found, _ = places(config, table)
    shapes, tensors, modules, is_transposed = adapter_shapes(config, lora), {}, [], False
    for name, place in found.items():
        a, b = adapters_of(name)
        if a not in shapes:
            continue
        module = _module(name, place)
        modules.append(module)
        is_transposed |= place.sources[0].transposed
        for ours, theirs in ((a, "lora_A"), (b, "lora_B")):
            tensors[f"{PREFIX}{module}.{theirs}.weight"] = read(ours, whole(shapes[ours])).to(dtype).contiguous()
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,  # in full: names that end alike may be of layers without adapters
        "fan_in_fan_out": is_transposed,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _module(name: str, place: Place) -> str:
    """Their linear map that is all of our matrix and nothing else."""
    source = place.sources[0]
    if place.stacked:
        raise UserError(
            f"--peft: {name} has adapters an expert, for which peft has no module; export the merged weights instead"
        )
    if source.rows is not None:
        raise UserError(
            f"--peft: {name} is a part of {source.name}, and peft adapts whole matrices; export the merged weights "
            "instead"
        )
    return source.name.removesuffix(".weight")
