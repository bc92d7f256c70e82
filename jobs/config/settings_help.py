"""`moray pretrain --help`: every setting with its values, its default and what it does, a table for each part."""

from itertools import groupby
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moray.jobs.config.run import settings


def show_settings(config: type[BaseModel], usage: str, console: Console) -> None:
    """Prints the usage and all settings."""
    console.print(usage, markup=False, highlight=False)
    for section, fields in groupby(settings(config), key=lambda found: found[0].rpartition(".")[0]):
        table = Table(title=section, title_justify="left", box=None, padding=(0, 1), show_header=False, expand=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(style="cyan")
        table.add_column(ratio=1)
        for name, field in fields:
            table.add_row(f"--{name}", values(field), escape(" ".join((field.description or "").split())))
        console.print()
        console.print(table)


def values(field: FieldInfo) -> str:
    """What a setting may be, and in brackets what it is by default."""
    kind = _kind(field.annotation)
    if field.is_required():
        return kind
    default = field.get_default(call_default_factory=True)
    written = ",".join(default) if isinstance(default, tuple) else str(default)
    return escape(f"{kind} [{written.lower() if default is None or isinstance(default, bool) else written}]")


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"{_kind(get_args(annotation)[0])},…"
    if arguments := get_args(annotation):
        return "|".join(_kind(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a part, see below"
    return {"NoneType": "none", "bool": "true|false"}.get(annotation.__name__, annotation.__name__)
