"""The command `moray VERB …`. What goes wrong is one line on standard error and an exit code, never a traceback.

1: the workers failed for good; 2: a user's mistake; 75: stopped on request, resumable; 76: another attempt
took the run over; 130: cut off by Ctrl-C.
"""

import errno
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from textwrap import wrap

from moray import UserError
from moray.cluster.exit_codes import EXIT_FAILED, EXIT_KILLED_BY_KEYBOARD, EXIT_MISTAKE
from moray.cluster.launchers import is_another_rank
from moray.cluster.signals import hold_sigterm, leave_on_sigterm
from moray.jobs.completion import SHELLS, completion
from moray.jobs.options import bind
from moray.jobs.verbs.align import align
from moray.jobs.verbs.chat import chat
from moray.jobs.verbs.checkpoints import checkpoints
from moray.jobs.verbs.demo import demo
from moray.jobs.verbs.doctor import doctor
from moray.jobs.verbs.evaluate import evaluate
from moray.jobs.verbs.export import export
from moray.jobs.verbs.finetune import finetune
from moray.jobs.verbs.generate import generate
from moray.jobs.verbs.inspect import inspect
from moray.jobs.verbs.prepare import prepare
from moray.jobs.verbs.pretrain import pretrain
from moray.jobs.verbs.quality import quality
from moray.jobs.verbs.report import report
from moray.jobs.verbs.say import complain
from moray.jobs.verbs.status import status
from moray.jobs.verbs.submit import submit
from moray.jobs.verbs.upcycle import upcycle

RANK_0_TELLS_S = 5.0
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What a system answers for a path that this user cannot read or write."""
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EAGAIN)
"""What a network file system answers while its server is away, or of what was replaced."""

VERBS: dict[str, Callable[..., int]] = {
    verb.__name__: verb
    for verb in (
        doctor, prepare, quality, pretrain, finetune, align, submit, status, report, generate, chat, evaluate,
        checkpoints, inspect, export, upcycle, demo,
    )
}  # fmt: skip
TRAIN = ("pretrain", "finetune", "align")
READ_THEIR_OWN_WORDS = (*TRAIN, "submit", "prepare")


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
    if name in READ_THEIR_OWN_WORDS:
        return VERBS[name](rest)
    return bind(VERBS[name], f"moray {name}", rest)()


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


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in TRAIN:
        hold_sigterm()
    try:
        code = dispatch(sys.argv[1:])
    except UserError as error:
        if is_another_rank():
            # Every rank finds most mistakes: rank 0 tells, and whoever started it then ends the others.
            leave_on_sigterm(EXIT_MISTAKE)
            time.sleep(RANK_0_TELLS_S)
        complain(str(error))
        code = EXIT_MISTAKE
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from what is done: of a run, from its newest commit")
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
