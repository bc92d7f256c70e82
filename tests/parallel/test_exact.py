"""Exact mode: the same bits on every number of data-parallel ranks, and near what one process computes."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from architectures import MODELS
from law1 import check, spread, truth
from pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moray.parallel.exact import PairwiseSum, exact_squares
from moray.parallel.layout import Layout

MODEL = "moe-deepseek"
FAMILIES = {
    "data parallel": [
        Layout(dp_shard=1),
        Layout(dp_shard=2),
        Layout(dp_shard=4),
        Layout(dp_shard=8),
        Layout(dp_replicate=2, dp_shard=1),
        Layout(dp_replicate=2, dp_shard=2),
    ],
    "ep=2": [Layout(dp_shard=2, ep=2), Layout(dp_shard=4, ep=2), Layout(dp_replicate=2, dp_shard=2, ep=2)],
    "tp=2": [Layout(dp_shard=1, tp=2), Layout(dp_shard=2, tp=2), Layout(dp_replicate=2, dp_shard=1, tp=2)],
    "tp=2, ep=4": [Layout(dp_shard=2, tp=2, ep=4), Layout(dp_shard=4, tp=2, ep=4)],
}


def exactly(*arguments: Any) -> dict[str, Any] | None:
    return spread(*arguments, exact=True)


def bits(found: dict[str, Any]) -> dict[str, Any]:
    of = {f"{kind} {name}": x.numpy().tobytes() for kind in ("gradients", "weights") for name, x in found[kind].items()}
    return of | {key: [x.hex() for x in found[key]] for key in ("losses", "norms")}


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_number_of_data_parallel_ranks(
    pool: Pool, family: str, compute_dtype: torch.dtype
) -> None:
    first, *others = FAMILIES[family]
    arguments = (torch.float32, compute_dtype)
    expected = pool.run(exactly, first.world_size, MODELS[MODEL], first, *arguments)[0]
    if compute_dtype == torch.float32:
        check(expected, truth(MODELS[MODEL], torch.float32), torch.float32)
    for layout in others:
        found = pool.run(exactly, layout.world_size, MODELS[MODEL], layout, *arguments)[0]
        differing = [name for name, value in bits(expected).items() if bits(found)[name] != value]
        assert not differing, f"{layout}: {len(differing)} of {len(bits(expected))}, {differing[:5]}"


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_one_process_computes(pool: Pool, name: str) -> None:
    layout = Layout(dp_shard=2)
    check(
        pool.run(exactly, 2, MODELS[name], layout, torch.float64)[0],
        truth(MODELS[name], torch.float64),
        torch.float64,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 16])
def test_neighbours_are_added_first(n: int) -> None:
    leaves = [torch.tensor(x) for x in torch.randn(n).tolist()]

    def branch(first: int, size: int) -> Tensor:
        """Of the whole subtree that begins there, as far as there are leaves."""
        if size == 1:
            return leaves[first]
        half = size // 2
        left = branch(first, half)
        return left if first + half >= n else left + branch(first + half, half)

    tree = PairwiseSum()
    for leaf in leaves:
        tree.add(leaf.clone())
    expected = branch(0, 1 << (n - 1).bit_length())
    assert tree.total().item() == expected.item()


def squares_of(shares: list[Tensor]) -> float:
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    gradients: list[Tensor] = [distribute_tensor(share, mesh, [Shard(0)]) for share in shares]
    assert all(isinstance(gradient, DTensor) for gradient in gradients)
    return exact_squares(gradients)


def test_squares_are_summed_to_the_same_bits_by_any_number_of_ranks(pool: Pool) -> None:
    torch.manual_seed(0)
    gradients = [
        torch.randn(1000, 300) * 10.0 ** torch.randint(-20, 15, (1000, 1)),
        torch.randn(7),
        torch.zeros(5, 5),
        torch.randn(64) * 1e-42,
    ]
    exact = sum(Fraction(x) ** 2 for gradient in gradients for x in gradient.flatten().tolist())
    found = exact_squares(gradients)
    assert found == pytest.approx(float(exact), rel=1e-15)
    for world in (2, 3, 4):
        assert pool.run(squares_of, world, gradients) == [found] * world


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e30, 1e150])
def test_squares_of_any_size(scale: float) -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    assert exact_squares([x]) == pytest.approx(float(sum(Fraction(v) ** 2 for v in x.tolist())), rel=1e-14)


def test_squares_beyond_fp64() -> None:
    assert exact_squares([torch.tensor([1e200], dtype=torch.float64)]) == math.inf


@pytest.mark.parametrize(("bad", "is_expected"), [(math.inf, math.isinf), (math.nan, math.isnan)])
def test_squares_of_what_is_not_finite(bad: float, is_expected: Any) -> None:
    assert is_expected(exact_squares([torch.ones(3), torch.tensor([1.0, bad, -math.inf if bad == math.inf else bad])]))
