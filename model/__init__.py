"""What is computed: a GPT, dense or Mixture-of-Experts, in plain PyTorch on one device."""

from moray.model.attention.cache import KVCache
from moray.model.attention.documents import Documents
from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder, Losses
from moray.model.init import initialise
from moray.model.randomness import Randomness

__all__ = ["Decoder", "Documents", "KVCache", "Losses", "ModelConfig", "Randomness", "initialise"]
