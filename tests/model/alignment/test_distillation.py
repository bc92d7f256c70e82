"""Chunked distillation against torch's kl_div on whole logits, against TRL, and over a vocabulary in parts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import LargestTensor, Shard
from torch import Tensor

from moray import UserError
from moray.model import Decoder, ModelConfig, initialise, loss
from moray.model.alignment.distillation import (
    Direction,
    Distillation,
    Distilled,
    check_teacher,
    distillation_sum,
)
from moray.model.loss import IGNORED, Head, WholeVocabulary, soft_cap
from moray.model.objective import MicroBatch, NextToken
from moray.parallel.gradients import accumulate_gradients

D, TEACHER_D, V, TOKENS = 12, 7, 40, 21
DIRECTIONS: list[Direction] = ["forward", "reverse"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int = TOKENS) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A student's hidden states, weight and bias, the teacher's, and targets of which a chunk's worth is ignored."""
    student = [drawn(tokens, D, seed=0).requires_grad_(), drawn(V, D, seed=1).requires_grad_()]
    teacher = [drawn(tokens, TEACHER_D, seed=2), drawn(V, TEACHER_D, seed=3), drawn(V, seed=4)]
    targets = torch.randint(V, (tokens,), generator=torch.Generator().manual_seed(5))
    targets[4:14] = IGNORED
    return [*student, drawn(V, seed=6).requires_grad_()], teacher, targets


