"""Cross-entropy without the logits: chunks of tokens, whose gradient is formed in the same pass."""

# Shapes: N tokens, C tokens of one chunk, D model width, V vocabulary entries on this rank.

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moray.model.sharded import WholeTokens

IGNORED = -100
"""The target of a token that has nothing to predict."""
CHUNK_TOKENS = 1024


class WholeVocabulary:
    """All vocabulary entries are on this rank. `parallel.tensor.VocabularyShard` is the other case."""

    start = 0
    tokens = WholeTokens()

    def embed(self, embedding: nn.Embedding, tokens_BT: Tensor) -> Tensor:
        """The hidden states of this rank's tokens."""
        x_BTD: Tensor = embedding(tokens_BT)
        return x_BTD

    def total(self, x: Tensor) -> Tensor:
        """The sum over the vocabulary's ranks."""
        return x

    def highest(self, x: Tensor) -> Tensor:
        """The maximum over the vocabulary's ranks."""
        return x

    def likeliest(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The highest logit over the whole vocabulary, and whose it is; of equal ones the first, as argmax has it."""
        own_N, index_N = logits_NV.max(-1)
        highest_N = self.highest(own_N)
        none = torch.iinfo(torch.int64).min
        return highest_N, -self.highest(torch.where(own_N == highest_N, -(index_N + self.start), none))


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Keeps values within (-cap, cap), and small ones as they are: cap * tanh(x / cap) (Gemma 2, section 2)."""
    return cap * torch.tanh(x / cap)


def cross_entropy_sum(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    vocabulary: WholeVocabulary,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens whose target is not IGNORED of -log softmax(logits)[target], and of the z-loss.

    logits = x w^T + bias, through `soft_cap`; the z-loss is z_loss * logsumexp(logits)^2 (PaLM, section 5). Two
    scalars, at least fp32. The first carries the gradient of both, the second none: one pass forms one gradient.

    No [N, V] tensor exists: each chunk's logits are turned into its part of the gradients and forgotten, so memory is
    CHUNK_TOKENS * V. The weight's gradient is collected in fp32 at least; one that is frozen has none.
    """
    head = Head(w_VD, bias_V, softcap, z_loss, vocabulary)

    def chunk(x_CD: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], Tensor]:
        logits_CV, slope_CV = logits_of(x_CD, head, torch.promote_types(x_CD.dtype, torch.float32))
        loss, z, grad_CV = cross_entropy_chunk(logits_CV, targets_N[rows], head)
        return (loss, z), grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)

    loss, z = chunked_sums(x_ND, head, chunk)
    return loss, z


class Head(NamedTuple):
    """What turns hidden states into logits and their losses."""

    w_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    z_loss: float
    vocabulary: WholeVocabulary


Chunk = Callable[[Tensor, slice], tuple[tuple[Tensor, ...], Tensor]]
"""Of a chunk's hidden states [C, D], and which of the N tokens they are: sums over them, scalars, and the gradient of
the first with respect to x w^T, [C, V] (0 for ignored tokens)."""


def chunked_sums(x_ND: Tensor, head: Head, chunk: Chunk) -> tuple[Tensor, ...]:
    """What `chunk` finds in CHUNK_TOKENS tokens at a time, added up. The first sum has a gradient, the others none."""
    sums: tuple[Tensor, ...] = _Chunked.apply(x_ND, head.w_VD, head.bias_V, chunk, torch.is_grad_enabled())
    return sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None, chunk: Chunk, training: bool
    ) -> tuple[Tensor, ...]:
        accurate = torch.promote_types(x_ND.dtype, torch.float32)
        grad_x_ND = torch.empty_like(x_ND) if training else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=accurate) if training and w_VD.requires_grad else None
        grad_bias_V = None
        if training and bias_V is not None and bias_V.requires_grad:
            grad_bias_V = torch.zeros_like(bias_V, dtype=accurate)
        found = []
        for start in range(0, max(len(x_ND), 1), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            sums, grad_CV = chunk(x_ND[rows], rows)
            found.append(sums)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            if grad_x_ND is not None:
                grad_CV = grad_CV.to(x_ND.dtype)
                torch.mm(grad_CV, w_VD, out=grad_x_ND[rows])
            if grad_w_VD is not None:
                accumulate(grad_w_VD, grad_CV.t(), x_ND[rows])
        ctx.save_for_backward(grad_x_ND, grad_w_VD, grad_bias_V)
        loss, *others = (sum(parts[1:], parts[0]) for parts in zip(*found, strict=True))
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x_ND, grad_w_VD, grad_bias_V = ctx.saved_tensors
        scaled_w = None if grad_w_VD is None else (grad_w_VD * grad).to(grad_x_ND.dtype)
        scaled_bias = None if grad_bias_V is None else (grad_bias_V * grad).to(grad_x_ND.dtype)
        return grad_x_ND * grad.to(grad_x_ND.dtype), scaled_w, scaled_bias, None, None


def cross_entropy_chunk(logits_CV: Tensor, targets_C: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk's loss, its z-loss, and the gradient of their sum with respect to the logits (0 for ignored tokens),
    which takes their place.

    That of the loss is softmax - onehot, that of the z-loss 2 z_loss logsumexp softmax.
    """
    vocabulary = head.vocabulary
    valid_C = targets_C != IGNORED
    highest_C = vocabulary.highest(logits_CV.amax(-1))
    logits_CV -= highest_C[:, None]
    index_C, here_C = place_of(targets_C, vocabulary, logits_CV.shape[1])
    here_C &= valid_C
    index_C1 = index_C[:, None]
    target_C = vocabulary.total(logits_CV.gather(1, index_C1)[:, 0] * here_C)
    exponentials_CV = logits_CV.exp_()
    sums_C = vocabulary.total(exponentials_CV.sum(-1))
    logs_C = sums_C.log()
    loss = ((logs_C - target_C) * valid_C).sum()
    normaliser_C = (logs_C + highest_C) * valid_C
    z = head.z_loss * normaliser_C.square().sum()
    grad_CV = exponentials_CV.mul_(((valid_C + 2 * head.z_loss * normaliser_C) / sums_C)[:, None])
    return loss, z, grad_CV.scatter_add_(1, index_C1, -here_C[:, None].to(grad_CV.dtype))


def place_of(targets_C: Tensor, vocabulary: WholeVocabulary, width: int) -> tuple[Tensor, Tensor]:
    """Which of this rank's `width` vocabulary entries each target is, and whether it is one of them: under a vocabulary
    shard a target is on one rank alone, and elsewhere its row contributes 0.
    """
    index_C = targets_C - vocabulary.start
    here_C = (index_C >= 0) & (index_C < width)
    return torch.where(here_C, index_C, 0), here_C


def logits_of(x_CD: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A chunk's logits, and the soft-cap's derivative, 1 - tanh^2 (None without one)."""
    w_DV = head.w_VD.t()
    logits_CV = (x_CD @ w_DV if head.bias_V is None else torch.addmm(head.bias_V, x_CD, w_DV)).to(dtype)
    if head.softcap is None:
        return logits_CV, None
    tanh_CV = logits_CV.div_(head.softcap).tanh_()
    slope_CV = 1 - tanh_CV.square()
    return tanh_CV.mul_(head.softcap), slope_CV


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, whatever the dtypes."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
