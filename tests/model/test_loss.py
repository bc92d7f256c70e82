"""Chunked cross-entropy against torch's own, and the promise that no [tokens, vocabulary] tensor exists."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from heads import LargestTensor, Shard
from torch import Tensor

from moray.model import loss
from moray.model.loss import IGNORED, WholeVocabulary, cross_entropy_sum, soft_cap

D, V = 12, 40


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    return x, w, torch.randint(V, (tokens,), generator=generator)


def assert_equal_to_torch(x: Tensor, w: Tensor, targets: Tensor, tolerance: float) -> None:
    """Value and both gradients, of a loss that is used with a factor."""
    ours = 0.25 * cross_entropy_sum(x, w, targets, WholeVocabulary())[0]
    truth = 0.25 * F.cross_entropy(x @ w.T, targets, reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
    for mine, other in zip(torch.autograd.grad(ours, [x, w]), torch.autograd.grad(truth, [x, w]), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


# One token, one chunk and a bit, whole chunks, a last chunk of one token, and a single chunk.
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 8), (9, 8), (32, 8), (33, 8), (33, 1024)])
def test_value_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch, tokens: int, chunk: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    assert_equal_to_torch(*inputs(tokens), 1e-12)


def test_ignored_targets_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)
    x, w, targets = inputs(30)
    targets[3:20] = IGNORED  # one chunk is ignored whole
    assert_equal_to_torch(x, w, targets, 1e-12)


def test_all_ignored_is_0_with_gradients_of_0() -> None:
    x, w, targets = inputs(10)
    value, _ = cross_entropy_sum(x, w, torch.full_like(targets, IGNORED), WholeVocabulary())
    assert value == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, [x, w]))


def test_logits_far_apart_do_not_overflow() -> None:
    x, w, targets = inputs(10, torch.float32)
    assert_equal_to_torch((x.detach() * 300).requires_grad_(), w, targets, 1e-4)


def test_in_bf16_the_loss_is_summed_in_fp32() -> None:
    x, w, targets = inputs(5000, torch.bfloat16)
    value, _ = cross_entropy_sum(x, w, targets, WholeVocabulary())
    truth = F.cross_entropy(x.double() @ w.double().T, targets, reduction="sum")
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(truth.item(), rel=1e-3)
    grad_x, grad_w = torch.autograd.grad(value, [x, w])
    true_x, true_w = torch.autograd.grad(truth, [x, w])
    assert grad_x.dtype == grad_w.dtype == torch.bfloat16
    for ours, theirs in ((grad_x, true_x), (grad_w, true_w)):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_without_gradients_none_are_formed() -> None:
    x, w, targets = inputs(20)
    with torch.no_grad():
        value, _ = cross_entropy_sum(x, w, targets, WholeVocabulary())
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(x @ w.T, targets, reduction="sum").detach())


def truth_of(logits: Tensor, targets: Tensor, softcap: float | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and z-loss from whole logits, by torch."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    z = (logits.logsumexp(-1) ** 2)[targets != IGNORED].sum()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED), z_loss * z


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_bias_softcap_and_z_loss_equal_torch(
    monkeypatch: pytest.MonkeyPatch, biased: bool, softcap: float | None, z_loss: float
) -> None:
    """Logits reach several times the cap; the gradients are those of the two losses' sum."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)
    x, w, targets = inputs(21)
    targets[4:14] = IGNORED
    bias = torch.linspace(-4, 4, V, dtype=torch.float64).requires_grad_() if biased else None
    cross_entropy, z = cross_entropy_sum(x, w, targets, WholeVocabulary(), bias_V=bias, softcap=softcap, z_loss=z_loss)
    logits = F.linear(x, w, bias)
    assert logits.abs().max() > 9
    expected, expected_z = truth_of(logits, targets, softcap, z_loss)
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(z, expected_z.detach(), rtol=1e-12, atol=0)
    leaves = [x, w] if bias is None else [x, w, bias]
    ours = torch.autograd.grad(0.25 * (cross_entropy + z), leaves)
    truth = torch.autograd.grad(0.25 * (expected + expected_z), leaves)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "z_loss": 0.05}], ids=["plain", "softcap and z-loss"])
def test_a_sharded_vocabulary_computes_the_same(options: dict[str, float]) -> None:
    """Rows of weight and bias in four parts: each part's gradient is its rows' own, those of x sum to the whole."""
    x, w, targets = inputs(21)
    targets[4:9] = IGNORED
    bias = torch.linspace(-4, 4, V, dtype=torch.float64)
    barrier, peers = threading.Barrier(4, timeout=10), [None] * 4

    def of_rank(rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        rows = slice(rank * V // 4, (rank + 1) * V // 4)
        leaves = [part.detach().clone().requires_grad_() for part in (x, w[rows], bias[rows])]
        value, z = cross_entropy_sum(
            *leaves[:2], targets, Shard(rank, rows.start, peers, barrier), bias_V=leaves[2], **options
        )
        return value, z, torch.autograd.grad(value, leaves)

    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(of_rank, range(4)))
    bias.requires_grad_()
    expected, expected_z = truth_of(F.linear(x, w, bias), targets, options.get("softcap"), options.get("z_loss", 0.0))
    truth = torch.autograd.grad(expected + expected_z, [x, w, bias])
    for value, z, _ in parts:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=0)
    grads_x, grads_w, grads_bias = zip(*(gradients for _, _, gradients in parts), strict=True)
    ours = (sum(grads_x), torch.cat(grads_w), torch.cat(grads_bias))
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_soft_cap_equals_transformers_formula_and_keeps_small_values() -> None:
    x = torch.tensor([-1e4, -30.0, -1e-3, 0.0, 1e-3, 30.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(soft_cap(x, 30.0), torch.tanh(x / 30.0) * 30.0, rtol=1e-15, atol=0)
    assert soft_cap(x, 30.0).abs().max() <= 30
    torch.testing.assert_close(soft_cap(x[2:5], 30.0), x[2:5], rtol=1e-9, atol=0)


def test_no_tensor_of_tokens_times_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    x, w, targets = inputs(400)
    with LargestTensor() as ours:
        cross_entropy_sum(x, w, targets, WholeVocabulary())[0].backward()
    with LargestTensor() as torchs:
        F.cross_entropy(x @ w.T, targets, reduction="sum").backward()
    assert torchs.elements == 400 * V
    assert ours.elements == max(400 * D, 16 * V, V * D), "the gradient of x, one chunk's logits, or the weight's"
