"""Hugging Face folders in and out: a family is data in `families/`, and each weight's place is stated once."""

from moray.model.hf.pretrained import load_pretrained, read_config, save_pretrained
from moray.model.hf.reader import HFWeights
from moray.model.hf.writer import write_pretrained

__all__ = ["HFWeights", "load_pretrained", "read_config", "save_pretrained", "write_pretrained"]
