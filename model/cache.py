"""What decoding remembers of the tokens it has seen, so that each new one costs one token's pass."""

# Shapes: B batch, T tokens, G key and value heads, d channels of a head.

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far, for every layer, in memory taken once.

    Shapes: keys and values are [layers, B, G, capacity, d]; the last inputs of each layer's convolution (MixFFN) are
    [B, taps - 1, F].
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        """`like` is any weight of the model: the cache has its dtype and device."""
        attention = config.attention
        self.keys = like.new_empty(config.n_layers, batch, attention.n_kv_heads, capacity, attention.head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.inputs: dict[int, Tensor] = {}

    def extend(self, layer: int, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new tokens behind the `length` known ones; returns all of that layer's keys and values."""
        end = self.length + k_BGTd.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens; {end} were to be stored")
        self.keys[layer, :, :, self.length : end] = k_BGTd
        self.values[layer, :, :, self.length : end] = v_BGTd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def convolution(self, layer: int, x_BTF: Tensor, taps: int) -> Tensor:
        """A layer's new inputs behind the taps - 1 before them (at the start, zeros); remembers the last taps - 1.

        Shapes: [B, T, F] -> [B, taps - 1 + T, F].
        """
        held = self.inputs.get(layer)
        if held is None:
            held = x_BTF.new_zeros(x_BTF.shape[0], taps - 1, x_BTF.shape[2])
        reach_BSF = torch.cat((held, x_BTF), dim=1)
        self.inputs[layer] = reach_BSF[:, x_BTF.shape[1] :].clone()  # a view would keep a whole prompt's inputs
        return reach_BSF
