"""Compiled layers compute what layers compute; how they are spread makes no difference (test_parity.py)."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from architectures import MODELS
from law1 import CPU
from torch import Tensor
from torch._dynamo.utils import counters

from moray import UserError
from moray.model import Decoder, Documents, ModelConfig, Randomness, initialise
from moray.model.attention import sdpa
from moray.model.moe import experts
from moray.model.moe.grouped import grouped_mm_linear
from moray.parallel.compiled import check_compiler, compile_layers

HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
SMALL = {"n_layers": 2, "d_model": 32, "vocab_size": 64, "attention": HEADS, "ffn": {"width": 48}}
MOE = {"n_experts": 4, "top_k": 2, "expert_width": 16}


def batch(step: int) -> dict[str, Any]:
    """Two rows, packed with other documents in every step."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT, targets_BT = torch.randint(64, (2, 2, 24), generator=generator)
    documents_BT = torch.randint(step + 2, (2, 24), generator=generator).sort(-1).values
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "documents_BT": Documents.of(documents_BT, CPU),
        "randomness": Randomness(0, step, torch.arange(2)),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": HEADS | {"window": 8}},
        {"attention": HEADS | {"softcap": 5.0}},
        {"ffn": {"width": 48, "conv_width": 3}},
        {"moe": MOE | {"capacity_factor": 1.0}},
        {"moe": MOE | {"noisy": True, "second_expert": "random"}},
    ],
    ids=["window", "softcap", "convolution", "capacity", "second expert"],
)
def test_what_a_batch_holds_is_no_reason_to_compile_again(changes: dict[str, object]) -> None:
    graphs = graphs_of_a_comparison(config_of(changes), "aot_eager", steps=4)
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, f"graphs after each batch: {graphs}"


def test_what_inductor_makes_of_layers_computes_the_same() -> None:
    assert graphs_of_a_comparison(config_of({"moe": MOE, "n_layers": 1}), "inductor", steps=1)[0] > 0


def config_of(changes: dict[str, Any]) -> ModelConfig:
    return ModelConfig.preset("minimind-3-moe" if "moe" in changes else "minimind-3", **{**SMALL, **changes})


def graphs_of_a_comparison(config: ModelConfig, backend: str, steps: int) -> list[int]:
    """Losses, gradients and counts of compiled layers are those of layers; returns the graphs after each step."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = Decoder(config).double(), Decoder(config).double()
    for decoder in (plain, compiled):
        initialise(decoder, 0)
    compile_layers(compiled, "cpu", torch.float64, backend=backend)
    graphs = []
    for step in range(steps):
        losses = [decoder.loss(**batch(step)) for decoder in (plain, compiled)]
        for loss in losses:
            (loss.cross_entropy + loss.auxiliary).backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    counted = [[buffer for buffer in decoder.buffers() if buffer.dtype == torch.int64] for decoder in (plain, compiled)]
    torch.testing.assert_close(counted[1], counted[0])
    for (name, weight), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return graphs


def test_no_kind_of_layer_and_no_size_of_batch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kinds of layers, three sizes, with gradients and without: and no round after two needs more."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    attention = {**HEADS, "window": 8, "pattern": ("local", "global")}
    changes = {**SMALL, "n_layers": 4, "attention": attention, "moe": {**MOE, "n_dense_layers": 2}}
    decoder = Decoder(ModelConfig.preset("minimind-3-moe", **changes)).double()
    initialise(decoder, 0)
    compile_layers(decoder, "cpu", torch.float64, backend="aot_eager")
    graphs = []
    for _ in range(3):
        for rows, width in ((2, 24), (1, 24), (2, 12)):
            inputs = {name: x[:rows, :width] for name, x in batch(1).items() if isinstance(x, Tensor)}
            decoder.loss(**inputs).cross_entropy.backward()
            with torch.no_grad():
                decoder.loss(**inputs)
        graphs.append(counters["stats"]["unique_graphs"])
    # Where MoE layers were cut, a dense layer may be, too, from the second time on.
    assert 8 < graphs[0] <= graphs[1] == graphs[2]


@pytest.mark.parametrize(("name", "kinds"), [("dense", 1), ("moe-softmax", 1), ("moe-deepseek", 2)])
def test_on_a_gpu_a_layer_is_one_graph(name: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured here with the kernels of GPUs, and not run: attention to all documents, grouped products."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(sdpa, "_suits_flash", lambda *_: True)
    monkeypatch.setattr(experts, "grouped_linear", grouped_mm_linear)
    graphs: list[set[str]] = []

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        (outputs,) = graph.graph.find_nodes(op="output")
        made = [node.meta["example_value"] for node in outputs.args[0]]
        return lambda *_: tuple(torch.zeros(x.shape, dtype=x.dtype, requires_grad=x.requires_grad) for x in made)

    decoder = Decoder(MODELS[name]).bfloat16()
    initialise(decoder, 0)
    compile_layers(decoder, "cuda", torch.bfloat16, backend=capture)
    for step in range(3):
        inputs = batch(step)
        lengths, valid_BT = inputs["documents_BT"].lengths, inputs["documents_BT"].valid_BT
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        decoder.loss(**inputs | {"documents_BT": Documents(lengths, valid_BT, edges)})
    assert not counters["graph_break"]
    assert len(graphs) == kinds
    assert all(any("_varlen_attn" in target for target in targets) for targets in graphs)
    assert ("moe" in name) == any("grouped_mm" in target for target in graphs[-1])


def test_without_a_compiler_there_is_a_word_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"^train.compile=true, but \S+ has no C\+\+ compiler no-such-compiler: install"
    ):
        check_compiler()
