"""`moray --completion SHELL`: a script by which a shell completes verbs, options, settings and their values."""

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import make_dataclass
from inspect import signature
from io import StringIO
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import BaseModel

from moray import UserError

SHELLS = ("bash", "zsh", "fish")


def completion(verbs: Mapping[str, Callable[..., Any]], shell: str) -> str:
    """The script, as tyro writes it. Raises UserError for a shell that it does not know."""
    from moray.jobs.config.alignment import ALIGNMENT
    from moray.jobs.config.run import RunConfig
    from moray.jobs.config.starting import TRAINING_VERBS
    from moray.jobs.datasets.config import PrepareConfig
    from moray.model.presets import PRESETS

    if shell not in SHELLS:
        raise UserError(f"--completion {shell} is not known; there are {', '.join(SHELLS)}")
    known: dict[str, Any] = {"recipe": str, "model.preset": Literal[tuple(PRESETS)]}
    known |= _kinds(RunConfig)
    training = dict.fromkeys(TRAINING_VERBS, _options(known))
    training |= {"align": _options({"method": Literal[ALIGNMENT], **known})}
    with redirect_stdout(StringIO()) as written, suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            {
                **verbs,
                **training,
                "prepare": _options({"recipe": str, **_kinds(PrepareConfig)}),
                "submit": _options(_of_targets()),
            },
            prog="moray",
            args=["--tyro-print-completion", shell],
        )
    script = written.getvalue()
    for name in known:  # tyro would have dashes in all options, or in none
        script = script.replace(f"'--{name.replace('_', '-')}'", f"'--{name}'")
    return script


def _kinds(config: type[BaseModel]) -> dict[str, Any]:
    """What each setting of a config may be."""
    from moray.jobs.config.load import settings

    return {name: field.annotation for name, field in settings(config)}


def _of_targets() -> dict[str, Any]:
    """The options of `moray submit`: those of all its targets."""
    from moray.jobs.verbs.submit import targets

    known: dict[str, Any] = {"to": Literal[tuple(targets())]}
    for target in targets().values():
        known |= {kind.name.replace("_", "-"): kind.annotation for kind in signature(target).parameters.values()}
    return known


def _options(known: Mapping[str, Any]) -> type:
    """A class with a field for every setting, as tyro reads options out of one."""
    fields = [
        (f"setting_{n}", Annotated[_values(kind), tyro.conf.arg(name=name)])
        for n, (name, kind) in enumerate(known.items())
    ]
    return make_dataclass("Settings", fields)


def _values(kind: Any) -> Any:
    """A setting's values, if they can be listed, else any text."""
    if kind is bool:
        return Literal["true", "false"]
    if get_origin(kind) is Literal:
        return kind
    named = [_values(part) for part in get_args(kind) if part is not type(None)]
    return named[0] if len(named) == 1 else str
