"""A folder that appears whole or not at all: built as `NAME.moray-unfinished`, then renamed."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moray import UserError
from moray.data.dataset import STAGING_SUFFIX
from moray.data.index import INDEX

REPLACED_SUFFIX = ".moray-replaced"


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, keep: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Yields an empty folder beside `out` that becomes `out` when the block ends, and vanishes if it raises.

    What a killed process left there is cleared first; a process that still writes there is left in peace. Where `keep`
    says so of it, the folder is neither cleared nor does it vanish.
    Raises UserError for a full disk, and if `out` holds a dataset (unless `overwrite`) or anything else.
    """
    out = out.expanduser().resolve()
    _check_free(out, overwrite)
    staging = out.with_name(out.name + STAGING_SUFFIX)
    staging.mkdir(parents=True, exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        if not keep(staging):
            clear(staging)
        yield staging
        _replace(out, staging)
    except BlockingIOError:
        raise UserError(f"out={out}: another process is writing it; wait for it or choose another") from None
    except BaseException as error:
        if not keep(staging):
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"the disk is full ({error.strerror}); free space or choose another disk"
            raise UserError(f"out={out}: {why}") from None
        raise
    finally:
        os.close(lock)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; choose a folder")
    if (out / INDEX).exists():
        if not overwrite:
            raise UserError(f"out={out} already holds a finished dataset; choose another folder, or overwrite it")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"out={out} is not empty; choose another folder")


def clear(folder: Path) -> None:
    """Removes all that is in a folder; links, not what they lead to."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(out: Path, staging: Path) -> None:
    old = out.with_name(out.name + REPLACED_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)  # if a kill came between the renames and the removal below
    if out.exists():
        out.rename(old)
    staging.rename(out)
    for folder in (out, out.parent):
        _flush(folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
