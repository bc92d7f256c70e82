"""Law 1 holds across devices: a GPU computes what a CPU computes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from architectures import MODELS, PIECES
from law1 import SEED, STEPS, check, global_batch, spread, truth
from torch._dynamo.utils import counters

from moray.model import Decoder, initialise
from moray.model.objective import MicroBatch
from moray.parallel.compiled import compile_layers
from moray.parallel.layout import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ALL = {**MODELS, **{name: config for name, (config, _) in PIECES.items()}}
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=GPU)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ALL)
def test_in_fp64_to_ten_digits(name: str) -> None:
    found = spread(ALL[name], Layout(dp_shard=1), torch.float64, device=GPU)
    assert found
    check(found, truth(ALL[name], torch.float64), torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_in_bf16_near_fp32(name: str) -> None:
    """The kernels that training uses: grouped products, attention over documents in one call."""
    expected = truth(ALL[name], torch.float32)
    found = spread(ALL[name], Layout(dp_shard=1), torch.float32, torch.bfloat16, GPU)
    assert found
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.03)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.1)


@pytest.mark.parametrize("name", ["dense", "moe-softmax", "moe-deepseek"])
def test_compiled_layers_in_bf16_near_fp32(name: str) -> None:
    expected = truth(ALL[name], torch.float32)
    layout = Layout(dp_shard=1)
    found = spread(ALL[name], layout, torch.float32, torch.bfloat16, GPU, 1, "none", "inductor")
    assert found
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.03)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.1)


@pytest.mark.parametrize("name", ["dense", "moe-softmax"])
def test_a_compiled_layer_is_one_graph(name: str) -> None:
    """Attention in one kernel for all documents, and experts that lose no row, are parts of it."""
    torch._dynamo.reset()
    decoder = Decoder(ALL[name]).to(GPU, torch.bfloat16)
    initialise(decoder, SEED)
    compile_layers(decoder, "cuda", torch.bfloat16, backend="aot_eager")
    counters.clear()
    for step in range(STEPS):
        batch = MicroBatch.of(*global_batch(step).values(), GPU)
        decoder.loss(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents).cross_entropy.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
