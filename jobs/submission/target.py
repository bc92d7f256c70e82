"""What a run is submitted to: a scheduler, with the options that it is asked with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig

RECIPE = "recipe.toml"


@dataclass(frozen=True)
class Job:
    """A run, as a command that other machines can give: `moray VERB --recipe FILE`.

    `folder` is where its files are written: RUN/submit, or a folder here where the run's storage is elsewhere.
    """

    name: str
    verb: str
    config: RunConfig
    folder: Path

    @property
    def recipe(self) -> str:
        return to_toml(self.config)

    def command(self, recipe: str) -> list[str]:
        return ["moray", self.verb, "--recipe", recipe]


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """One scheduler; its fields are the options of `moray submit --to …`."""

    name: str = ""
    """What the job is called; by default what its run's folder is."""

    follow: bool = False
    """Show the job's log until it ends, and end with its exit code."""

    print: bool = False
    """Show what would be written and submitted, and do neither."""

    @abstractmethod
    def check(self, job: Job, *, is_here: bool) -> None:
        """Raises UserError for what this scheduler could not run. `is_here`: the storage of run and data is."""

    @abstractmethod
    def files(self, job: Job) -> Mapping[str, str]:
        """The texts that the job consists of, by the names of their files."""

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Submits what has been written to the job's folder, and returns the job's id.

        Raises UserError where the scheduler is not there, or refuses.
        """

    @abstractmethod
    def tell(self, job: Job, job_id: str) -> str:
        """One line: what the job is, how it is followed, and how it is stopped."""

    @abstractmethod
    def watch(self, job: Job, job_id: str) -> int:
        """Shows the job's log until it ends; returns its exit code."""
