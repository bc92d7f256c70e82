"""`moray pretrain --help`: every setting with its values, its default and what it does, part by part."""

from itertools import groupby
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from moray.jobs.config.load import settings


def show_settings(config: type[BaseModel], usage: str, console: Console) -> None:
    """Prints the usage and all settings: a line for the name and the values, and below it what it means."""
    for paragraph in usage.split("\n\n"):
        console.print(" ".join(paragraph.split()), markup=False, highlight=False)
        console.print()
    for section, fields in groupby(settings(config), key=lambda found: found[0].rpartition(".")[0]):
        console.print(section, style="italic", end="\n" if section else "")
        for name, field in fields:
            name = name if section else name.replace("_", "-")
            console.print(f"  [bold]--{name}[/bold]  [cyan]{values(field)}[/cyan]", highlight=False, soft_wrap=True)
            if field.description:
                meaning = escape(" ".join(field.description.split()))
                console.print(Padding(meaning, (0, 0, 0, 6), expand=False), highlight=False)
        console.print()


def values(field: FieldInfo) -> str:
    """What a setting may be, and in brackets what it is by default."""
    kind = _kind(field.annotation)
    if field.is_required():
        return kind
    default = field.get_default(call_default_factory=True)
    written = ",".join(default) if isinstance(default, tuple) else str(default)
    return escape(f"{kind} [{written.lower() if default is None or isinstance(default, bool) else written}]")


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"{_kind(get_args(annotation)[0])},…"
    if arguments := get_args(annotation):
        return "|".join(_kind(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a part, see below"
    return {"NoneType": "none", "bool": "true|false"}.get(annotation.__name__, annotation.__name__)
