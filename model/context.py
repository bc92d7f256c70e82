"""What a forward pass knows beside the hidden state."""

# Shapes: B batch, T tokens, d channels of a head that RoPE turns.

from dataclasses import dataclass

from torch import Tensor

from moray.model.attention.cache import KVCache
from moray.model.attention.documents import Documents
from moray.model.randomness import Randomness


@dataclass(frozen=True)
class Context:
    """Made once a forward pass and shared by all layers.

    rope: cosine and sine of every token's angles, two of [B, T, 1, d], or None without RoPE.
    documents: which tokens see each other. cache: None but in decoding. randomness: None where nothing is drawn.
    """

    rope: tuple[Tensor, Tensor] | None
    documents: Documents
    cache: KVCache | None = None
    randomness: Randomness | None = None
