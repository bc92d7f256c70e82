"""Which family can hold a model: the first whose config.json, read again, describes the same function."""

from typing import Any

from moray import UserError
from moray.model.attention.rope import base
from moray.model.config.architecture import ModelConfig
from moray.model.hf.families import FAMILIES
from moray.model.hf.family import Family
from moray.model.hf.places import is_bias, is_optional, places

_TRAINING_ONLY = """
z_loss moe.noisy moe.jitter moe.second_expert moe.group_size moe.capacity_factor moe.drop_by moe.balance_loss
moe.balance_counts moe.balance_over moe.device_loss moe.communication_loss moe.importance_loss moe.load_loss
moe.router_z_loss moe.bias_update_rate moe.device_bias_update_rate init.scheme init.std
"""


def family_for(config: ModelConfig) -> Family:
    """The first family that computes what `config` does outside of training.

    Raises UserError saying what the nearest family would change.
    """
    misses = []
    for family in FAMILIES:
        try:
            changed = _changes(family, config)
        except UserError as error:
            # It has no word for a field, which is farther off than words of other meaning.
            misses.append((len(essence(config)), [str(error)], family.model_type))
            continue
        if not changed and (config.head == "vocabulary" or family.has_classifier):
            return family
        misses.append((len(changed), changed or [f"transformers has no {family.classifier}"], family.model_type))
    _, changed, nearest = min(misses)
    raise UserError(f"no Hugging Face family expresses this model; the nearest is {nearest}, but {'; '.join(changed)}")


def _changes(family: Family, config: ModelConfig) -> list[str]:
    """What would be lost in this family's folder. Raises UserError for what its config.json cannot say."""
    wanted, held = essence(config), essence(family.read(family.write(config)))
    changed = [
        f"model.{name}={wanted.get(name)} would be {held.get(name)}"
        for name in sorted(wanted.keys() | held.keys())
        if wanted.get(name) != held.get(name)
    ]
    if not changed:
        is_moving = config.moe is not None and config.moe.has_moving_bias
        homeless = places(config, family.table(config))[1]
        lost = [name for name in homeless if not is_optional(name) or (is_moving and is_bias(name))]
        changed += [f"it has no {name}" for name in lost[:1]]
    return changed


def essence(config: ModelConfig) -> dict[str, Any]:
    """Every field that bears on the function the model computes outside of training, by its path."""
    values = _flat(config.model_dump())
    values["attention.scale"] = config.attention.scale or config.attention.head_dim**-0.5
    values["attention.pattern"] = [config.attention.is_local(layer) for layer in range(config.n_layers)]
    values["position.rotary_dim"] = config.rotary_dim if config.position.kind == "rope" else None
    if config.position.scaling and config.position.scaling.kind == "ntk":
        values = {name: value for name, value in values.items() if not name.startswith("position.scaling.")}
        values |= {"position.theta": base(config.rotary_dim, config.position), "position.scaling": None}
    if not any(values["attention.pattern"]):
        values["attention.window"] = None
    if config.n_moe_layers == config.n_layers:
        values["ffn.width"] = None
    if config.moe:
        values["moe.gated"] = config.expert_ffn.gated
    if config.head == "scalar":
        values |= {"tied_embeddings": None, "head_bias": None, "final_softcap": None}
    if config.moe and config.moe.n_groups == config.moe.top_k_groups:
        values |= {"moe.n_groups": 1, "moe.top_k_groups": 1, "moe.group_score": None}
    return {name: value for name, value in values.items() if name not in _TRAINING_ONLY.split()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
