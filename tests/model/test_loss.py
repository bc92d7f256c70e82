"""Chunked cross-entropy against torch's own, and the promise that no [tokens, vocabulary] tensor exists."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import loss
from model.loss import IGNORED, WholeVocabulary, cross_entropy_sum

D, V = 12, 40


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    return x, w, torch.randint(V, (tokens,), generator=generator)


def assert_equal_to_torch(x: Tensor, w: Tensor, targets: Tensor, tolerance: float) -> None:
    """Value and both gradients, of a loss that is used with a factor."""
    ours = 0.25 * cross_entropy_sum(x, w, targets, WholeVocabulary())
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
    value = cross_entropy_sum(x, w, torch.full_like(targets, IGNORED), WholeVocabulary())
    assert value == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, [x, w]))


def test_logits_far_apart_do_not_overflow() -> None:
    x, w, targets = inputs(10, torch.float32)
    assert_equal_to_torch((x.detach() * 300).requires_grad_(), w, targets, 1e-4)


def test_in_bf16_the_loss_is_summed_in_fp32() -> None:
    x, w, targets = inputs(5000, torch.bfloat16)
    value = cross_entropy_sum(x, w, targets, WholeVocabulary())
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
        value = cross_entropy_sum(x, w, targets, WholeVocabulary())
    assert not value.requires_grad
    torch.testing.assert_close(value, F.cross_entropy(x @ w.T, targets, reduction="sum").detach())


class LargestTensor(TorchDispatchMode):
    """Watches every operation of the block, forward and backward, for the most elements of a tensor it made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_of_tokens_times_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    x, w, targets = inputs(400)
    with LargestTensor() as ours:
        cross_entropy_sum(x, w, targets, WholeVocabulary()).backward()
    with LargestTensor() as torchs:
        F.cross_entropy(x @ w.T, targets, reduction="sum").backward()
    assert torchs.elements == 400 * V
    assert ours.elements == max(400 * D, 16 * V, V * D), "the gradient of x, one chunk's logits, or the weight's"
