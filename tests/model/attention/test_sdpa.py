"""Attention kernels against the textbook: softmax of masked scores in float64, forward and backward."""

import math
from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moray.model.attention import sdpa
from moray.model.attention.documents import Documents
from moray.model.attention.sdpa import Scoring, attend, attend_visible

TOKENS = 21
ALL = torch.ones(2, TOKENS, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", 4)


def textbook(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, lengths: list[int] | None) -> Tensor:
    """Every query head reads key head h // (H / G); a token sees itself and those before it in its document."""
    rows, tokens, heads, _ = q.shape
    lengths = lengths or [tokens] * rows
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).view(rows, tokens)
    out = torch.empty(rows, tokens, heads, v.shape[-1], dtype=q.dtype)
    for row in range(rows):
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        visible = (distance >= 0) & (document[row][:, None] == document[row])
        if scoring.window:
            visible &= distance < scoring.window
        for head in range(heads):
            group = head // (heads // k.shape[2])
            scores = q[row, :, head] @ k[row, :, group].T * scoring.scale
            if scoring.softcap:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            out[row, :, head] = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[row, :, group]
    return out


def documents_of(lengths: list[int] | None) -> Documents:
    return Documents(lengths, ALL)


def inputs(heads: int, groups: int, d: int, e: int, tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, heads, d), (2, tokens, groups, d), (2, tokens, groups, e))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [None, [21, 21], [1, 13, 7, 4, 5, 12]])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 20, 21, 100])
def test_output_and_gradients_are_the_textbooks(
    window: int | None, softcap: float | None, lengths: list[int] | None
) -> None:
    scoring = Scoring(0.4, window, softcap)
    qkv = inputs(heads=4, groups=2, d=8, e=8)
    out, expected = attend(*qkv, scoring, documents_of(lengths)), textbook(*qkv, scoring, lengths)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(out, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", [None, [1, 13, 7, 4, 5, 12]])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("groups", "d", "e"), [(4, 8, 8), (2, 8, 8), (1, 12, 8), (2, 6, 10)])
def test_one_kernel_for_all_documents_computes_the_textbooks(
    groups: int, d: int, e: int, window: int | None, lengths: list[int] | None
) -> None:
    scoring, expected_qkv = Scoring(0.4, window), inputs(4, groups, d, e)
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in expected_qkv]
    edges = torch.tensor([0, *accumulate(lengths or [TOKENS] * 2)], dtype=torch.int32, device="cuda")
    out, expected = attend(*qkv, scoring, Documents(lengths, ALL, edges)), textbook(*expected_qkv, scoring, lengths)
    assert out.grad_fn is not None
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0.02, atol=0.02)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(out, qkv, upstream.cuda())
    for ours, theirs in zip(found, torch.autograd.grad(expected, expected_qkv, upstream.double()), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0.04, atol=0.04)


@pytest.mark.parametrize(("groups", "d", "e"), [(4, 8, 8), (1, 8, 8), (4, 12, 8), (2, 6, 10)])
@pytest.mark.parametrize("scoring", [Scoring(0.4), Scoring(0.4, 6), Scoring(0.4, None, 1.5), Scoring(0.4, 6, 1.5)])
def test_heads_share_keys_and_values_may_have_another_width(scoring: Scoring, groups: int, d: int, e: int) -> None:
    qkv = inputs(4, groups, d, e)
    out, expected = attend(*qkv, scoring, None), textbook(*qkv, scoring, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(expected.sum(), qkv), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_each_query_sees_what_a_mask_lets_it(softcap: float | None) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(4, 2, 8, 8, tokens=9))
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(2, 1, 9, 9, generator=generator) < 0.4
    visible |= torch.eye(9, dtype=torch.bool)
    scores = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 0.4
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    expected = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    out = attend_visible(q, k, v, Scoring(0.4, None, softcap), visible)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    everything = attend_visible(q, k, v, Scoring(0.4, None, softcap), None)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(everything, expected, rtol=0, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns, and the products of query and key lengths that kernels saw."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.pairs = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tensors(out))])
        if "scaled_dot_product" in func.__name__ and "backward" not in func.__name__:
            self.pairs += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
        return out


def tensors(out: object) -> Iterator[Tensor]:
    for x in out if isinstance(out, tuple | list) else [out]:
        if isinstance(x, Tensor):
            yield x


def test_a_window_costs_tokens_times_two_windows() -> None:
    tokens, window = 2048, 32
    qkv = [x.detach().float().requires_grad_() for x in inputs(2, 1, 8, 8, tokens)]
    with Sizes() as sizes:
        attend(*qkv, Scoring(0.4, window), None).sum().backward()
    assert sizes.pairs <= 2 * tokens * 2 * window
    assert sizes.largest <= 2 * qkv[0].numel() < tokens**2 / 30


def test_a_softcap_never_holds_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, heads, block = 1024, 4, 64
    monkeypatch.setattr(sdpa, "QUERY_BLOCK", block)
    qkv = [x.detach().float().requires_grad_() for x in inputs(heads, 2, 8, 8, tokens)]
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(*qkv, Scoring(0.4, None, 1.5), None).sum().backward()
    assert sizes.largest == 2 * heads * block * tokens  # one block's scores, of both rows
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept.clear()
        attend(*qkv, Scoring(0.4, None, 1.5), None)
    assert sum(kept) < 4 * sum(x.numel() for x in qkv)


def test_a_document_shorter_than_its_window_is_one_causal_call() -> None:
    qkv = inputs(2, 2, 8, 8)
    with Sizes() as sizes:
        attend(*qkv, Scoring(0.4, TOKENS), None)
    assert sizes.pairs == 2 * TOKENS**2


@pytest.mark.parametrize(("d", "e"), [(12, 8), (8, 12)])
def test_values_of_another_width_bring_no_scores_into_being(d: int, e: int) -> None:
    tokens = 512
    qkv = inputs(2, 2, d, e, tokens)
    with Sizes() as sizes:
        attend(*qkv, Scoring(0.4), None).sum().backward()
    assert sizes.largest <= 2 * tokens * 2 * 12 < tokens**2


def test_in_bf16_scores_are_capped_and_normalised_in_fp32() -> None:
    qkv = [x.detach().bfloat16() for x in inputs(4, 2, 8, 8)]
    out = attend(*qkv, Scoring(0.4, 6, 1.5), None)
    expected = textbook(*(x.double() for x in qkv), Scoring(0.4, 6, 1.5), None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2**-6)
