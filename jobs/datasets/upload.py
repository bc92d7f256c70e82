"""A dataset to an fsspec URL, where nothing can be renamed: `index.json`, which makes it one, is put there last.

It is made in a folder of this machine. Beside the URL, `URL.moray-unfinished` is there while files are put, so that a
preparation which was killed then may go on, and a reader is told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from moray import UserError
from moray.data.dataset import STAGING_SUFFIX
from moray.data.index import INDEX
from moray.data.reading.records import in_one_line
from moray.data.reading.urls import is_url, local_path
from moray.jobs.datasets.plan import PLAN, SCRATCH, name_of


@dataclass(frozen=True)
class Goal:
    """Where a dataset is to be. folder: in which it is made; url: to which it is put then, if that is not the same."""

    folder: Path
    url: str | None = None

    @classmethod
    def of(cls, out: str | Path, scratch: Path | None) -> "Goal":
        """Raises UserError where a URL has no `scratch` to work in, or a path has one."""
        local = local_path(str(out)) if is_url(out) else Path(out)
        if local is not None and scratch is None:
            return cls(local)
        if local is not None:
            raise UserError(f"scratch={scratch} is for an --out that is a URL; of {local} the disk itself is used")
        if scratch is None:
            raise UserError(
                f"out={out} is a URL: say by --scratch FOLDER where to work, on a disk with room for twice the text"
            )
        url = str(out).rstrip("/")
        return cls(scratch.expanduser().resolve() / name_of(url), url)

    def check(self, *, overwrite: bool) -> None:
        """Raises UserError where something is at the URL that is not to be replaced, or nothing can be."""
        if self.url is None:
            return
        with _told(self.url):
            fs, root = url_to_fs(self.url)
            has_index, is_begun = fs.exists(f"{root}/{INDEX}"), fs.exists(root + STAGING_SUFFIX)
            names = _names_at(fs, root)
        if has_index and not overwrite:
            raise UserError(f"out={self.url} already holds a finished dataset; choose another, or overwrite it")
        if names and not has_index and not is_begun:
            raise UserError(f"out={self.url} is not empty; choose another")

    def put(self) -> None:
        """Puts the files of the folder's dataset to the URL, in place of what is there."""
        if self.url is None:
            return
        made = self.folder.with_name(self.folder.name + STAGING_SUFFIX)
        names = sorted(path.name for path in made.iterdir() if path.name not in (PLAN, SCRATCH))
        with _told(self.url):
            fs, root = url_to_fs(self.url)
            fs.pipe_file(root + STAGING_SUFFIX, b"")
            for name in _names_at(fs, root):
                fs.rm_file(f"{root}/{name}")
            for name in sorted(names, key=lambda name: name == INDEX):
                fs.put_file(str(made / name), f"{root}/{name}")
            fs.rm_file(root + STAGING_SUFFIX)


def _names_at(fs: AbstractFileSystem, root: str) -> list[str]:
    """The index first, which must not be there without all the rest."""
    try:
        found: list[Any] = fs.ls(root, detail=False, refresh=True)
    except FileNotFoundError:
        return []
    names = (name.rstrip("/").rpartition("/")[2] for name in found)
    return sorted(names, key=lambda name: (name != INDEX, name))


@contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whatever library the storage has
        why = in_one_line(error)
        raise UserError(
            f"out={url} cannot be written ({why}); the same command goes on from what is done, once it can"
        ) from error
