"""MiniMind in its own format. transformers has no class of it: its experts are written here from their formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_parity import CHECKS, Case, Pair, fixture, randomise
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from moray.model.hf import load_pretrained, read_config, save_pretrained


class Experts(nn.Module):
    """y = sum of the shared experts + sum over the K best experts i of g_i expert_i(x), g = softmax(W x) / its sum.

    Its loss is alpha * sum_i f_i P_i: f_i = E / (K T) times the tokens that chose i, P_i their mean score.
    """

    def __init__(self, config: Any, balance: list[Tensor]) -> None:
        super().__init__()
        self.config, self.balance = config, balance
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.n_shared_experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        experts, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        scores_BTE = self.gate(x_BTD).softmax(-1)
        best_BTK, chosen_BTK = scores_BTE.topk(k)
        if k > 1 and self.config.norm_topk_prob:
            best_BTK = best_BTK / best_BTK.sum(-1, keepdim=True)
        gates_BTE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, best_BTK)
        taken_BTE = F.one_hot(chosen_BTK, experts).sum(2).float()
        # Of each sequence, or of the batch as if it were one.
        tokens = (1,) if self.config.seq_aux else (0, 1)
        losses = (experts / k * taken_BTE.mean(tokens) * scores_BTE.mean(tokens)).sum(-1)
        self.balance.append(self.config.aux_loss_alpha * losses.mean())
        routed_BTD = sum(gates_BTE[..., i, None] * expert(x_BTD) for i, expert in enumerate(self.experts))
        return routed_BTD + sum(expert(x_BTD) for expert in self.shared_experts)


class MiniMindConfig(transformers.LlamaConfig):
    model_type = "minimind"


class MiniMindForCausalLM(transformers.LlamaForCausalLM):
    config_class = MiniMindConfig

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config)
        self.balance: list[Tensor] = []
        for layer in self.model.layers:
            layer.mlp = Experts(config, self.balance)

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        if out.loss is not None:
            out.loss = out.loss + sum(self.balance)
        self.balance.clear()
        return out


transformers.AutoConfig.register("minimind", MiniMindConfig)
transformers.AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM)

ROPE = {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "use_moe": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.1,
    "seq_aux": True,
    "norm_topk_prob": True,
    "inference_rope_scaling": False,
    "flash_attn": True,
    "dropout": 0.0,
}


def case(note: str = "", **changes: object) -> Case:
    return Case("MiniMind-2-MoE", "", {**SIZES, **ROPE, **EXPERTS, **changes}, note, config_class=MiniMindConfig)


pair = fixture([case(), case("top-1, no shared expert", num_experts_per_tok=1, n_shared_experts=0, seq_aux=False)])


@pytest.mark.parametrize("check", CHECKS)
def test_parity(pair: Pair, check: Callable[[Pair], None]) -> None:
    check(pair)


PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "minimind2": ("Llama", {}, {"n_routed_experts": 4, "use_moe": False, "rope_scaling": None}),
    "minimind2, stretched": (
        "Llama",
        {"max_position_embeddings": 32768, "factor": 16.0, "original_max_position_embeddings": 2048},
        {"n_routed_experts": 4, "use_moe": False, "inference_rope_scaling": True, "rope_scaling": None},
    ),
    "minimind-3": ("Qwen3", {"head_dim": 24}, {"num_experts": 4, "use_moe": False, "moe_intermediate_size": 176}),
    "minimind-3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 176,
            "norm_topk_prob": True,
        },
        {"use_moe": True, "router_aux_loss_coef": 5e-4},
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_what_minimind_converts_to_computes_the_same(name: str, tmp_path: Path) -> None:
    """Its converter writes these as Llama, Qwen3 and Qwen3-MoE, with the same names: only config.json differs."""
    torch.manual_seed(0)
    prefix, peer, own = PEERS[name]
    rope: dict[str, Any] = dict(ROPE)
    scaling = {key: peer[key] for key in ("factor", "original_max_position_embeddings") if key in peer}
    if scaling:
        scaling |= {"rope_type": "yarn", "attention_factor": 1.0}
        rope = {"rope_theta": 1e6, "rope_scaling": scaling, "rope_parameters": {"rope_theta": 1e6, **scaling}}
    sizes = {key: value for key, value in peer.items() if key not in scaling}
    config = getattr(transformers, f"{prefix}Config")(vocab_size=96, **{**SIZES, **sizes}, **rope)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(theirs, 0.15)
    theirs.save_pretrained(tmp_path / "theirs")
    values = {
        "model_type": "minimind",
        "vocab_size": 96,
        "hidden_act": "silu",
        **SIZES,
        "rope_theta": 1e6,
        **sizes,
        **own,
    }
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))
    ours = load_pretrained(tmp_path / "theirs")
    tokens_BT = torch.randint(96, (2, 40))
    with torch.no_grad():
        expected_BTV = theirs(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT), expected_BTV, rtol=1e-5, atol=1e-5)
        save_pretrained(ours, tmp_path / "ours")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert type(loaded) is type(theirs)
        torch.testing.assert_close(loaded(tokens_BT).logits, expected_BTV, rtol=1e-5, atol=1e-5)


def test_balance_of_the_third_generation(tmp_path: Path) -> None:
    """coef * E * sum over the K choices of sum_i share_ki P_i is coef * K times the mean over the choices."""
    values = {**SIZES, "model_type": "minimind", "vocab_size": 96, "use_moe": True, "num_experts": 4, "head_dim": 24}
    values |= {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "router_aux_loss_coef": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(values))
    moe = read_config(tmp_path).moe
    assert moe
    assert (moe.balance_loss, moe.balance_over) == (0.5, "layer")


@pytest.mark.parametrize(("marker", "kv_heads"), [("n_routed_experts", 2), ("num_experts", 4)])
def test_key_heads_are_its_authors_where_the_file_is_silent(tmp_path: Path, marker: str, kv_heads: int) -> None:
    """`num_key_value_heads: int = 2` of the second generation, `kwargs.get("num_key_value_heads", 4)` of the third."""
    values = {**SIZES, "model_type": "minimind", "vocab_size": 96, marker: 4, "hidden_size": 96}
    values["num_attention_heads"] = 8
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if name != "num_key_value_heads"})
    )
    attention = read_config(tmp_path).attention
    assert (attention.n_kv_heads, attention.head_dim) == (kv_heads, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "inference_rope_scaling=False"),
        (
            {
                "inference_rope_scaling": True,
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "yarn", "factor": 4},
            },
            "16",
        ),
        ({"use_engram": True}, "use_engram=True"),
        ({"n_routed_experts": 2, "num_experts_per_tok": 3}, "top_k=3"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"model_type": "minimind", "vocab_size": 96, "hidden_act": "silu", **SIZES, **EXPERTS, **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_config_of_neither_generation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimind", **SIZES}))
    with pytest.raises(ValueError, match="minimind with n_routed_experts, minimind with num_experts"):
        read_config(tmp_path)
