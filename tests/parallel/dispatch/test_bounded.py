"""Where capacity bounds what experts get, shapes are known: what is computed is the same, and no host waits."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from dispatched import CONFIG, FOUR, GATHERED, TWO_LEVELS, computed, layer_of, on_rank
from pool import Pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moray.model import ModelConfig
from moray.model.context import Context, Documents
from moray.model.moe import dispatch
from moray.model.moe.layer import MoE
from moray.model.moe.router import AccurateLinear, Router
from moray.parallel.dispatch import bounded
from moray.parallel.dispatch.dispatcher import ExpertDispatcher
from moray.parallel.layout import Layout
from moray.parallel.tensor import TokenSlices

FULL = CONFIG.but(moe={"capacity_factor": 0.5})


def never(_: torch.device) -> bool:
    return False


def as_on_a_gpu(*arguments: Any) -> tuple[dict[str, Tensor], list[float]]:
    """What a rank computes where a device is asked for no number; experts on CPUs ask for theirs all the same."""
    with mock.patch.multiple(dispatch, may_wait=never), mock.patch.multiple(bounded, may_wait=never):
        return on_rank(*arguments)


@pytest.mark.parametrize("layout", [FOUR, TWO_LEVELS, GATHERED], ids=str)
@pytest.mark.parametrize("factor", [0.25, 0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_one_process_does(pool: Pool, dtype: torch.dtype, layout: Layout, factor: float) -> None:
    """In fp64, too, as whose sums CPUs end the last row like CUDA's kernel: with all that stands behind it."""
    config = CONFIG.but(moe={"capacity_factor": factor})
    found = pool.run(as_on_a_gpu, 4, config, layout, dtype, dtype)
    total: dict[str, Any] = {}
    for rank, (of_rank, _) in enumerate(found):
        expected = computed(layer_of(config, dtype), rank, dtype)
        for name in ("out", "x", "router.linear.weight"):
            torch.testing.assert_close(of_rank[name], expected[name], rtol=1e-4, atol=1e-4)
        for name, gradient in expected.items():
            if name.startswith("experts"):
                total[name] = total.get(name, 0) + gradient
    for name, gradient in total.items():
        parts = [of_rank[name] for of_rank, _ in found]
        torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-4, atol=1e-4)


def test_as_many_rows_travel_as_there_is_room_for(pool: Pool) -> None:
    """Four experts a rank, of which each takes ceil(0.25 * 5 * 16 / 16) = 2 tokens of each of two sequences."""
    found = pool.run(as_on_a_gpu, 4, CONFIG.but(moe={"capacity_factor": 0.25}), FOUR, torch.float32, torch.float32)
    assert [rows for _, (rows, _) in found] == [3 * 4 * 2 * 2] * 4


def waits_on_a_gpu(config: ModelConfig, layout: Layout) -> str:
    """Forward and backward on tensors that hold nothing: whoever asks them for a number is told so. "": nobody has."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    groups = [dist.new_group([0, 2]), dist.new_group([0, 1])] if layout.ep_nodes > 1 else [dist.group.WORLD]
    meshes = Layout(dp_shard=4).meshes("cpu")
    with torch.device("meta"):
        layer = MoE(config, 0)
    with FakeTensorMode(), mock.patch.multiple(dispatch, may_wait=never), mock.patch.multiple(bounded, may_wait=never):
        for module in layer.modules():
            dtype = torch.float32 if isinstance(module, AccurateLinear | Router) else torch.bfloat16
            for name, weight in list(module.named_parameters(recurse=False)):
                held = (weight.shape[0] // 4, *weight.shape[1:]) if module is layer.experts else weight.shape
                setattr(module, name, torch.nn.Parameter(torch.empty(held, dtype=dtype)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        layer.dispatcher = ExpertDispatcher(TokenSlices(meshes.tp), groups, layout.dispatcher, torch.bfloat16)
        x_BTD = torch.empty(2, 16, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        documents = Documents(None, torch.ones(2, 16, dtype=torch.bool))
        try:
            out_BTD, _ = layer(x_BTD, Context(None, documents))
            out_BTD.sum().backward()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("layout", [FOUR, TWO_LEVELS, GATHERED], ids=str)
def test_no_host_waits_for_a_gpu(pool: Pool, layout: Layout) -> None:
    assert pool.run(waits_on_a_gpu, 4, FULL, layout)[0] == ""


def test_the_same_would_tell_of_a_wait(pool: Pool) -> None:
    """Without capacity, sizes are asked for: the one wait of a layer."""
    assert "DataDependentOutputException" in pool.run(waits_on_a_gpu, 4, CONFIG, FOUR)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_one_device_what_is_dropped_touches_no_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no expert computes hold anything, here NaN."""
    found = []
    for has_to_ask in (True, False):
        monkeypatch.setattr(dispatch, "may_wait", lambda _, can=has_to_ask: can)
        layer = layer_of(CONFIG.but(moe={"capacity_factor": 0.25}), dtype)
        made = layer.experts.forward

        def experts(rows_MD: Tensor, counts_E: Tensor, made: Any = made) -> Tensor:
            out_MD = made(rows_MD, counts_E)
            behind = torch.arange(len(out_MD)) >= counts_E.sum()
            return out_MD.masked_fill(behind[:, None], torch.nan)

        layer.experts.forward = experts  # type: ignore[method-assign]
        found.append(computed(layer, 0, dtype))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)
