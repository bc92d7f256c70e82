"""Distillation: a student learns a teacher's probabilities of the next token (Hinton et al., 2015)."""

# Shapes: N tokens, C tokens of one chunk, D model width (a teacher's is its own), V vocabulary entries on this rank.

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.decoder import Decoder
from moray.model.loss import IGNORED, Head, WholeVocabulary, chunked_sums, cross_entropy_chunk, logits_of
from moray.model.objective import MicroBatch, NextToken, Objective

Direction = Literal["forward", "reverse"]
"""forward: KL(teacher || student), by which the student covers all that the teacher may say. reverse:
KL(student || teacher), by which it says nothing that the teacher would not (MiniLLM, Gu et al., 2024, section 2.1)."""


class Distilled(NamedTuple):
    """Sums over the tokens that have a target; the first has the gradient of loss + z, the others none.

    loss: (1 - mix) temperature^2 kl + mix cross_entropy. z: mix times the z-loss. kl: at the temperature, nats.
    cross_entropy: at temperature 1, nats. agreement: how often student and teacher find the same token likeliest.
    """

    loss: Tensor
    z: Tensor
    kl: Tensor
    cross_entropy: Tensor
    agreement: Tensor


def distillation_sum(
    student_x_ND: Tensor,
    student: Head,
    teacher_x_ND: Tensor,
    teacher: Head,
    targets_N: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    mix: float = 0.0,
) -> Distilled:
    """A student's divergence from its teacher, mixed with cross-entropy; scalars, at least fp32.

    The temperature divides the logits of both. Gradients shrink by its square then, so the divergence is multiplied by
    temperature^2, which keeps its share beside cross-entropy (Hinton et al., 2015, section 2). Both heads have the same
    vocabulary entries on this rank. Only the student has gradients.

    No [N, V] tensor exists: memory is a few times CHUNK_TOKENS * V, as for `cross_entropy_sum`.
    """
    accurate, vocabulary = torch.promote_types(student_x_ND.dtype, torch.float32), student.vocabulary

    def chunk(x_CD: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], Tensor]:
        valid_C = targets_N[rows] != IGNORED
        logits_CV, slope_CV = logits_of(x_CD, student, accurate)
        q = _softmax(logits_CV, temperature, vocabulary)
        p = _softmax(logits_of(teacher_x_ND[rows], teacher, accurate)[0], temperature, vocabulary)
        kl_C, slope_of_kl_CV = _divergence(p, q, direction, vocabulary)
        kl, agreement = (kl_C * valid_C).sum(), ((p.likeliest_C == q.likeliest_C) & valid_C).sum().to(accurate)
        cross_entropy, z, grad_CV = cross_entropy_chunk(logits_CV, targets_N[rows], student)
        grad_CV.mul_(mix).addcmul_(slope_of_kl_CV, valid_C[:, None].to(accurate), value=(1 - mix) * temperature)
        loss = (1 - mix) * temperature**2 * kl + mix * cross_entropy
        return (loss, mix * z, kl, cross_entropy, agreement), grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)

    return Distilled(*chunked_sums(student_x_ND, student, chunk))


class _Softmax(NamedTuple):
    """Of logits / temperature, this rank's entries; and which of all entries is the likeliest."""

    probability_CV: Tensor
    log_CV: Tensor
    likeliest_C: Tensor


def _softmax(logits_CV: Tensor, temperature: float, vocabulary: WholeVocabulary) -> _Softmax:
    highest_C, likeliest_C = vocabulary.likeliest(logits_CV)
    log_CV = (logits_CV - highest_C[:, None]).div_(temperature)
    exponentials_CV = log_CV.exp()
    sums_C1 = vocabulary.total(exponentials_CV.sum(-1))[:, None]
    return _Softmax(exponentials_CV.div_(sums_C1), log_CV.sub_(sums_C1.log()), likeliest_C)


def _divergence(p: _Softmax, q: _Softmax, direction: Direction, vocabulary: WholeVocabulary) -> tuple[Tensor, Tensor]:
    """KL(p || q) or, reverse, KL(q || p), [C]; and its gradient with respect to what q is the softmax of, [C, V]:
    q - p, or q (log(q / p) - KL). In the memory of p and q, which are lost.
    """
    if direction == "forward":
        kl_C = vocabulary.total(p.log_CV.sub_(q.log_CV).mul_(p.probability_CV).sum(-1))
        return kl_C, q.probability_CV.sub_(p.probability_CV)
    weighted_CV = q.log_CV.sub_(p.log_CV).mul_(q.probability_CV)
    kl_C = vocabulary.total(weighted_CV.sum(-1))
    return kl_C, weighted_CV.addcmul_(q.probability_CV, kl_C[:, None], value=-1)


@dataclass(frozen=True)
class Distillation(Objective[MicroBatch]):
    """`distillation_sum` per token that has a target; z-loss and auxiliary losses as of NextToken, but for the z-loss's
    share, which is cross-entropy's.

    teacher: frozen, in eval mode, and spread over the same ranks as the student. Its embedding and head stay gathered
    from its first pass on. Behind the losses stand metrics, which have no gradient.
    """

    teacher: Decoder
    direction: Direction = "forward"
    temperature: float = 1.0
    mix: float = 0.0
    group_size: int = 1
    names = ("loss", "z_loss", "auxiliary_loss", "kl", "cross_entropy", "agreement")

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise UserError(f"direction={self.direction} must be {' or '.join(get_args(Direction))}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be finite and more than 0")
        if not 0 <= self.mix <= 1:
            raise UserError(f"mix={self.mix}, the share of cross-entropy, must be from 0 to 1")

    def counts(self, piece: MicroBatch) -> tuple[float, ...]:
        tokens, _, groups = NextToken(self.group_size).counts(piece)
        return tokens, tokens, groups, tokens, tokens, tokens

    def sums(self, decoder: Decoder, piece: MicroBatch) -> tuple[Tensor, ...]:
        inputs = piece.tokens_BT, piece.positions_BT, piece.documents
        with torch.no_grad():
            (teacher_x_ND, teacher), _ = self.teacher.with_head(lambda x_ND, head: (x_ND, head), *inputs)

        def distilled(x_ND: Tensor, student: Head) -> Distilled:
            return distillation_sum(
                x_ND,
                student,
                teacher_x_ND,
                teacher,
                piece.targets_BT.flatten(),
                direction=self.direction,
                temperature=self.temperature,
                mix=self.mix,
            )

        (loss, z, *metrics), auxiliary = decoder.with_head(distilled, *inputs, piece.randomness)
        return loss, z, auxiliary, *metrics


def check_teacher(student: ModelConfig, teacher: ModelConfig) -> None:
    """UserError unless they have the same vocabulary, as far as its size says."""
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher's model.vocab_size={teacher.vocab_size} must be the student's, {student.vocab_size}:"
            " a token of the one must be the same token of the other"
        )
