"""The options of a command: words into the arguments of the function that it calls, with help and one-line refusals."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial, wraps
from inspect import signature
from io import StringIO
from itertools import takewhile
from typing import Any, TypeVar

import tyro

from moray import UserError, nearest

T = TypeVar("T")


def bind(verb: Callable[..., T], command: str, arguments: list[str]) -> Callable[[], T]:
    """What a command calls with its arguments, ready to be called. Raises UserError of one line where they do not fit.

    `--help` among them is answered, and ends this process.
    """
    words = _join_values(verb, command, arguments)

    @wraps(verb)
    def keep(*values: Any, **options: Any) -> Callable[[], T]:
        return partial(verb, *values, **options)

    if {"-h", "--help"} & {*words}:
        tyro.cli(keep, args=["--help"], prog=command)
    with redirect_stderr(StringIO()) as said, _endless_lines(), suppress(SystemExit):
        return tyro.cli(keep, args=words, prog=command)
    raise UserError(f"{_condense(said.getvalue())}; `{command} --help` says more")


def _join_values(verb: Callable[..., Any], command: str, arguments: list[str]) -> list[str]:
    """`--option VALUE` as `--option=VALUE`: a value may look like an option, if it is none of this command's.

    Raises UserError for an option that the command does not have.
    """
    kinds = signature(verb).parameters.values()
    known = {f"--{kind.name.replace('_', '-')}": kind for kind in kinds if kind.kind is kind.KEYWORD_ONLY}
    switches = {name for name, kind in known.items() if isinstance(kind.default, bool)}
    switches |= {f"--no-{name[2:]}" for name in switches} | {"--help"}
    words, rest = list[str](), list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            option, equals, value = _split(word)
            if option not in {*known, *switches}:
                raise UserError(f"{option} is not an option of {command}; {nearest(option, list(known))}")
            if not equals and option not in switches and rest and _split(rest[0])[0] not in {*known, *switches}:
                equals, value = "=", rest.pop(0)
            word = option + equals + value
        words.append(word)
    return words


def _split(word: str) -> tuple[str, str, str]:
    """`--some_option=value` is ("--some-option", "=", "value")."""
    option, equals, value = word.partition("=")
    return option.replace("_", "-"), equals, value


@contextmanager
def _endless_lines() -> Iterator[None]:
    """tyro would break what it says, paths too, to fit the terminal."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _condense(box: str) -> str:
    """What is wrong, out of the box of several lines in which tyro says it: all above the first rule, but for help."""
    lines = [line[2:-2].rstrip() for line in box.splitlines() if line.startswith("│")]
    told = takewhile(lambda line: not line.startswith("─"), lines)
    return " ".join(line.strip() for line in told if not line.startswith(" " * 8)).rstrip(".")
