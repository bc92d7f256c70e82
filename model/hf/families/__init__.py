"""All families, in the order in which `save_pretrained` tries them."""

from pathlib import Path
from typing import Any

from moray import UserError
from moray.model.hf.families.deepseek_v2 import DEEPSEEK_V2
from moray.model.hf.families.deepseek_v3 import DEEPSEEK_V3
from moray.model.hf.families.gemma2 import GEMMA2
from moray.model.hf.families.glm4_moe import GLM4_MOE
from moray.model.hf.families.gpt2 import GPT2
from moray.model.hf.families.gpt_bigcode import GPT_BIGCODE
from moray.model.hf.families.gpt_neo import GPT_NEO
from moray.model.hf.families.gpt_neox import GPT_NEOX
from moray.model.hf.families.llama import LLAMA
from moray.model.hf.families.minimind import MINIMIND2, MINIMIND3
from moray.model.hf.families.mistral import MISTRAL, MIXTRAL
from moray.model.hf.families.olmoe import OLMOE
from moray.model.hf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from moray.model.hf.family import Family
from moray.model.hf.fields import json_object

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    MIXTRAL,
    OLMOE,
    QWEN3_MOE,
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT2,
    GPT_NEO,
    GPT_BIGCODE,
    GPT_NEOX,
    MINIMIND2,
    MINIMIND3,
)


def config_json(folder: Path | str) -> dict[str, Any]:
    """A folder's config.json. Raises UserError if there is none, or none that can be read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json")
    return json_object(path)


def family_of(folder: Path | str) -> Family:
    """The family of a folder's model_type. Raises UserError naming the model_type and those that are known."""
    values = config_json(folder)
    model_type = values.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type and (not family.marker or family.marker in values):
            return family
    known = ", ".join(sorted(f"{f.model_type} with {f.marker}" if f.marker else f.model_type for f in FAMILIES))
    raise UserError(f"{folder}: model_type={model_type!r} is not supported; there are {known}")
