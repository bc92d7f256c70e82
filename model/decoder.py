"""The whole model: embedding, layers, final norm, output head."""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moray import UserError
from moray.model.attention.cache import KVCache
from moray.model.attention.documents import Documents
from moray.model.attention.rope import rope_angles
from moray.model.block import Block
from moray.model.config.architecture import ModelConfig
from moray.model.context import Context, Routes
from moray.model.loss import CHUNK_TOKENS, IGNORED, WholeVocabulary, cross_entropy_sum, soft_cap
from moray.model.moe.balance import Statistics, auxiliary_loss
from moray.model.norm import build_norm
from moray.model.randomness import Randomness, gumbel
from moray.model.recompute import Recompute
from moray.model.sharded import Embedding, Linear, local


class Losses(NamedTuple):
    """Sums, so that their scope is the caller's. Their factors (`z_loss`, those of `moe`) are in them.

    cross_entropy, z: over the tokens that have a target; the gradient of their sum flows through cross_entropy, so it
    is z's value alone that is told apart. auxiliary: over the routing groups of `moe.group_size` sequences; 0 but in
    training.
    """

    cross_entropy: Tensor
    z: Tensor
    auxiliary: Tensor


class Decoder(nn.Module):
    """A decoder-only GPT as its config describes it.

    Weights are uninitialised until `model.init.initialise` (or a checkpoint) fills them. `recompute`: what layers keep
    for a backward pass.
    """

    def __init__(self, config: ModelConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model)
        is_learned = config.position.kind == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if is_learned else None
        self.blocks = nn.ModuleList(Block(config, layer, recompute) for layer in range(config.n_layers))
        # After post-norm blocks the stream is normalised already.
        is_post = config.norm.placement == "post"
        self.norm = nn.Identity() if is_post else build_norm(config.d_model, config.norm)
        self.head = Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.vocabulary = WholeVocabulary()
        self.tie()

    def tie(self) -> None:
        """Makes a tied head's weight the embedding's, after whatever has given the two modules new ones."""
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As of any module, which gives each of its own a new tensor; a tied head stays tied."""
        super().to_empty(device=device, recurse=recurse)
        self.tie()
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token, [B, T, V].

        positions_BT: place of each token in its document; by default 0 … T-1, or behind what the cache holds; there,
        padding before a document is not counted.
        documents_BT: document of each token (-1: padding), as ids or as Documents; attention stays within a document.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, documents_BT, cache))

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        cache: KVCache | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """What `logits` reads, [B, T, D]: for callers who need the logits of a few of the tokens only."""
        x_BTD, _ = self._hidden(tokens_BT, positions_BT, documents_BT, cache, None, routes)
        return self.vocabulary.tokens.gather(x_BTD)

    def logits(self, x: Tensor) -> Tensor:
        """Of the next token behind any tokens that `hidden` gives, [..., D] -> [..., V]."""
        logits = F.linear(x, *self._head())
        cap = self.config.final_softcap
        return soft_cap(logits, cap) if cap else logits

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        randomness: Randomness | None = None,
        routes: Routes | None = None,
    ) -> Losses:
        """Summed losses of a batch, without ever holding its logits. Targets of -100 are not counted.

        randomness: what a router that draws (`moe.is_random`) draws from in training.
        """
        x_BTD, statistics = self._hidden(tokens_BT, positions_BT, documents_BT, None, randomness, routes)
        x_ND = self.vocabulary.tokens.gather(x_BTD).flatten(0, 1)
        weight_VD, bias_V = self._head()
        cross_entropy, z = cross_entropy_sum(
            x_ND,
            weight_VD,
            targets_BT.flatten(),
            self.vocabulary,
            bias_V=bias_V,
            softcap=self.config.final_softcap,
            z_loss=self.config.z_loss,
        )
        moe = self.config.moe
        auxiliary = auxiliary_loss(statistics, moe) if moe and statistics else torch.zeros_like(z)
        return Losses(cross_entropy, z, auxiliary)

    def likeliest(self, tokens_BT: Tensor, last_B: Tensor) -> Tensor:
        """The likeliest token behind the one at `last_B` of each row, [B]; what stands behind that changes nothing."""
        x_BTD = self.hidden(tokens_BT)
        x_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
        _, likeliest_B = self._highest(self.logits(x_BD).float())
        return likeliest_B

    def sample(
        self,
        tokens_BT: Tensor,
        cache: KVCache,
        keys_N: Tensor,
        temperature: float,
        documents_BT: Tensor | None = None,
        routes: Routes | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A token drawn from softmax(logits / temperature) behind each row, and its log-probability there, [N] each.

        tokens_BT: those that follow what the cache holds. keys_N: what each is drawn with; where they are a multiple of
        the rows, that many are drawn behind each. The log-probabilities are fp32 at least.
        """
        x_BTD = self.hidden(tokens_BT, documents_BT=documents_BT, cache=cache, routes=routes)
        logits_BV = self.logits(cache.turned(x_BTD)[:, -1])
        accurate_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / temperature
        logits_NV = accurate_BV.repeat_interleave(len(keys_N) // len(accurate_BV), 0)
        noise_NV = gumbel(keys_N, "token", logits_NV.shape[1], self.vocabulary.start)
        _, drawn_N = self._highest(noise_NV.add_(logits_NV))
        highest_N = self.vocabulary.highest(logits_NV.amax(-1))
        return drawn_N, self._log_probability(logits_NV, highest_N, drawn_N)

    def score(
        self, tokens_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of each target, row by row, its log-probability (fp32), and whether it is the likeliest token, [N] each.

        Targets of -100 are none of the N.
        """
        x_BTD, scored_BT = self.hidden(tokens_BT, documents_BT=documents_BT), targets_BT != IGNORED
        x_ND, target_N = x_BTD[scored_BT], targets_BT[scored_BT]
        chunks = zip(x_ND.split(CHUNK_TOKENS), target_N.split(CHUNK_TOKENS), strict=True)
        logp, greedy = zip(*(self._score(*chunk) for chunk in chunks), strict=True)
        return torch.cat(logp), torch.cat(greedy)

    def _score(self, x_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = self.logits(x_ND).float()
        highest_N, likeliest_N = self._highest(logits_NV)
        return self._log_probability(logits_NV, highest_N, target_N), likeliest_N == target_N

    def _log_probability(self, logits_NV: Tensor, highest_N: Tensor, target_N: Tensor) -> Tensor:
        vocabulary = self.vocabulary
        log_N = vocabulary.total((logits_NV - highest_N[:, None]).exp().sum(-1)).log() + highest_N
        # Under a vocabulary shard, the target's logit is on one rank alone.
        index_N = target_N - vocabulary.start
        here_N = (index_N >= 0) & (index_N < logits_NV.shape[1])
        target_logit_N = logits_NV.gather(1, torch.where(here_N, index_N, 0)[:, None])[:, 0]
        return vocabulary.total(torch.where(here_N, target_logit_N, 0.0)) - log_N

    def _highest(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The highest logit over the whole vocabulary, and whose it is; of equal ones the first, as argmax has it."""
        own_N, index_N = logits_NV.max(-1)
        highest_N = self.vocabulary.highest(own_N.clone())
        first_N = torch.where(own_N == highest_N, -(index_N + self.vocabulary.start), -self.config.vocab_size)
        return highest_N, -self.vocabulary.highest(first_N)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """This rank's rows of the head's weight and bias."""
        return local(self.head.weight), None if self.head.bias is None else local(self.head.bias)

    def _hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        documents_BT: Tensor | Documents | None,
        cache: KVCache | None,
        randomness: Randomness | None,
        routes: Routes | None,
    ) -> tuple[Tensor, list[Statistics]]:
        """What the head reads, and every MoE layer's statistics."""
        if isinstance(documents_BT, Tensor):
            documents_BT = Documents.of(documents_BT, tokens_BT.device)
        if cache is not None and documents_BT is not None:
            cache.note_padding(documents_BT.lengths, documents_BT.valid_BT)
        if documents_BT is None:
            documents_BT = Documents(None, torch.ones_like(tokens_BT, dtype=torch.bool))
        if positions_BT is None:
            positions_BT = self._positions(tokens_BT, cache)
        x_BTD = self._embed(tokens_BT, positions_BT)
        config, rope = self.config, None
        if config.position.kind == "rope":
            rope = rope_angles(positions_BT, config.rotary_dim, config.position, x_BTD.dtype)
        context = Context(rope, documents_BT, cache, randomness, routes)
        statistics = []
        for block in self.blocks:
            x_BTD, layer_statistics = block(x_BTD, context)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        if cache is not None:
            cache.length += cache.new(tokens_BT)
        return self.norm(x_BTD), statistics

    def _positions(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        """Places of tokens that follow those in the cache."""
        end, place_BT = tokens_BT.shape[1], torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if cache:
            place_BT = cache.turned(cache.positions(cache.new(tokens_BT)))
        if self.position_embedding is None:
            return place_BT
        if cache:
            end = int(place_BT.max()) + 1  # padding has no place
        if end > self.config.max_seq_len:
            raise UserError(
                f"model.max_seq_len={self.config.max_seq_len} learned positions are too few for {end} tokens"
            )
        return place_BT

    def _embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        x_BTD = self.vocabulary.embed(self.embedding, tokens_BT)
        if self.config.embedding_scale != 1:
            x_BTD = x_BTD * self.config.embedding_scale
        if self.position_embedding is None:
            return x_BTD
        own_Bt = self.vocabulary.tokens.own(positions_BT.expand_as(tokens_BT))
        return x_BTD + self.position_embedding(own_Bt)


__all__ = ["IGNORED", "Decoder", "Losses"]
