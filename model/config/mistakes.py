"""What a config refuses, in one line: the setting, its value and what would be right."""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list"}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def in_one_line(error: ValidationError, config: type[BaseModel], prefix: str = "") -> str:
    """What pydantic found wrong with the fields of `config`, whose settings' names begin with `prefix`."""
    return "; ".join(_mistake(found, config, prefix) for found in error.errors())


def _mistake(found: Any, config: type[BaseModel], prefix: str) -> str:
    kind, context = found["type"], found.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    path = [part for part in found["loc"] if isinstance(part, str)]  # an entry of a list has its index there
    name, part = prefix + ".".join(path), _part(config, path[:-1])
    if kind == "missing":
        return f"{name} is missing beside {_written(found['input'])}: {_meaning(part.model_fields[path[-1]])}"
    said = f"{name}={_written(found['input'])}"
    if kind == "extra_forbidden":
        return f"{said} is no setting; there are {', '.join(part.model_fields)}"
    if kind.startswith("model_"):
        return f"{said} must be none, or settings of its own: {', '.join(_part(config, path).model_fields)}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{said} must be {words} {context[bound]}"
    if kind == "literal_error":
        return f"{said} must be {context['expected'].replace(chr(39), '')}"
    if kind == "finite_number":
        return f"{said} must be finite"
    right = _KINDS.get(kind.partition("_")[0])
    return f"{said} must be {right}" if right else f"{said}: {found['msg']}"


def _part(config: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The config that holds the fields at a path."""
    for name in path:
        annotation = config.model_fields[name].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        config = next(kind for kind in kinds if issubclass(kind, BaseModel))
    return config


def _meaning(field: FieldInfo) -> str:
    """What a field may be, or else what it says."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    return " ".join((field.description or "").split()).rstrip(".")


def _written(value: Any) -> str:
    """A value as a person writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_written(entry)}" for name, entry in value.items()) or "nothing"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