def truth(
    logits: Tensor, teacher: Tensor, targets: Tensor, direction: Direction, temperature: float, mix: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, KL, cross-entropy and agreement from whole logits, by torch."""
    valid = targets != IGNORED
    logits, teacher, targets = logits[valid], teacher[valid], targets[valid]
    of = [(x / temperature).log_softmax(-1) for x in (logits, teacher)]
    kl = F.kl_div(*(of if direction == "forward" else of[::-1]), reduction="sum", log_target=True)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    agreement = (logits.argmax(-1) == teacher.argmax(-1)).sum().double()
    return (1 - mix) * temperature**2 * kl + mix * cross_entropy, kl, cross_entropy, agreement


def assert_equal(found: Distilled, expected: tuple[Tensor, ...], z: Tensor, leaves: list[Tensor]) -> None:
    for mine, other in zip((found.loss, found.kl, found.cross_entropy, found.agreement), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.z, z, rtol=1e-12, atol=0)
    assert not any(metric.requires_grad for metric in found[1:])
    ours, theirs = (torch.autograd.grad(0.25 * x, leaves) for x in (found.loss, expected[0] + z))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.3), (0.5, 1.0)])
@pytest.mark.parametrize(("softcap", "biased", "z_loss"), [(None, False, 0.0), (3.0, True, 0.05)])
@pytest.mark.parametrize("tokens", [TOKENS, 24])
def test_values_and_gradients_equal_torch(
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    temperature: float,
    mix: float,
    softcap: float | None,
    biased: bool,
    z_loss: float,
    tokens: int,
) -> None:
    """Teacher of another width, a whole chunk ignored, a last one of five tokens or eight."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)
    (x, w, b), (teacher_x, teacher_w, teacher_b), targets = inputs(tokens)
    targets[8:16] = IGNORED
    vocabulary = WholeVocabulary()
    head = Head(w, b if biased else None, softcap, z_loss, vocabulary)
    teacher_head = Head(teacher_w, teacher_b if biased else None, 5.0 if softcap else None, 0.0, vocabulary)
    options: dict[str, Any] = {"direction": direction, "temperature": temperature, "mix": mix}
    found = distillation_sum(x, head, teacher_x, teacher_head, targets, **options)
    logits, teacher = F.linear(x, w, head.bias_V), F.linear(teacher_x, teacher_w, teacher_head.bias_V)
    if softcap:
        logits, teacher = soft_cap(logits, softcap), soft_cap(teacher, 5.0)
    z = mix * z_loss * logits[targets != IGNORED].logsumexp(-1).square().sum()
    expected = truth(logits, teacher, targets, **options)
    assert expected[1] > 0
    assert_equal(found, expected, z, [x, w, b] if biased else [x, w])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_vocabulary_in_parts_computes_the_same(direction: Direction) -> None:
    """A quarter of both heads' rows each: its rows' gradients are its own, those of x sum to the whole."""
    student, teacher, targets = inputs()
    barrier, peers = threading.Barrier(4, timeout=10), [None] * 4
    options: dict[str, Any] = {"direction": direction, "temperature": 2.0, "mix": 0.3}

    def of_rank(rank: int) -> tuple[Distilled, tuple[Tensor, ...]]:
        rows = slice(rank * V // 4, (rank + 1) * V // 4)
        x, w, b = leaves = [
            part.detach().clone().requires_grad_() for part in (student[0], student[1][rows], student[2][rows])
        ]
        vocabulary = Shard(rank, rows.start, peers, barrier)
        head, teachers = (Head(*one, 3.0, 0.05, vocabulary) for one in ((w, b), [part[rows] for part in teacher[1:]]))
        found = distillation_sum(x, head, teacher[0], teachers, targets, **options)
        return found, torch.autograd.grad(found.loss, leaves)

    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(of_rank, range(4)))
    whole = [Head(*one[1:], 3.0, 0.05, WholeVocabulary()) for one in (student, teacher)]
    expected = distillation_sum(student[0], whole[0], teacher[0], whole[1], targets, **options)
    for found, _ in parts:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads_x, grads_w, grads_b = zip(*(gradients for _, gradients in parts), strict=True)
    gradients = torch.autograd.grad(expected.loss, student)
    for mine, other in zip((sum(grads_x), torch.cat(grads_w), torch.cat(grads_b)), gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_that_is_its_teacher_learns_nothing(direction: Direction, dtype: torch.dtype) -> None:
    (x, w, b), _, targets = inputs()
    leaves = [part.detach().to(dtype).requires_grad_() for part in (x, w, b)]
    head = Head(*leaves[1:], 3.0, 0.05, WholeVocabulary())
    found = distillation_sum(leaves[0], head, leaves[0], head, targets, direction=direction, temperature=2.0)
    assert found.loss == found.kl == 0
    assert found.agreement == (targets != IGNORED).sum()
    assert not any(gradient.any() for gradient in torch.autograd.grad(found.loss, leaves))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_in_bf16_the_gradient_is_near_that_of_fp64(direction: Direction) -> None:
    """And its sums are in fp32."""
    (x, w, _), (teacher_x, teacher_w, _), targets = inputs(3000)
    found, gradients = [], []
    for dtype in (torch.bfloat16, torch.float64):
        ours, theirs = (
            [part.detach().bfloat16().to(dtype) for part in one] for one in ((x, w), (teacher_x, teacher_w))
        )
        leaves = [part.requires_grad_() for part in ours]
        heads = [Head(weight, None, None, 0.0, WholeVocabulary()) for weight in (leaves[1], theirs[1])]
        found.append(distillation_sum(leaves[0], heads[0], theirs[0], heads[1], targets, direction=direction).loss)
        gradients.append(torch.autograd.grad(found[-1], leaves))
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-3)
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(("direction", "beta"), [("forward", 0), ("reverse", 1)])
def test_equal_to_trls_generalised_jsd(direction: Direction, beta: int) -> None:
    """TRL's ends of the generalised Jensen-Shannon divergence (Agarwal et al., 2024), which lack temperature^2."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    (x, w, b), (teacher_x, teacher_w, teacher_b), targets = inputs()
    head, teacher_head = (Head(*one, None, 0.0, WholeVocabulary()) for one in ((w, b), (teacher_w, teacher_b)))
    found = distillation_sum(x, head, teacher_x, teacher_head, targets, direction=direction, temperature=2.0)
    logits, teacher = F.linear(x, w, b)[None], F.linear(teacher_x, teacher_w, teacher_b)[None]
    mean = trainer.generalized_jsd_loss(logits, teacher, labels=targets[None], beta=beta, temperature=2.0)
    ours = found.loss / (targets != IGNORED).sum()
    torch.testing.assert_close(ours, 4 * mean, rtol=1e-12, atol=0)
    leaves = [x, w, b]
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(4 * mean, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_no_tensor_of_tokens_times_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    (x, w, b), (teacher_x, teacher_w, teacher_b), targets = inputs(400)
    head, teacher_head = (Head(*one, 3.0, 0.0, WholeVocabulary()) for one in ((w, b), (teacher_w, teacher_b)))
    with LargestTensor() as ours:
        distillation_sum(x, head, teacher_x, teacher_head, targets, temperature=2.0, mix=0.5).loss.backward()
    assert ours.elements == max(400 * D, 16 * V, V * D), "the gradient of x, one chunk's logits, or the weight's"


def models() -> tuple[Decoder, Decoder, MicroBatch]:
    """A MoE that learns, a dense teacher of another width, and a batch with documents and ignored targets."""
    student = ModelConfig.preset("demo-moe", n_layers=2, vocab_size=64).but(moe={"balance_loss": 0.1})
    teacher = ModelConfig.preset("demo-dense", n_layers=3, d_model=96, vocab_size=64)
    decoders = [Decoder(config).double() for config in (student, teacher)]
    for seed, decoder in enumerate(decoders):
        initialise(decoder, seed)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(64, (3, 20), generator=generator) for _ in range(2))
    targets[0, :15], targets[2] = IGNORED, IGNORED
    rows = torch.arange(20).expand(3, 20)
    return (
        decoders[0],
        decoders[1].requires_grad_(False).eval(),
        MicroBatch.of(tokens, targets, rows % 7, rows // 7, torch.device("cpu")),
    )


def test_the_objective_is_that_of_whole_logits() -> None:
    """Divided by the tokens that have a target, with pretraining's balance losses; a teacher has no gradient."""
    student, teacher, batch = models()
    found = accumulate_gradients(student, [batch], objective=Distillation(teacher, "forward", 2.0, 0.3)).values
    gradients = {name: weight.grad for name, weight in student.named_parameters()}
    auxiliary = student.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents).auxiliary / 3
    logits, others = (one(batch.tokens_BT, batch.positions_BT, batch.documents) for one in (student, teacher))
    expected = truth(logits.flatten(0, 1), others.flatten(0, 1), batch.targets_BT.flatten(), "forward", 2.0, 0.3)
    means = [x / batch.n_targets for x in expected]
    for name, mean in zip(("loss", "kl", "cross_entropy", "agreement"), means, strict=True):
        assert found[name] == pytest.approx(mean.item(), rel=1e-12)
    assert found["auxiliary_loss"] == pytest.approx(auxiliary.item(), rel=1e-12)
    assert auxiliary > 0
    student.zero_grad()
    (means[0] + auxiliary).backward()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-9, atol=1e-12)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_cross_entropy_alone_is_pretraining() -> None:
    """mix=1: the same losses and gradients, to the bit."""
    student, teacher, batch = models()
    found = accumulate_gradients(student, [batch], objective=Distillation(teacher, mix=1.0)).values
    gradients = [weight.grad for weight in student.parameters()]
    student.zero_grad()
    expected = accumulate_gradients(student, [batch], objective=NextToken.of(student.config)).values
    assert expected.items() <= found.items()
    assert all(torch.equal(mine, weight.grad) for mine, weight in zip(gradients, student.parameters(), strict=True))


def test_the_student_approaches_its_teacher() -> None:
    student, teacher, batch = models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        history.append(accumulate_gradients(student, [batch], objective=Distillation(teacher)).values)
        optimizer.step()
    assert history[-1]["kl"] < 0.2 * history[0]["kl"]
    assert history[-1]["agreement"] > history[0]["agreement"] + 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"direction": "sideways"}, "direction=sideways must be forward or reverse"),
        ({"temperature": 0.0}, "temperature=0.0 must be finite and more than 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"mix": 1.5}, "mix=1.5, the share of cross-entropy, must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Distillation(models()[1], **wrong)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    config = ModelConfig.preset("demo-dense", vocab_size=64)
    check_teacher(config, config.but(d_model=96))
    with pytest.raises(UserError, match=r"model\.vocab_size=65 must be the student's, 64"):
        check_teacher(config, config.but(vocab_size=65))
