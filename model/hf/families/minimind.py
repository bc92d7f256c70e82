"""MiniMind in its own format: https://github.com/jingyaogong/minimind, model/model_minimind.py of both generations.

Its converter writes all but the second generation's experts as Llama, Qwen3 and Qwen3-MoE; so do we.
"""

from typing import Any

from pydantic import ValidationError

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.config.mistakes import in_one_line
from moray.model.config.parts import RopeScaling, merge
from moray.model.hf.deepseek import SEQUENCE_BALANCE
from moray.model.hf.family import Family, Rule
from moray.model.hf.fields import Fields, refused
from moray.model.hf.names import MOE
from moray.model.hf.rope import rope
from moray.model.hf.rules import (
    SILU,
    at,
    balance_loss,
    decoder,
    fixed,
    heads,
    natural_heads,
    ours,
    same,
    translated,
    unused,
)

_ROPE = rope(theta=1e6)
_YARN = RopeScaling(kind="yarn", factor=16, original_max_seq_len=2048, attention_factor=1)


def _read_rope(fields: Fields) -> dict[str, Any]:
    read = _ROPE.read(fields)
    switched = fields.take("inference_rope_scaling", False) and fields.count("max_position_embeddings") > 2048
    stated, held = read["position"]["scaling"], _YARN if switched else None
    if stated and _as_part(stated) != held:
        raise refused("rope_scaling", stated, f"with inference_rope_scaling={switched}, MiniMind takes {held}")
    return {"position": {**read["position"], "scaling": held and held.model_dump()}}


def _as_part(stated: dict[str, Any]) -> RopeScaling:
    try:
        return RopeScaling(**stated)
    except ValidationError as error:
        raise UserError(f"config.json: {in_one_line(error, RopeScaling, 'rope_scaling.')}") from None


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    if config.position.scaling not in (None, _YARN):
        raise UserError(f"model.position.scaling={config.position.scaling} is not MiniMind's")
    return _ROPE.write(config) | {"inference_rope_scaling": config.position.scaling is not None}


_EXPERT_FIELDS = """
n_routed_experts n_shared_experts scoring_func aux_loss_alpha seq_aux
num_experts moe_intermediate_size router_aux_loss_coef num_experts_per_tok norm_topk_prob
"""


def _if_moe(*rules: Rule) -> Rule:
    """These rules where use_moe says so; a dense model has other formats to be written in."""

    def read(fields: Fields) -> dict[str, Any]:
        experts: dict[str, Any] = {}
        for rule in rules if fields.take("use_moe", False) else (unused(*_EXPERT_FIELDS.split()),):
            experts = merge(experts, rule.read(fields))
        return experts

    def write(config: ModelConfig) -> dict[str, Any]:
        return {name: value for rule in rules for name, value in rule.write(config).items()} | {"use_moe": True}

    return Rule(read, write)


def _read_gates(fields: Fields) -> dict[str, Any]:
    # A single gate stays what it is.
    return {"moe": {"normalise_gates": fields.take("norm_topk_prob", True) and fields.count("num_experts_per_tok") > 1}}


_COMMON = (*decoder(eps=1e-5, tied=True), SILU, Rule(_read_rope, _write_rope), unused("flash_attn", "max_seq_len"))
_EXPERTS = (ours(moe={"score": "softmax"}), same("num_experts_per_tok", "moe.top_k"))

MINIMIND2 = Family(
    model_type="minimind",
    marker="n_routed_experts",
    architecture="MiniMindForCausalLM",
    in_transformers=False,
    has_classifier=False,
    rules=(
        *_COMMON,
        natural_heads(2),
        same("intermediate_size", "ffn.width"),
        _if_moe(
            *_EXPERTS,
            same("n_routed_experts", "moe.n_experts"),
            same("intermediate_size", "moe.expert_width"),
            # Each is a network of its own in their files.
            translated("n_shared_experts", "moe.n_shared", {0: 0, 1: 1}),
            Rule(_read_gates, lambda config: {"norm_topk_prob": at(config, "moe.normalise_gates")}),
            fixed("scoring_func", "softmax"),
            SEQUENCE_BALANCE,
        ),
    ),
    table=lambda config: (
        MOE
        | {
            f"blocks.{{layer}}.ffn.shared.{name}": f"model.layers.{{layer}}.mlp.shared_experts.0.{name}_proj"
            for name in ("gate", "up", "down")
        }
    ),
)

MINIMIND3 = Family(
    model_type="minimind",
    marker="num_experts",
    architecture="MiniMindForCausalLM",
    in_transformers=False,
    has_classifier=False,
    rules=(
        *_COMMON,
        heads(4),
        ours(attention={"qk_norm": "head"}),
        same("intermediate_size", "ffn.width"),
        _if_moe(
            *_EXPERTS,
            same("num_experts", "moe.n_experts"),
            same("moe_intermediate_size", "moe.expert_width"),
            same("norm_topk_prob", "moe.normalise_gates", True),
            balance_loss(5e-4),
            ours(moe={"balance_over": "layer"}),
        ),
    ),
    table=lambda config: MOE,
)
