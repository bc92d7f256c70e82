"""The whole layer against a dense loop over all experts: every kind of expert, shared ones, their gate."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moray.model import Decoder, Documents, ModelConfig
from moray.model.context import Context
from moray.model.moe.balance import auxiliary_loss
from moray.model.moe.dispatch import LocalDispatcher, assigned
from moray.model.moe.layer import MoE


def layer_of(ffn: dict[str, object] | None = None, **moe: object) -> MoE:
    moe = {"n_experts": 8, "top_k": 3, "expert_width": 16, "score": "sigmoid", **moe}
    layer = MoE(ModelConfig(d_model=24, ffn=ffn or {}, moe=moe), 0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    return layer


def everything(batch: int, tokens: int) -> Context:
    return Context(None, Documents(None, torch.ones(batch, tokens, dtype=torch.bool)))


def dense_loop(layer: MoE, x_BTD: Tensor, context: Context) -> Tensor:
    """Every expert for every token, weighted with 0 where it was not chosen: what sparse dispatch saves."""
    experts, routing = layer.experts, layer.router(x_BTD)
    out = torch.zeros_like(x_BTD)
    for e in range(layer.moe.n_experts):
        up, down = x_BTD @ experts.up_EFD[e].T, experts.down_EDF[e].T
        if experts.up_bias_EF is not None:
            up = up + experts.up_bias_EF[e]
        if experts.gate_EFD is None:
            hidden = layer.experts.activation(up)
        else:
            gate = x_BTD @ experts.gate_EFD[e].T
            if experts.gate_bias_EF is not None:
                gate = gate + experts.gate_bias_EF[e]
            hidden = layer.experts.activation(gate) * up
        result = hidden @ down
        if experts.down_bias_ED is not None:
            result = result + experts.down_bias_ED[e]
        out = out + (routing.gates_BTK * (routing.chosen_BTK == e)).sum(-1, keepdim=True) * result
    if layer.shared is not None:
        shared = layer.shared(x_BTD, context)
        out = out + (shared if layer.shared_gate is None else shared * (x_BTD @ layer.shared_gate.weight.T).sigmoid())
    return out


CASES = {
    "top-1": {"top_k": 1},
    "top-3": {},
    "shared": {"n_shared": 2},
    "shared with a gate": {"n_shared": 1, "shared_gate": True},
    "GELU without a gate": {"ffn": {"activation": "gelu", "gated": False}},
    "ReLU without a gate, biases": {"ffn": {"activation": "relu", "gated": False, "bias": True}},
    "GeGLU, biases": {"ffn": {"activation": "gelu_tanh", "bias": True}},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_the_layer_equals_a_dense_loop_over_all_experts(fields: dict) -> None:
    layer = layer_of(**fields)
    layer.router.bias_E[[2, 5]] = -10.0  # two experts that no token chooses
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 10, 24, dtype=torch.float64, generator=generator).requires_grad_()
    direction = torch.randn(3, 10, 24, dtype=torch.float64, generator=generator)
    context = everything(3, 10)

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()]))

    out, expected = layer(x, context)[0], dense_loop(layer, x, context)
    assert not {2, 5} & set(layer.router(x).chosen_BTK.flatten().tolist())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for ours, truth in zip(gradients(out), gradients(expected), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers below 5 keeps experts apart")
def test_a_gate_on_the_shared_expert_is_qwen2_moes() -> None:
    config = Qwen2MoeConfig(
        hidden_size=24, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16,
        shared_expert_intermediate_size=32, norm_topk_prob=False,
    )  # fmt: skip
    theirs = Qwen2MoeSparseMoeBlock(config).double()
    layer = layer_of(n_shared=2, shared_gate=True, score="softmax", normalise_gates=False)
    assert layer.shared is not None
    assert layer.shared.gate is not None
    assert layer.shared_gate is not None
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.linear.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat((layer.experts.gate_EFD, layer.experts.up_EFD), 1))
        theirs.experts.down_proj.copy_(layer.experts.down_EDF)
        theirs.shared_expert.gate_proj.weight.copy_(layer.shared.gate.weight)
        theirs.shared_expert.up_proj.weight.copy_(layer.shared.up.weight)
        theirs.shared_expert.down_proj.weight.copy_(layer.shared.down.weight)
        theirs.shared_expert_gate.weight.copy_(layer.shared_gate.weight)
    x = torch.randn(2, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # Their softmax is fp32 whatever the dtype.
    torch.testing.assert_close(layer(x, everything(2, 10))[0], expected, rtol=0, atol=1e-5)


def test_all_scores_underflowing_gives_no_nan() -> None:
    layer = layer_of(balance_loss=1.0, importance_loss=1.0).float()
    with torch.no_grad():
        layer.router.linear.weight.fill_(-1000)
    out, statistics = layer(torch.ones(1, 3, 24), everything(1, 3))
    assert statistics is not None
    auxiliary = auxiliary_loss([statistics], layer.moe)
    (out.sum() * 1.0 + auxiliary).backward()
    assert out.isfinite().all()
    assert auxiliary.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


def test_dispatch_sorts_by_expert_and_combine_brings_back() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    gates = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    dispatcher = LocalDispatcher()
    sent = dispatcher.send(x, assigned(chosen, None, gates, 4), 4)
    rows, counts = dispatcher.receive(sent)
    assert rows[:, 0].tolist() == [1, 2, 1, 3, 2, 3], "in the order of experts, and of tokens within an expert"
    assert counts.tolist() == [2, 0, 2, 2]
    # Expert e multiplies by 10^e: rows of experts 0, 0, 2, 2, 3, 3.
    results = rows * torch.tensor([1.0, 1, 100, 100, 1000, 1000])[:, None]
    expected = [0.5 * 100 + 0.25 * 1, 1.0 * 2, 0.1 * 300 + 0.2 * 3000]
    assert dispatcher.combine(results, sent)[:, 0].tolist() == pytest.approx(expected)


def test_dispatch_sends_no_dropped_row() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    kept = torch.tensor([[True, True], [False, False], [False, True]])
    gates = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    dispatcher = LocalDispatcher()
    sent = dispatcher.send(x, assigned(chosen, kept, gates, 4), 4)
    rows, counts = dispatcher.receive(sent)
    assert rows[:, 0].tolist() == [1, 1, 3]
    assert counts.tolist() == [1, 0, 1, 1]
    results = rows * torch.tensor([1.0, 100, 1000])[:, None]
    assert dispatcher.combine(results, sent)[:, 0].tolist() == pytest.approx([0.5 * 100 + 0.25, 0, 0.2 * 3000])


def test_which_layers_have_experts() -> None:
    def layers(n: int, **moe: int) -> list[int]:
        config = ModelConfig(n_layers=n, moe={"n_experts": 2, "expert_width": 8, **moe})
        return [layer for layer in range(n) if config.is_moe_layer(layer)]

    assert layers(4) == [0, 1, 2, 3]
    assert layers(6, every=2) == [1, 3, 5], "Switch, GLaM"
    assert layers(5, n_dense_layers=1) == [1, 2, 3, 4], "DeepSeek-V2"


def test_experts_use_the_configs_activation() -> None:
    """Squared ReLU by hand, for one expert that copies its input."""
    layer = layer_of(ffn={"activation": "relu2", "gated": False}, n_experts=1, top_k=1, expert_width=24)
    with torch.no_grad():
        layer.experts.up_EFD[0].copy_(torch.eye(24))
        layer.experts.down_EDF[0].copy_(torch.eye(24))
    x = torch.randn(1, 4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x, everything(1, 4))[0], F.relu(x) ** 2, rtol=0, atol=1e-12)


def test_experts_may_lack_the_gate_of_dense_layers() -> None:
    """GLaM: a dense layer has three matrices, an expert two."""
    decoder = Decoder(ModelConfig.preset("demo-moe", moe={"gated": False}))
    dense, sparse = decoder.blocks[0].ffn, decoder.blocks[1].ffn
    assert dense.gate is not None
    assert sparse.experts.gate_EFD is None
    assert sparse.shared.gate is None
