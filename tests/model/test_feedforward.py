"""The feed-forward network against closed forms, transformers' activations and its MLPs."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from moray.model.attention.documents import Documents
from moray.model.config.parts import FeedForwardConfig
from moray.model.context import Context
from moray.model.feedforward import FeedForward, activation

CLOSED_FORMS = {
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}
THEIR_NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def context_of(x_BTD: Tensor) -> Context:
    return Context(None, Documents(None, torch.ones(x_BTD.shape[:2], dtype=torch.bool)))


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.double()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_activations_are_what_their_names_say(name: str) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    ours = activation(name)(x)
    truth = torch.tensor([CLOSED_FORMS[name](value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours, ACT2FN[THEIR_NAMES.get(name, name)](x), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_equals_the_mlp_of_llama(bias: bool) -> None:
    peer = filled(LlamaMLP(LlamaConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20, mlp_bias=bias)))
    ours = FeedForward(12, 20, FeedForwardConfig(width=20, bias=bias)).double()
    ours.load_state_dict({name.replace("_proj", ""): value for name, value in peer.state_dict().items()})
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x, context_of(x)), peer(x), rtol=0, atol=0)


def test_ungated_equals_the_mlp_of_gpt_neox_and_has_no_gate() -> None:
    peer = filled(GPTNeoXMLP(GPTNeoXConfig(hidden_size=12, num_attention_heads=2, intermediate_size=48)))
    ours = FeedForward(12, 48, FeedForwardConfig(width=48, activation="gelu", gated=False, bias=True)).double()
    names = {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}
    ours.load_state_dict(
        {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in peer.state_dict().items()}
    )
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x, context_of(x)), peer(x), rtol=0, atol=0)


def test_shared_experts_mix_no_tokens() -> None:
    for change in ({"conv_width": 3}, {"adapter_rank": 2}):
        config = FeedForwardConfig(width=20, **change)
        assert {name for name, _ in FeedForward(12, 20, config).named_children()} == {"gate", "up", "down"}
        assert len(list(FeedForward(12, 20, config, layer=0).named_children())) == 4


class Counted(TorchDispatchMode):
    """The operations that run, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "view" not in func.name() and not func.is_view:
            self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_swiglu_is_three_products_and_two_passes_and_no_more() -> None:
    ffn = filled(FeedForward(12, 20, FeedForwardConfig(width=20), layer=0))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = context_of(x)
    with torch.no_grad(), Counted() as counted:
        ffn(x, context)
    assert sorted(counted.names) == ["mm", "mm", "mm", "mul.Tensor", "silu"], counted.names
