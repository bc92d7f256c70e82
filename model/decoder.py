"""The whole model: embedding, layers, final norm, output head."""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.balance import Statistics, auxiliary_loss
from model.block import Block
from model.cache import KVCache
from model.config import ModelConfig
from model.context import Context, Documents
from model.loss import IGNORED, WholeVocabulary, cross_entropy_sum
from model.norm import RMSNorm
from model.randomness import Randomness
from model.rope import rope_angles


class Losses(NamedTuple):
    """Sums, so that their scope is the caller's. Their factors (`z_loss`, those of `moe`) are in them.

    cross_entropy, z: over the tokens that have a target. auxiliary: over the routing groups of `moe.group_size`
    sequences; 0 but in training.
    """

    cross_entropy: Tensor
    z: Tensor
    auxiliary: Tensor


class Decoder(nn.Module):
    """A decoder-only GPT as its config describes it.

    Weights are uninitialised until `model.init.initialise` (or a checkpoint) fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm.eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.vocabulary = WholeVocabulary()

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token, [B, T, V].

        positions_BT: place of each token in its document; by default 0 … T-1, behind what the cache holds.
        documents_BT: document of each token (-1: padding), as ids or as Documents; attention stays within a document.
        """
        x_BTD, _ = self._hidden(tokens_BT, positions_BT, documents_BT, cache, None)
        return F.linear(self.vocabulary.gather(x_BTD), self.vocabulary.weight(self.head.weight))

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        randomness: Randomness | None = None,
    ) -> Losses:
        """Summed losses of a batch, without ever holding its logits. Targets of -100 are not counted.

        randomness: what a router that draws (`moe.is_random`) draws from in training.
        """
        x_BTD, statistics = self._hidden(tokens_BT, positions_BT, documents_BT, None, randomness)
        x_ND = self.vocabulary.gather(x_BTD).flatten(0, 1)
        weight = self.vocabulary.weight(self.head.weight)
        cross_entropy = cross_entropy_sum(x_ND, weight, targets_BT.flatten(), self.vocabulary)
        zero = torch.zeros_like(cross_entropy)
        moe = self.config.moe
        return Losses(cross_entropy, zero, auxiliary_loss(statistics, moe) if moe and statistics else zero)

    def _hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | Documents | None,
        cache: KVCache | None,
        randomness: Randomness | None,
    ) -> tuple[Tensor, list[Statistics]]:
        """What the head reads, and every MoE layer's statistics."""
        config = self.config
        if positions_BT is None:
            seen = cache.length if cache else 0
            positions_BT = torch.arange(seen, seen + tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.embedding(tokens_BT)
        rope = None
        if config.position.kind == "rope":
            rope = rope_angles(positions_BT, config.rotary_dim, config.position, x_BTD.dtype)
        if documents_BT is None:
            documents_BT = Documents(None, torch.ones_like(tokens_BT, dtype=torch.bool))
        elif isinstance(documents_BT, Tensor):
            documents_BT = Documents.of(documents_BT, tokens_BT.device)
        context = Context(rope, documents_BT, cache, randomness)
        statistics = []
        for block in self.blocks:
            x_BTD, layer_statistics = block(x_BTD, context)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.norm(x_BTD), statistics


__all__ = ["IGNORED", "Decoder", "Losses"]
