"""RoPE in config.json: rope_theta and rope_scaling (transformers 4), or both in rope_parameters (transformers 5)."""

from collections.abc import Mapping
from typing import Any

from moray import UserError
from moray.model.attention.rope import base
from moray.model.config.architecture import ModelConfig
from moray.model.config.parts import RopeScaling
from moray.model.hf.family import Rule
from moray.model.hf.fields import Fields, refused

_LENGTH = "original_max_position_embeddings"
_BANDS = ("factor", _LENGTH, "low_freq_factor", "high_freq_factor")
_YARN = ("factor", _LENGTH, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_KINDS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _BANDS, "yarn": _YARN}
"""Each kind's own fields, which but for the length have our names."""
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
"""Those that a kind which has them cannot do without."""
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope(theta: float = 1e4, *, partial: float | None = None, interleaved: bool = False) -> Rule:
    """theta: the family's default. partial: the default of partial_rotary_factor, in families that have it."""

    def read(fields: Fields) -> dict[str, Any]:
        stated = _stated(fields)
        beside = fields.take("rope_theta", None)
        share = _share(fields, stated, partial)
        scaling = _scaling(stated, fields.take("max_position_embeddings"))
        position = {
            "theta": stated.get("rope_theta", theta if beside is None else beside),
            "interleaved": interleaved,
            "scaling": scaling,
        }
        if share != 1:
            position["rotary_dim"] = int(_head_dim(fields) * share)
        return {"position": position}

    def write(config: ModelConfig) -> dict[str, Any]:
        position = config.position
        if position.kind != "rope":
            raise UserError(f"model.position.kind={position.kind} is not rope")
        share = config.rotary_dim / config.attention.head_dim
        if partial is None and share != 1 and not config.attention.latent:
            raise UserError(f"model.position.rotary_dim={position.rotary_dim} is not all of head_dim")
        written = {"rope_theta": base(config.rotary_dim, position), "rope_scaling": _write_scaling(position.scaling)}
        return written if partial is None else written | {"partial_rotary_factor": share}

    return Rule(read, write)


def _stated(fields: Fields) -> Mapping[str, Any]:
    new, old = fields.take("rope_parameters", None), fields.take("rope_scaling", None)
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, Mapping | None):
            raise refused(name, value, 'it must be an object, {"rope_type": …}, or null')
    if new and old and _scaling(new, 0) != _scaling(old, 0):
        raise refused("rope_scaling", old, f"rope_parameters={new} says otherwise; leave one of them")
    return new or old or {}


def _share(fields: Fields, stated: Mapping[str, Any], default: float | None) -> float:
    share = fields.take("partial_rotary_factor", None)
    share = stated.get("partial_rotary_factor", share)
    if default is None and share not in (None, 1):
        raise refused("partial_rotary_factor", share, "this family turns whole heads")
    share = (default or 1) if share is None else share
    if type(share) not in (int, float):
        raise refused("partial_rotary_factor", share, "it must be a number")
    return share


def _head_dim(fields: Fields) -> int:
    if fields.take("head_dim", None) is not None:
        return fields.count("head_dim")
    return fields.count("hidden_size") // fields.count("num_attention_heads")


def _scaling(stated: Mapping[str, Any], max_positions: int) -> dict[str, Any] | None:
    """Their scaling in our fields; the length before it is max_position_embeddings where they do not say."""
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in list(_KINDS):
        raise refused("rope_scaling.rope_type", kind, f"moray knows {', '.join(_KINDS)}")
    for name, value in stated.items():
        if name not in _ALWAYS | set(_KINDS[kind]) and value is not None:
            raise refused(f"rope_scaling.{name}", value, f"{kind} has no such field that moray knows")
    if kind == "default":
        return None
    for name in _NEEDED:
        if name in _KINDS[kind] and stated.get(name) is None:
            raise UserError(f"config.json: rope_scaling of rope_type={kind} has no {name}")
    scaling = {name: stated[name] for name in _KINDS[kind] if stated.get(name) is not None}
    if _LENGTH in _KINDS[kind]:
        scaling["original_max_seq_len"] = scaling.pop(_LENGTH, max_positions)
    return {"kind": kind, **scaling}


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None or scaling.kind == "ntk":  # the base says it
        return None
    values = scaling.model_dump() | {_LENGTH: scaling.original_max_seq_len}
    # Both versions of transformers round the ramp's ends unless told; 4.57 warns of the field.
    written = {
        name: values[name] for name in _KINDS[scaling.kind] if values[name] is not None and values[name] is not True
    }
    return {"rope_type": scaling.kind, **written}
