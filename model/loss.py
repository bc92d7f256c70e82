"""Cross-entropy without the logits: chunks of tokens, whose gradient is formed in the same pass."""

# Shapes: N tokens, C tokens of one chunk, D model width, V vocabulary entries on this rank.

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target of a token that has nothing to predict."""
CHUNK_TOKENS = 1024


class WholeVocabulary:
    """All vocabulary entries are on this rank. `parallel.tensor.VocabularyShard` is the other case."""

    start = 0

    def gather(self, x_BTD: Tensor) -> Tensor:
        """All tokens of the sequences that this rank holds parts of."""
        return x_BTD

    def weight(self, weight: Tensor) -> Tensor:
        """This rank's rows of the output weight."""
        return weight

    def total(self, x: Tensor) -> Tensor:
        """The sum over the vocabulary's ranks, in place where possible."""
        return x

    def highest(self, x: Tensor) -> Tensor:
        """The maximum over the vocabulary's ranks."""
        return x


def cross_entropy_sum(x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, vocabulary: WholeVocabulary) -> Tensor:
    """Sum of -log softmax(x w^T)[target] over the tokens whose target is not IGNORED; a scalar, at least fp32.

    No [N, V] tensor exists: each chunk's logits are turned into its part of both gradients and forgotten, so memory is
    CHUNK_TOKENS * V. The weight's gradient is collected in fp32 at least.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(x_ND, w_VD, targets_N, vocabulary, torch.is_grad_enabled())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, vocabulary: WholeVocabulary, training: bool
    ) -> Tensor:
        accurate = torch.promote_types(x_ND.dtype, torch.float32)
        loss = x_ND.new_zeros((), dtype=accurate)
        grad_x_ND = torch.empty_like(x_ND) if training else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=accurate) if training else None
        for start in range(0, len(x_ND), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk_loss, grad_CV = _chunk(x_ND[rows], w_VD, targets_N[rows], vocabulary, accurate)
            loss += chunk_loss
            if grad_x_ND is not None and grad_w_VD is not None:
                grad_CV = grad_CV.to(x_ND.dtype)
                torch.mm(grad_CV, w_VD, out=grad_x_ND[rows])
                _accumulate(grad_w_VD, grad_CV.t(), x_ND[rows])
        ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        scaled_w = (grad_w_VD * grad).to(grad_x_ND.dtype)
        return grad_x_ND * grad.to(grad_x_ND.dtype), scaled_w, None, None, None


def _chunk(
    x_CD: Tensor, w_VD: Tensor, targets_C: Tensor, vocabulary: WholeVocabulary, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One chunk's loss and its gradient with respect to the logits, softmax - onehot (0 for ignored tokens)."""
    logits_CV = (x_CD @ w_VD.t()).to(dtype)
    valid_C = targets_C != IGNORED
    logits_CV -= vocabulary.highest(logits_CV.amax(-1))[:, None]
    # Under a vocabulary shard, the target's logit is on one rank alone; elsewhere the row contributes 0.
    index_C = targets_C - vocabulary.start
    here_C = valid_C & (index_C >= 0) & (index_C < logits_CV.shape[1])
    index_C1 = torch.where(here_C, index_C, 0)[:, None]
    target_C = vocabulary.total(logits_CV.gather(1, index_C1)[:, 0] * here_C)
    exponentials_CV = logits_CV.exp_()
    sums_C = vocabulary.total(exponentials_CV.sum(-1))
    loss = ((sums_C.log() - target_C) * valid_C).sum()
    grad_CV = exponentials_CV.mul_((valid_C / sums_C)[:, None])
    grad_CV.scatter_add_(1, index_C1, -here_C[:, None].to(dtype))
    return loss, grad_CV


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
