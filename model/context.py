"""What a forward pass knows beside the hidden state."""

# Shapes: B batch, T tokens, d channels of a head that RoPE turns, K experts per token, L layers with experts.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moray.model.attention.cache import KVCache
from moray.model.attention.documents import Documents
from moray.model.config.architecture import ModelConfig
from moray.model.randomness import Randomness


class Routes:
    """Which experts tokens pass: what another pass chose on the same tokens, and what this one does.

    recorded: by layer, [B, T, K] (int64), each token's experts; -1: of that token nothing is known. is_replayed: what
    is recorded is chosen again, and counts by this pass's own scores, whose gradient is alive (rollout routing replay:
    Ma et al., 2025). chosen: filled by the pass, by layer, [B, T, K] (int64); of all tokens, under tensor parallelism
    too.
    """

    # No dataclass: FSDP makes new ones of those among a module's inputs, and what a layer fills would be a copy.
    def __init__(self, recorded: Mapping[int, Tensor] | None = None, *, is_replayed: bool = False) -> None:
        self.recorded, self.is_replayed = recorded or {}, is_replayed
        self.chosen: dict[int, Tensor] = {}

    @classmethod
    def of(cls, recorded_BTLK: Tensor, config: ModelConfig, *, is_replayed: bool) -> Self:
        """From those of all layers with experts, in their order, of any integer dtype."""
        layers = [layer for layer in range(config.n_layers) if config.is_moe_layer(layer)]
        return cls(dict(zip(layers, recorded_BTLK.long().unbind(2), strict=True)), is_replayed=is_replayed)

    def of_layers(self) -> Tensor:
        """What the pass has chosen, of all layers with experts in their order, [B, T, L, K]."""
        return torch.stack([self.chosen[layer] for layer in sorted(self.chosen)], dim=2)

    def flips(self) -> tuple[Tensor, Tensor]:
        """How often a token's experts in a layer were not those recorded, in any order, and of how many recorded."""
        counts = []
        for layer, recorded_BTK in self.recorded.items():
            is_known_BT = recorded_BTK[..., 0] >= 0
            now_BTK = self.chosen[layer].sort(-1).values
            is_other_BT = (recorded_BTK.sort(-1).values != now_BTK).any(-1)
            counts.append(torch.stack(((is_other_BT & is_known_BT).sum(), is_known_BT.sum())))
        flipped, known = torch.stack(counts).sum(0)
        return flipped, known


@dataclass(frozen=True)
class Context:
    """Made once a forward pass and shared by all layers.

    rope: cosine and sine of every token's angles, two of [B, T, 1, d], or None without RoPE.
    documents: which tokens see each other. cache: None but in decoding. randomness: None where nothing is drawn.
    routes: None where nobody asks which experts are chosen.
    """

    rope: tuple[Tensor, Tensor] | None
    documents: Documents
    cache: KVCache | None = None
    randomness: Randomness | None = None
    routes: Routes | None = None
