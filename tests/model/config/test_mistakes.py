"""A mistake in a config is one line of ours, wherever the config comes from: pydantic's words do not leak."""

import json
from pathlib import Path
from typing import Any

import pytest

from moray.model import ModelConfig
from moray.model.hf.pretrained import read_config

DENSE = ModelConfig.preset("demo-dense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"n_experts": 8}}, "model.moe.expert_width is missing beside n_experts=8: Width of one expert; "),
        (
            {"position": {"scaling": {"kind": "linear"}}},
            "model.position.scaling.factor is missing beside kind=linear: How many times longer",
        ),
        (
            {"position": {"scaling": {"factor": 2.0}}},
            "model.position.scaling.kind is missing beside factor=2.0: linear, ntk, llama3, yarn",
        ),
        (
            {"attention": {"latent": {"kv_rank": 8}}},
            "model.attention.latent.nope_dim is missing beside kv_rank=8: Chan",
        ),
        (
            {"attention": {"latent": {"kv_rank": 8}}},
            "model.attention.latent.value_dim is missing beside kv_rank=8: Cha",
        ),
        (
            {"attention": {"window": 4, "pattern": "local,glboal"}},
            "model.attention.pattern=glboal must be local or glob",
        ),
        ({"attention": {"n_heads": "two"}}, "model.attention.n_heads=two must be a whole number"),
        ({"attention": {"n_heads": 2.5}}, "model.attention.n_heads=2.5 must be a whole number"),
        ({"attention": {"pattern": 3}}, "model.attention.pattern=3 must be a list"),
        ({"norm": {"kind": "rms"}}, "model.norm.kind=rms must be rmsnorm, layernorm or crmsnorm"),
        ({"norm": {"eps": "small"}}, "model.norm.eps=small must be a number"),
        ({"norm": {"eps": float("nan")}}, "model.norm.eps=nan must be finite"),
        ({"tied_embeddings": None}, "model.tied_embeddings=none must be true or false"),
        ({"moe": "on"}, "model.moe=on must be none, or settings of its own: n_experts, top_k, "),
        (
            {"norm": {"epsilon": 1.0}},
            "model.norm.epsilon=1.0 is no setting; there are kind, placement, eps, unit_offset, ",
        ),
        ({"n_layers": 0}, "model.n_layers=0 must be at least 1"),
        (
            {"moe": {"n_experts": 4, "expert_width": 8, "top_k": 9}},
            "model.moe.top_k=9 must be at most 4, the experts in",
        ),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str) -> None:
    for make in (DENSE.but, lambda **fields: ModelConfig.preset("demo-dense", **fields)):
        with pytest.raises(ValueError, match=r"^model\.") as error:
            make(**changes)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert "pydantic" not in str(error.value)


def test_what_a_published_config_gets_wrong_is_one_line(tmp_path: Path) -> None:
    fields = {
        **{
            "model_type": "mixtral",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 9},
        **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"top_k=9") as error:
        read_config(tmp_path)
    assert (
        str(error.value)
        == "config.json: model.moe.top_k=9 must be at most 4, the experts in 1 of 1 groups of n_experts=4"
    )
