"""A MoE layer on a process alone, and on ranks that share its experts."""

import torch
import torch.distributed as dist
from torch import Tensor

from moray.model import ModelConfig
from moray.model.context import Context, Documents
from moray.model.moe.layer import MoE
from moray.parallel.dispatch.dispatcher import ExpertDispatcher
from moray.parallel.layout import Layout
from moray.parallel.tensor import TokenSlices

SEQUENCES, TOKENS, WIDTH = 2, 16, 64
CONFIG = ModelConfig(
    n_layers=1,
    d_model=WIDTH,
    vocab_size=64,
    max_seq_len=TOKENS,
    attention={"n_heads": 2, "n_kv_heads": 2},
    ffn={"width": 64},
    moe={"n_experts": 16, "top_k": 5, "expert_width": 32, "n_shared": 1},
)
FOUR = Layout(dp_shard=4, ep=4)
TWO_LEVELS = Layout(dp_shard=4, ep=4, ep_nodes=2)
GATHERED = Layout(dp_shard=4, ep=4, dispatcher="allgather")
LIMITED = CONFIG.but(moe={"n_groups": 4, "top_k_groups": 2, "group_score": "max"})


def layer_of(config: ModelConfig, dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    layer = MoE(config, 0).to(dtype)
    layer.router.float()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return layer


def inputs(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rank's tokens, and what it wants to know the gradient of: their sum weighted by these."""
    generator = torch.Generator().manual_seed(rank)
    x_BTD, w_BTD = torch.randn(2, SEQUENCES, TOKENS, WIDTH, generator=generator).to(dtype).unbind()
    return x_BTD, w_BTD


def context() -> Context:
    documents_BT = torch.zeros(SEQUENCES, TOKENS, dtype=torch.int64)
    return Context(None, Documents.of(documents_BT, torch.device("cpu")))


def computed(layer: MoE, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of a rank's tokens, and which experts they chose."""
    x_BTD, w_BTD = inputs(rank, dtype)
    out_BTD, _ = layer(x_BTD.requires_grad_(), context())
    (out_BTD * w_BTD).sum().backward()
    chosen_BTK = layer.router(x_BTD).chosen_BTK
    gradients = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    return {"out": out_BTD.detach(), "x": x_BTD.grad, "chosen": chosen_BTK, **gradients}


def on_rank(
    config: ModelConfig, layout: Layout, dtype: torch.dtype, wire: torch.dtype
) -> tuple[dict[str, Tensor], list[float]]:
    """The same on a rank that has a quarter of the experts; and the rows and bytes that came to it."""
    meshes, layer = layout.meshes("cpu"), layer_of(config, dtype)
    layer.dispatcher = ExpertDispatcher(TokenSlices(meshes.tp), meshes.hops, layout.dispatcher, wire)
    place, ranks = meshes.ep.get_local_rank(), layout.ep
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(ranks)[place]))
    found = computed(layer, dist.get_rank(), dtype)
    return found, layer.dispatcher.traffic()[:, place].tolist()
