"""The program of a `Judge`'s process: imports the functions, then answers batch after batch, a value at a time."""

import importlib
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real
from types import FrameType
from typing import Any

from moray import nearest
from moray.cluster.parent import die_with_parent
from moray.jobs.alignment.builtin_rewards import builtin
from moray.jobs.alignment.rewards import Reward, Sample


def main() -> None:
    """Words: the pipe's descriptor, the worker's process id, and the folder in which modules are looked for first."""
    descriptor, parent, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    die_with_parent(parent)
    os.set_inheritable(descriptor, False)
    # It asks the run to stop, whose last step still wants its rewards. A handler, since what a function starts would
    # ignore the signal, too.
    signal.signal(signal.SIGTERM, _ignore)
    sys.path.insert(0, folder)
    pipe = Connection(descriptor)
    functions = []
    for reward in pipe.recv():
        try:
            functions.append(_function(reward))
            trouble = ""
        except _NoFunctionError as error:
            trouble = str(error)
        except BaseException as error:
            trouble = f"importing it {_raised(error, traceback.extract_tb(error.__traceback__)[-1])}"
        pipe.send(trouble)
    while True:
        try:
            samples = pipe.recv()
        except EOFError:
            return
        for function in functions:
            for sample in samples:
                pipe.send(_value(function, sample))


class _NoFunctionError(Exception):
    """What is named is no function of one sample."""


def _function(reward: Reward) -> Callable[[Sample], Any]:
    if reward.kind == "builtin":
        return builtin(reward)
    module_name, _, name = reward.name.partition(":")
    found: Any
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # One that it imports itself may be missing, too.
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise _NoFunctionError(f"there is no module {error.name} in {sys.path[0]}, nor among installed ones") from None
    for part in name.split("."):
        if not hasattr(found, part):
            names = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
            raise _NoFunctionError(f"{module_name} has no {name}; {nearest(part, names or ['none'])}")
        found = getattr(found, part)
    if inspect.iscoroutinefunction(found):
        raise _NoFunctionError(f"{name} must be a plain function, not an async one")
    if not callable(found) or not _takes_one(found):
        raise _NoFunctionError(f"{name} must be a function of one sample: def {name}(sample: Sample) -> float")
    return found


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions in C have no signature
        return True
    return True


def _value(function: Callable[[Sample], Any], sample: Sample) -> float | str:
    """The reward, or what is wrong with it."""
    try:
        value = function(sample)
        number = float(value) if isinstance(value, Real) else None
        if number is not None and math.isfinite(number):
            return number
        shown = repr(value)[:80]
    except BaseException as error:
        # The user's own line, and not that of a library which it called.
        return _raised(error, traceback.extract_tb(error.__traceback__)[:2][-1])
    if isinstance(value, list | tuple):
        return f"returned {len(value)} values, {shown}; it judges one sample and must return one finite number"
    return f"returned {shown} ({type(value).__name__}); it must return a finite number"


def _raised(error: BaseException, where: traceback.FrameSummary) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"raised {text[:500]} ({os.path.basename(where.filename)}:{where.lineno})"


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
