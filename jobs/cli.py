"""The command `moray VERB …`. What goes wrong is one line on standard error and an exit code, never a traceback.

1: the workers failed for good; 2: a user's mistake; 75: stopped on request, resumable; 76: another attempt
took the run over; 130: cut off by Ctrl-C.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from io import StringIO
from itertools import takewhile
from textwrap import wrap
from typing import Any

import tyro

from moray import UserError
from moray.cluster.exit_codes import EXIT_FAILED, EXIT_KILLED_BY_KEYBOARD, EXIT_MISTAKE
from moray.cluster.signals import hold_sigterm, release_sigterm
from moray.jobs.completion import SHELLS, completion
from moray.jobs.config.nearest import nearest
from moray.jobs.verbs.checkpoints import checkpoints
from moray.jobs.verbs.demo import demo
from moray.jobs.verbs.doctor import doctor
from moray.jobs.verbs.export import export
from moray.jobs.verbs.generate import generate
from moray.jobs.verbs.inspect import inspect
from moray.jobs.verbs.prepare import prepare
from moray.jobs.verbs.pretrain import pretrain
from moray.jobs.verbs.say import complain
from moray.jobs.verbs.status import status
from moray.jobs.verbs.upcycle import upcycle

RANK_0_TELLS_S = 5.0
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What a system answers for a path that this user cannot read or write."""
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EAGAIN)
"""What a network file system answers while its server is away, or of what was replaced."""

VERBS: dict[str, Callable[..., int]] = {
    verb.__name__: verb
    for verb in (doctor, prepare, pretrain, status, generate, checkpoints, inspect, export, upcycle, demo)
}


def dispatch(arguments: list[str]) -> int:
    """Runs a verb and returns its exit code. Raises UserError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(shutil.get_terminal_size().columns))
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"moray {_version()}")
        return 0
    if name == "--completion":
        print(completion(VERBS, rest[0] if rest else ""))
        return 0
    if name not in VERBS:
        raise UserError(f"{name} is not a verb of moray; there are {', '.join(VERBS)}")
    if name == "pretrain":
        return pretrain(rest)
    return bind(name, rest)()


def _usage(width: int) -> str:
    lines = ["usage: moray VERB …    (moray VERB --help says more)", ""]
    for name, verb in VERBS.items():
        what = (verb.__doc__ or "").splitlines()[0]
        lines += wrap(what, width, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15, break_on_hyphens=False)
    return "\n".join([*lines, "", f"       moray --version, moray --completion {'|'.join(SHELLS)}"])


def _version() -> str:
    try:
        return version("moray-train")
    except PackageNotFoundError:
        return "of a folder that is not installed"


def bind(name: str, arguments: list[str]) -> Callable[[], int]:
    """A verb with its arguments, ready to be called. Raises UserError of one line where they do not fit."""
    verb = VERBS[name]
    words = _join_values(name, arguments)

    @wraps(verb)
    def keep(*values: Any, **options: Any) -> Callable[[], int]:
        return partial(verb, *values, **options)

    if {"-h", "--help"} & {*words}:
        tyro.cli(keep, args=["--help"], prog=f"moray {name}")
    with redirect_stderr(StringIO()) as said, _endless_lines(), suppress(SystemExit):
        return tyro.cli(keep, args=words, prog=f"moray {name}")
    raise UserError(f"{_condense(said.getvalue())}; `moray {name} --help` says more")


def _join_values(verb: str, arguments: list[str]) -> list[str]:
    """`--option VALUE` as `--option=VALUE`: a value may look like an option, if it is none of this verb's.

    Raises UserError for an option that the verb does not have.
    """
    kinds = signature(VERBS[verb]).parameters.values()
    known = {f"--{kind.name.replace('_', '-')}": kind for kind in kinds if kind.kind is kind.KEYWORD_ONLY}
    switches = {name for name, kind in known.items() if isinstance(kind.default, bool)}
    switches |= {f"--no-{name[2:]}" for name in switches} | {"--help"}
    words, rest = list[str](), list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            option, equals, value = _split(word)
            if option not in {*known, *switches}:
                raise UserError(f"{option} is not an option of moray {verb}; {nearest(option, list(known))}")
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


def main() -> None:
    if sys.argv[1:2] == ["pretrain"]:
        hold_sigterm()
    try:
        code = dispatch(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # Under torchrun every rank finds most mistakes: rank 0 tells, and torchrun then ends the others.
            release_sigterm()
            time.sleep(RANK_0_TELLS_S)
        complain(str(error))
        code = EXIT_MISTAKE
    except KeyboardInterrupt:
        complain("interrupted; of a run, the newest commit stands, and the same command resumes from it")
        code = EXIT_KILLED_BY_KEYBOARD
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            complain(f"the disk is full: {error}; free space and give the same command again")
        elif error.errno in NOT_OURS:
            complain(f"{error.filename}: {error.strerror}; choose another path, or change who may use it")
        elif error.errno in MAY_PASS:
            complain(f"{error}; the storage may answer again: give the same command once more")
        else:
            raise
        code = EXIT_FAILED if error.errno in MAY_PASS else EXIT_MISTAKE
    except (RuntimeError, FloatingPointError) as error:
        from moray.cluster.worker import WorkerError  # imports torch, as did whoever raised this
        from moray.parallel.checkpoint.checkpointer import CommitError

        if not isinstance(error, WorkerError | CommitError | FloatingPointError):
            raise
        complain(str(error))
        code = EXIT_FAILED
    sys.exit(code)
