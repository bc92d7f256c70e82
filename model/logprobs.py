"""Log-probabilities of given tokens without the logits: chunks, whose logits are formed anew for the gradient.

A loss that is a function of a whole answer's probability (DPO, GRPO, PPO) weighs a token's gradient by what is known
only when all are there: hence four matrix products, where cross-entropy does with three.
"""

# Shapes: N tokens, C tokens of one chunk, D model width, V vocabulary entries on this rank.

from typing import Any

import torch
from torch import Tensor

from moray.model import loss
from moray.model.loss import Head, WholeVocabulary, accumulate, logits_of, place_of


def token_logprobs(x_ND: Tensor, targets_N: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target] of each token, [N], at least fp32, with a gradient.

    Every target is a token's: none is ignored. Memory is CHUNK_TOKENS * V; the weight's gradient is collected in fp32
    at least, and one that is frozen has none.
    """
    logp_N: Tensor = _ChunkedLogprobs.apply(x_ND, head.w_VD, head.bias_V, targets_N, head, temperature)
    return logp_N


def log_softmax_at(
    logits_CV: Tensor, targets_C: Tensor, highest_C: Tensor, vocabulary: WholeVocabulary
) -> tuple[Tensor, Tensor]:
    """Of each row its target's log-probability and its log-sum-exp, [C] each; the logits are lost.

    highest_C: of each row, over the whole vocabulary.
    """
    logits_CV -= highest_C[:, None]
    index_C, here_C = place_of(targets_C, vocabulary, logits_CV.shape[1])
    target_C = vocabulary.total(logits_CV.gather(1, index_C[:, None])[:, 0] * here_C)
    log_C = vocabulary.total(logits_CV.exp_().sum(-1)).log()
    return target_C - log_C, highest_C + log_C


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: Head, temperature: float
    ) -> Tensor:
        accurate = torch.promote_types(x_ND.dtype, torch.float32)
        logp_N, normaliser_N = (x_ND.new_empty(len(x_ND), dtype=accurate) for _ in range(2))
        for start in range(0, len(x_ND), loss.CHUNK_TOKENS):
            rows = slice(start, start + loss.CHUNK_TOKENS)
            logits_CV = logits_of(x_ND[rows], head, accurate)[0].div_(temperature)
            highest_C = head.vocabulary.highest(logits_CV.amax(-1))
            logp_N[rows], normaliser_N[rows] = log_softmax_at(logits_CV, targets_N[rows], highest_C, head.vocabulary)
        ctx.save_for_backward(x_ND, w_VD, bias_V, targets_N, normaliser_N)
        ctx.head, ctx.temperature = head, temperature
        return logp_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """That of a logit: (onehot - softmax) / temperature, by the soft cap's slope; of this rank's part of them."""
        x_ND, w_VD, bias_V, targets_N, normaliser_N = ctx.saved_tensors
        head = ctx.head._replace(w_VD=w_VD, bias_V=bias_V)
        _, wants_w, wants_bias, *_ = ctx.needs_input_grad
        grad_x_ND = torch.empty_like(x_ND)
        grad_w_VD = torch.zeros_like(w_VD, dtype=grad_N.dtype) if wants_w else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=grad_N.dtype) if wants_bias else None
        for start in range(0, len(x_ND), loss.CHUNK_TOKENS):
            rows = slice(start, start + loss.CHUNK_TOKENS)
            logits_CV, slope_CV = logits_of(x_ND[rows], head, grad_N.dtype)
            scaled_C1 = -grad_N[rows, None] / ctx.temperature
            grad_CV = logits_CV.div_(ctx.temperature).sub_(normaliser_N[rows, None]).exp_().mul_(scaled_C1)
            index_C, here_C = place_of(targets_N[rows], head.vocabulary, grad_CV.shape[1])
            grad_CV.scatter_add_(1, index_C[:, None], -scaled_C1 * here_C[:, None])
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(x_ND.dtype)
            torch.mm(grad_CV, w_VD, out=grad_x_ND[rows])
            if grad_w_VD is not None:
                accumulate(grad_w_VD, grad_CV.t(), x_ND[rows])
        to = x_ND.dtype
        return (
            grad_x_ND,
            None if grad_w_VD is None else grad_w_VD.to(to),
            None if grad_bias_V is None else grad_bias_V.to(to),
            None,
            None,
            None,
        )
