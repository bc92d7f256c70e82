"""Which attempt at a run may write: the newest and no other, whatever file locks are worth where the run lies.

An attempt takes a generation by making `.generation-NNNNNN` beside the commits (a folder is made once, on every file
system), stages its commits in there, and then moves the folders of older generations away. Whoever still writes for one
of those finds that the rename by which it would publish has lost its source: a commit of an older generation is
published before the newer one looks for what to resume from, or never.
"""

import json
import os
import re
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from moray.parallel.checkpoint.commits import discard

OWNER = "owner.json"
# A network file system may show a new name a minute late.
SEEN_WITHIN_S = 75.0
LOOK_EVERY_S = 0.2
_GENERATION = re.compile(r"\.generation-(\d{6,})")


class SupersededError(RuntimeError):
    """A newer generation, which the message names, has taken the run over: this one must write nothing more."""


def generation_path(folder: Path, number: int) -> Path:
    return folder / f".generation-{number:06d}"


def newest_generation(folder: Path) -> int:
    """The number of the newest one that was taken in `folder`; 0 where there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _GENERATION.fullmatch(name))), default=0)


def take_generation(folder: Path, previous: int | None = None, at_least: int = 1) -> int:
    """Takes the next generation of the commits in `folder` (which it makes) and puts an end to all older ones.

    `previous` is the one that the same attempt had until now, None at its beginning.
    Raises SupersededError where another attempt has taken one since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        if previous is not None:
            check_newest(folder, previous)
            at_least = previous + 1
        number = max(newest_generation(folder) + 1, at_least)
        try:
            generation_path(folder, number).mkdir()
        except FileExistsError:
            continue
        if newest_generation(folder) == number:
            break
        # It was taken, and its folder moved away by a newer one, since this looked.
        _remove(generation_path(folder, number))
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(FileNotFoundError):  # taken over already, as the next check will tell
        (generation_path(folder, number) / OWNER).write_text(json.dumps(owner))
    for path in folder.iterdir():
        if (match := _GENERATION.fullmatch(path.name)) and int(match[1]) < number:
            _remove(path)
    return number


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # another newcomer was faster
        discard(path)


def check_newest(folder: Path, number: int) -> None:
    """Raises SupersededError unless `number` is the newest generation in `folder`."""
    newest = newest_generation(folder)
    if newest > number:
        raise SupersededError(f"generation {number} was taken over by generation {_describe(folder, newest)}")


def sees_generation(folder: Path, number: int, within_s: float = SEEN_WITHIN_S) -> bool:
    """Whether this machine sees that `number`, or a newer one, was taken in `folder`.

    If not, its `folder` is another one than that of the machine that took it.
    """
    deadline = time.monotonic() + within_s
    while newest_generation(folder) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def prepare_staging(folder: Path, number: int) -> None:
    """Makes the folder in which this generation stages its commits again, should somebody have removed it.

    Not so the folder around `folder`: where that is gone, a disk is, and will come back.
    Raises SupersededError where the generation is not the newest.
    """
    path = generation_path(folder, number)
    if not path.is_dir():
        # A newer generation is there before it moves this one's folder away.
        check_newest(folder, number)
        folder.mkdir(exist_ok=True)
        path.mkdir(exist_ok=True)
    check_newest(folder, number)


def _describe(folder: Path, number: int) -> str:
    try:
        owner = json.loads((generation_path(folder, number) / OWNER).read_text())
        return f"{number} (pid {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # its owner is just writing it
        return str(number)
