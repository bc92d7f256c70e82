"""The folder in which a dataset is made, `OUT.moray-unfinished`: its plan, and what of it is done.

A preparation that was killed goes on from what its tasks left there. Their folders' names are made of what they depend
on, so that what was read stays read when a source is mended or another one added.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moray import UserError
from moray.data.preparation.tasks import clear_partials
from moray.data.staging import clear, staged_folder

PLAN, SCRATCH = "plan.json", "scratch"


@contextmanager
def planned_folder(out: Path, plan: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Yields the folder that becomes `out` when the block ends, with what an interrupted preparation has left in it.

    plan: the settings, flat, by name. Where the block raises, the folder stays if a task is done, else it vanishes.
    Raises UserError as `staged_folder`, and where what is there was made with other settings.
    """
    with staged_folder(out, overwrite=overwrite, keep=_is_begun) as folder:
        before = _plan_in(folder)
        if before is not None and before != plan and not overwrite:
            raise UserError(_difference(out, before, plan))
        if before != plan:
            clear(folder)
        (folder / SCRATCH).mkdir(exist_ok=True)
        clear_partials(folder / SCRATCH)
        partial = folder / (PLAN + ".partial")
        partial.write_text(json.dumps(plan, indent=1, sort_keys=True) + "\n")
        partial.replace(folder / PLAN)
        yield folder
    # Only now: until it has its name, all that was done must be there for the next try.
    finished = out.expanduser().resolve()
    shutil.rmtree(finished / SCRATCH, ignore_errors=True)
    (finished / PLAN).unlink(missing_ok=True)


def name_of(*parts: object) -> str:
    """A name for what depends on these and nothing else: their `repr`s must say all of them."""
    return hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _is_begun(folder: Path) -> bool:
    return any((folder / SCRATCH).glob("*/*/done.json"))


def _plan_in(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN).read_text()) if _is_begun(folder) else None
    except (OSError, ValueError):
        return None


def _difference(out: Path, before: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **plan} if before.get(name) != plan.get(name)]
    was, now = (", ".join(f"{name}={each.get(name)}" for name in names) for each in (before, plan))
    return (
        f"out={out}: an interrupted preparation there has {was}, this one {now}; "
        "give the same settings to go on with it, or begin anew with --overwrite"
    )
