"""A whole decoder from a Hugging Face folder, and back."""

from pathlib import Path

import torch
from torch import Tensor

from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.hf.families import config_json, family_of
from moray.model.hf.reader import HFWeights
from moray.model.hf.writer import write_pretrained
from moray.model.moe.router import Router
from moray.model.tensors import Box, tensor_shapes


def read_config(folder: Path | str) -> ModelConfig:
    """The architecture that a Hugging Face folder describes.

    Raises UserError naming a model_type that is unknown, and every field of config.json that would be ignored.
    """
    return family_of(folder).read(config_json(folder))


@torch.no_grad()
def load_pretrained(folder: Path | str, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a Hugging Face folder, on the CPU and in eval mode; routers stay in fp32 at least.

    Raises UserError for a config.json that moray cannot compute and for weights that do not fit it.
    """
    config = read_config(folder)
    weights = HFWeights(folder, config)
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
        for module in decoder.modules():
            if isinstance(module, Router):
                module.to(torch.promote_types(dtype, torch.float32))
    decoder.to_empty(device="cpu")
    for buffer in decoder.buffers():
        buffer.zero_()
    tensors = decoder.state_dict()
    for name in tensor_shapes(config):
        tensors[name].copy_(weights.read(name))
    return decoder.eval()


@torch.no_grad()
def save_pretrained(decoder: Decoder, folder: Path | str) -> None:
    """Writes config.json and weights, in the dtype of the embedding, of a decoder that lives whole on one device.

    The family is the first that computes the same. Raises UserError saying what no family can express.
    """
    tensors = decoder.state_dict()

    def read(name: str, box: Box) -> Tensor:
        return tensors[name][box].cpu()

    write_pretrained(folder, decoder.config, read, decoder.embedding.weight.dtype)
