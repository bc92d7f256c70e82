"""What is computed: a GPT, dense or Mixture-of-Experts, in plain PyTorch on one device."""

from model.attention import Documents, KVCache
from model.config import ModelConfig
from model.decoder import Decoder, Losses
from model.init import initialise

__all__ = ["Decoder", "Documents", "KVCache", "Losses", "ModelConfig", "initialise"]
