"""The whole model: embedding, layers, final norm, output head."""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from collections.abc import Callable
from typing import NamedTuple, Self, TypeVar

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
from moray.model.logprobs import log_softmax_at, token_logprobs
from moray.model.loss import CHUNK_TOKENS, IGNORED, Head, WholeVocabulary, cross_entropy_sum, soft_cap
from moray.model.moe.balance import Statistics, auxiliary_loss
from moray.model.norm import build_norm
from moray.model.randomness import Randomness, gumbel
from moray.model.recompute import Recompute
from moray.model.sharded import Embedding, Linear, local

R = TypeVar("R")


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
        has_bias = config.head_bias and config.head == "vocabulary"
        self.head = Linear(config.d_model, config.head_width, bias=has_bias)
        self.vocabulary = WholeVocabulary()
        self.tie()

    def tie(self) -> None:
        """Makes a tied head's weight the embedding's, after whatever has given the two modules new ones."""
        if self.config.has_tied_head:
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

        def cross_entropy(x_ND: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            weight_VD, bias_V, softcap, z_loss, vocabulary = head
            return cross_entropy_sum(
                x_ND, weight_VD, targets_BT.flatten(), vocabulary, bias_V=bias_V, softcap=softcap, z_loss=z_loss
            )

        # The class's own: FSDP registers the instance's, and this is within one already.
        inputs = (tokens_BT, positions_BT, documents_BT, randomness, routes)
        sums, auxiliary = Decoder.with_head(self, cross_entropy, *inputs)
        return Losses(*sums, auxiliary)

    def with_head(
        self,
        use: Callable[[Tensor, Head], R],
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        randomness: Randomness | None = None,
        routes: Routes | None = None,
    ) -> tuple[R, Tensor]:
        """What `use` makes of all that the head reads, [B * T, D], and of this rank's rows of the head, for losses of
        their own; and the auxiliary loss, as in `Losses`.
        """
        x_BTD, statistics = self._hidden(tokens_BT, positions_BT, documents_BT, None, randomness, routes)
        config, moe = self.config, self.config.moe
        head = Head(*self._head(), config.final_softcap, config.z_loss, self.vocabulary)
        used = use(self.vocabulary.tokens.gather(x_BTD).flatten(0, 1), head)
        if moe and statistics:
            return used, auxiliary_loss(statistics, moe)
        return used, x_BTD.new_zeros((), dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def logprobs(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
        temperature: float = 1.0,
        routes: Routes | None = None,
    ) -> Tensor:
        """log softmax(logits / temperature)[target] of each token, [B, T], at least fp32, with a gradient; 0 where the
        target is -100. Balance losses are no part of it.
        """

        def logprobs(x_ND: Tensor, head: Head) -> Tensor:
            scored_N = targets_BT.flatten() != IGNORED
            logp_S = token_logprobs(x_ND[scored_N], targets_BT.flatten()[scored_N], head, temperature)
            return logp_S.new_zeros(len(x_ND)).masked_scatter(scored_N, logp_S)

        logp_N, _ = Decoder.with_head(self, logprobs, tokens_BT, positions_BT, documents_BT, None, routes)
        return logp_N.view_as(targets_BT)

    def values(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | Documents | None = None,
    ) -> Tensor:
        """What a scalar head makes of each token and those before it, [B, T], in fp32 at least, with its gradient.

        Raises UserError of a decoder with a vocabulary's head.
        """
        if self.config.head != "scalar":
            raise UserError(f"model.head={self.config.head} gives logits and no values; it must be scalar")
        x_BTD, _ = self._hidden(tokens_BT, positions_BT, documents_BT, None, None, None)
        accurate = torch.promote_types(x_BTD.dtype, torch.float32)
        # Each rank scores its own tokens: the products of all would be there as often as there are ranks.
        own_BT = F.linear(x_BTD.to(accurate), local(self.head.weight).to(accurate))[..., 0]
        return self.vocabulary.tokens.gather_alike(own_BT)

    def likeliest(self, tokens_BT: Tensor, last_B: Tensor) -> Tensor:
        """The likeliest token behind the one at `last_B` of each row, [B]; what stands behind that changes nothing."""
        x_BTD = self.hidden(tokens_BT)
        x_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
        _, likeliest_B = self.vocabulary.likeliest(self.logits(x_BD).float())
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
        _, drawn_N = self.vocabulary.likeliest(noise_NV.add_(logits_NV))
        logp_N, _ = log_softmax_at(logits_NV, drawn_N, self.vocabulary.highest(logits_NV.amax(-1)), self.vocabulary)
        return drawn_N, logp_N

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
        highest_N, likeliest_N = self.vocabulary.likeliest(logits_NV)
        logp_N, _ = log_softmax_at(logits_NV, target_N, highest_N, self.vocabulary)
        return logp_N, likeliest_N == target_N

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """This rank's rows of the vocabulary head's weight and bias. Raises UserError where there is another one."""
        if self.config.head != "vocabulary":
            raise UserError(f"model.head={self.config.head}: this model scores texts, and neither writes nor predicts")
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
