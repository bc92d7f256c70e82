"""The whole model: embedding, layers, final norm, output head."""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Documents, KVCache, Positions
from model.block import Block
from model.config import ModelConfig
from model.loss import IGNORED, WholeVocabulary, cross_entropy_sum
from model.norm import RMSNorm
from model.rope import rope_angles


class Losses(NamedTuple):
    """Sums, so that their scope is the caller's: cross-entropy over tokens, balance over sequences and MoE layers."""

    cross_entropy: Tensor
    balance: Tensor


class Decoder(nn.Module):
    """A decoder-only GPT as its config describes it.

    Weights are uninitialised until `model.init.initialise` (or a checkpoint) fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
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
        x_BTD, _ = self._hidden(tokens_BT, positions_BT, documents_BT, cache)
        return F.linear(self.vocabulary.gather(x_BTD), self.vocabulary.weight(self.head.weight))

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
    ) -> Losses:
        """Summed losses of a batch, without ever holding its logits. Targets of -100 are not counted."""
        x_BTD, balance = self._hidden(tokens_BT, positions_BT, documents_BT, None)
        x_ND = self.vocabulary.gather(x_BTD).flatten(0, 1)
        weight = self.vocabulary.weight(self.head.weight)
        return Losses(cross_entropy_sum(x_ND, weight, targets_BT.flatten(), self.vocabulary), balance)

    def _hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | Documents | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if positions_BT is None:
            seen = cache.length if cache else 0
            positions_BT = torch.arange(seen, seen + tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.embedding(tokens_BT)
        cos, sin = rope_angles(positions_BT, config.head_dim, config.rope_theta, x_BTD.dtype)
        if documents_BT is None:
            documents_BT = Documents(None, torch.ones_like(tokens_BT, dtype=torch.bool))
        elif isinstance(documents_BT, Tensor):
            documents_BT = Documents.of(documents_BT, tokens_BT.device)
        positions = Positions(cos, sin, documents_BT.lengths)
        balance = torch.zeros((), device=tokens_BT.device)
        for block in self.blocks:
            x_BTD, layer_balance = block(x_BTD, positions, documents_BT.valid_BT, cache)
            balance = balance + layer_balance
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.norm(x_BTD), balance


__all__ = ["IGNORED", "Decoder", "Losses"]
