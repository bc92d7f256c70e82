"""What is computed: a GPT, dense or Mixture-of-Experts, in plain PyTorch on one device."""

from model.cache import KVCache
from model.config import ModelConfig
from model.context import Documents
from model.decoder import Decoder, Losses
from model.init import initialise
from model.randomness import Randomness

__all__ = ["Decoder", "Documents", "KVCache", "Losses", "ModelConfig", "Randomness", "initialise"]
