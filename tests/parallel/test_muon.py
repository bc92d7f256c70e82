"""Muon against the singular values that it is about, torch's own, and one process."""

from typing import Any

import pytest
import torch
from architectures import MODELS
from law1 import CPU, OPTIMIZER, check, plain_adamw, spread, truth
from pool import Pool
from torch import Tensor, nn

from moray.jobs.training.optimizer import build_optimizer, set_learning_rate
from moray.model import Decoder
from moray.parallel.layout import Layout
from moray.parallel.muon import COEFFICIENTS, ITERATIONS, Muon, is_matrix, orthogonalise

MUON = OPTIMIZER.model_copy(update={"kind": "muon"})


def by_singular_values(x_NRC: Tensor) -> Tensor:
    """What the iteration does to each singular value, and to nothing else."""
    u, s, vh = torch.linalg.svd(x_NRC, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    found: Tensor = (u * s[..., None, :]) @ vh
    return found


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (1, 12, 5), (4, 1, 6)])
def test_singular_values_are_brought_near_one_and_vectors_kept(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(x)
    torch.testing.assert_close(found, by_singular_values(x), rtol=1e-9, atol=1e-9)
    assert torch.linalg.svdvals(found).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros_like(x)), torch.zeros_like(x))


def test_five_steps_equal_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((24, 16), (16, 40), (16, 16))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    muon, momenta = Muon(ours, 0.9, None, torch.bfloat16), [torch.zeros_like(weight) for weight in ours]
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        muon.step(momenta, [0.02] * 3, [0.1] * 3)
        peer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class PlainMuon(torch.optim.Optimizer):
    """One matrix after the other, by its singular values; the rest as ever."""

    def __init__(self, decoder: Decoder) -> None:
        named = dict(decoder.named_parameters())
        self.matrices = [weight for name, weight in named.items() if is_matrix(name, weight)]
        self.momenta = [torch.zeros_like(weight) for weight in self.matrices]
        self.rest = plain_adamw(decoder)
        for group in self.rest.param_groups:
            group["params"] = [p for p in group["params"] if not any(p is matrix for matrix in self.matrices)]
        super().__init__(named.values(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.rest.step()
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.mul_(0.95).add_(weight.grad, alpha=0.05)
            ahead = 0.05 * weight.grad + 0.95 * momentum
            for w, x in zip(weight.view(-1, *weight.shape[-2:]), ahead.view(-1, *weight.shape[-2:]), strict=True):
                w.mul_(1 - 1e-3 * 0.1)
                w.sub_(1e-3 * 0.2 * max(w.shape) ** 0.5 * by_singular_values(x[None])[0])


def with_muon(layout: Layout, dtype: torch.dtype, stage: Any, exact: bool = False) -> dict[str, Any] | None:
    return spread(MODELS["moe-deepseek"], layout, dtype, None, CPU, stage, exact=exact, settings=MUON)


LAYOUTS = [
    Layout(dp_shard=1),
    Layout(dp_shard=2),
    Layout(dp_replicate=2, dp_shard=1),
    Layout(dp_shard=1, tp=2),
    Layout(dp_shard=4, ep=2),
    Layout(dp_shard=2, tp=2, ep=4),
    Layout(dp_replicate=2, dp_shard=2, tp=2, ep=2),
]


TRUTH: dict[str, Any] = {}


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_move_matrices_as_one_process_does(pool: Pool, layout: Layout, stage: Any) -> None:
    if not TRUTH:
        TRUTH.update(truth(MODELS["moe-deepseek"], torch.float64, PlainMuon))
    found = pool.run(with_muon, layout.world_size, layout, torch.float64, stage)[0]
    check(found, TRUTH, torch.float64)


def test_in_exact_mode_every_number_of_ranks_computes_the_same_bits(pool: Pool) -> None:
    found = []
    for layout in (Layout(dp_shard=1), Layout(dp_shard=4), Layout(dp_replicate=2, dp_shard=2)):
        found.append(pool.run(with_muon, layout.world_size, layout, torch.float32, 3, True)[0])
    first, *others = found
    for other in others:
        assert other["losses"] == first["losses"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize(
    ("name", "is_muons"),
    [
        ("embedding.weight", False),
        ("head.weight", False),
        ("blocks.1.attention.query.weight", True),
        ("blocks.1.attention_norm.weight", False),
        ("blocks.1.ffn.router.linear.weight", True),
        ("blocks.1.ffn.experts.up_EFD", True),
    ],
)
def test_muon_takes_matrices_within_layers(name: str, is_muons: bool) -> None:
    decoder = Decoder(MODELS["dense-untied" if name.startswith("head") else "moe-deepseek"])
    optimizer = build_optimizer(decoder, MUON)
    weight = dict(decoder.named_parameters())[name]
    (group,) = [group for group in optimizer.param_groups if any(weight is p for p in group["params"])]
    assert group["is_muons"] == is_muons
    assert set(optimizer.state[weight]) == ({"momentum"} if is_muons else {"step", "exp_avg", "exp_avg_sq"})


def test_rates_differ_where_they_are_asked_to() -> None:
    decoder = Decoder(MODELS["dense-untied"])
    scales = {"embedding_lr_scale": 0.5, "router_lr_scale": 0.25, "expert_lr_scale": 2.0}
    for config in (MODELS["dense-untied"], MODELS["moe-deepseek"]):
        decoder = Decoder(config)
        optimizer = build_optimizer(decoder, OPTIMIZER.model_copy(update=scales))
        set_learning_rate(optimizer, 0.1)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, weight in decoder.named_parameters():
            parts = name.split(".")
            is_end = "embedding" in parts or "head" in parts
            scale = 0.5 if is_end else 0.25 if "router" in parts else 2.0 if "experts" in parts else 1.0
            assert rates[id(weight)] == pytest.approx(0.1 * scale), name
