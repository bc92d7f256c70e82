"""Chunked log-probabilities and their gradient against torch's log_softmax, and against another chunking."""

import pytest
import torch
from torch import Tensor

from moray.model import Decoder, ModelConfig, initialise, loss
from moray.model.logprobs import token_logprobs
from moray.model.loss import IGNORED, Head, WholeVocabulary, soft_cap

D, V = 12, 40


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets, and what a loss makes of each token's log-probability."""
    generator = torch.Generator().manual_seed(tokens)
    x, w, b = (
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((tokens, D), (V, D), (V,))
    )
    weights = torch.randn(tokens, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return x, w, b, torch.randint(V, (tokens,), generator=generator), weights


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 8), (9, 8), (32, 8), (33, 8), (33, 1024)])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.6), (2.0, 1.0), (2.0, 1.7)])
def test_values_and_gradients_equal_torch(
    monkeypatch: pytest.MonkeyPatch, tokens: int, chunk: int, softcap: float | None, temperature: float
) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    x, w, b, targets, weights = inputs(tokens)
    ours = token_logprobs(x, targets, Head(w, b, softcap, 0.0, WholeVocabulary()), temperature)
    logits = x @ w.T + b
    logits = logits if softcap is None else soft_cap(logits, softcap)
    truth = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours @ weights, [x, w, b]), torch.autograd.grad(truth @ weights, [x, w, b]), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_no_tokens_have_gradients_of_0() -> None:
    x, w, b, targets, _ = inputs(5)
    nothing = token_logprobs(x[:0], targets[:0], Head(w, b, None, 0.0, WholeVocabulary()))
    assert nothing.shape == (0,)
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing.sum(), [x, w, b]))


def test_a_frozen_head_has_no_gradient() -> None:
    x, w, _, targets, weights = inputs(9)
    ours = token_logprobs(x, targets, Head(w.detach(), None, None, 0.0, WholeVocabulary()))
    (found,) = torch.autograd.grad(ours @ weights, [x])
    truth = (x @ w.detach().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, torch.autograd.grad(truth @ weights, [x])[0], rtol=1e-12, atol=1e-12)


def test_in_bf16_they_are_fp32_and_their_gradients_bf16() -> None:
    x, w, _, targets, weights = inputs(5000, torch.bfloat16)
    ours = token_logprobs(x, targets, Head(w, None, None, 0.0, WholeVocabulary()))
    truth = (x.double() @ w.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=0.1)
    mine, others = (torch.autograd.grad(y @ weights.to(y.dtype), [x, w]) for y in (ours, truth))
    for one, other in zip(mine, others, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(
    "changes", [{}, {"tied_embeddings": True}, {"final_softcap": 5.0, "head_bias": True, "tied_embeddings": False}]
)
def test_of_a_decoder_they_are_those_of_its_logits(changes: dict[str, object]) -> None:
    """Ignored targets are 0 and have no gradient; the others those of log_softmax."""
    config = ModelConfig.preset("demo-dense").but(n_layers=2, vocab_size=64, **changes)
    decoder = Decoder(config).double()
    initialise(decoder, 0)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(64, (3, 20), generator=generator) for _ in range(2))
    targets[0, :15], targets[2] = IGNORED, IGNORED
    documents = (torch.arange(20) // 7).expand(3, 20)
    positions = (torch.arange(20) % 7).expand(3, 20)
    ours = decoder.logprobs(tokens, targets, positions, documents, temperature=0.7)
    logp = (decoder(tokens, positions, documents) / 0.7).log_softmax(-1)
    truth = torch.where(targets == IGNORED, 0, logp.gather(2, targets.clamp(min=0)[..., None])[..., 0])
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    weights = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), list(decoder.parameters())),
        torch.autograd.grad((truth * weights).sum(), list(decoder.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
