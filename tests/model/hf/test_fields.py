"""Whatever stands in a field of config.json is either read or refused in one line that names the field."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moray.model import ModelConfig
from moray.model.hf import read_config
from moray.model.hf.choice import family_for
from moray.model.hf.families import FAMILIES
from moray.model.hf.family import Family

DENSE = [
    "llama2-7b",
    "llama3.1-8b",
    "mistral-7b",
    "gemma2-2b",
    "demo-dense",
    "gpt3-125m",
    "gpt-neo-125m",
    "gpt-neox-20b",
]
SPARSE = ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "demo-moe", "deepseek-v2", "deepseek-v3", "minimind2-moe"]
OTHERS: tuple[Any, ...] = (None, "x", -1, 0, 1.5, True, [1], [[1]], ["x", "x"], {})
OTHERS += ({"type": ["x"]}, {"type": "yarn"}, {"type": "linear", "factor": "x"})
OLDER = ("rope_scaling", "sliding_window", "max_window_layers", "layer_types", "head_dim", "attention_types")


def as_written(preset: str) -> tuple[Family, dict[str, Any]]:
    config = ModelConfig.preset(preset)
    family = family_for(config)
    written: dict[str, Any] = json.loads(json.dumps(family.write(config)))
    return family, written | {"use_sliding_window": True} if family.model_type == "qwen3" else written


def refusal(family: Family, values: dict[str, Any]) -> str:
    try:
        family.read(values)
    except ValueError as error:
        return str(error)
    return "config.json is read"


@pytest.mark.parametrize("preset", [*DENSE, *SPARSE])
def test_no_value_of_any_field_is_more_than_refused(preset: str) -> None:
    family, written = as_written(preset)
    for name in {*written, *OLDER} - {"architectures", "model_type"}:
        for value in OTHERS:
            said = refusal(family, written | {name: value})
            assert said.startswith("config.json"), (name, value)
            assert "\n" not in said, (name, value)
        said = refusal(family, {field: value for field, value in written.items() if field != name})
        assert said.startswith("config.json"), name


def test_every_family_is_among_them() -> None:
    found = {as_written(preset)[0].model_type for preset in (*DENSE, *SPARSE)}
    # Qwen2, GPT-BigCode and the dense MiniMind have the rules of those beside them.
    assert {family.model_type for family in FAMILIES} - found <= {"qwen2", "gpt_bigcode", "minimind"}


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("mixtral-8x7b", {"num_experts_per_tok": "2"}, "num_experts_per_tok='2' is not supported; it must be a whole"),
        ("gpt3-125m", {"n_head": 0}, "n_head=0 is not supported; it must be a whole number of at least 1"),
        ("gemma2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 is not supported"),
        ("gemma2-2b", {"layer_types": ["full_attention"]}, "it must name the attention of each of the 26 layers"),
        ("llama2-7b", {"rope_scaling": "yarn"}, "rope_scaling='yarn' is not supported; it must be an object"),
        (
            "llama3.1-8b",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling of rope_type=llama3 has no high_freq_factor",
        ),
        ("gpt-neo-125m", {"window_size": None}, "window_size=None is not supported; it must be a whole"),
        ("gpt-neo-125m", {"attention_types": [["global"], 12]}, "it must be a list of [[kinds], count]"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(preset: str, changes: dict[str, Any], message: str) -> None:
    family, written = as_written(preset)
    with pytest.raises(ValueError, match=re.escape(message)):
        family.read(written | changes)


@pytest.mark.parametrize("text", ["", '{"model_type": ', "[1]", "null"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|must hold a JSON object)"):
        read_config(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_config(tmp_path)
