"""The batch script of a job of Slurm, as text: any command that ends with 75 when it was stopped and is to go on."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class BatchJob:
    """`command` is the driver of a Ray on the job's nodes, or (`way` srun) every task's. `log` and `token` are files.

    `options` are sbatch's and win over those that stand here; those with a value of None are left out. `stop_s` is how
    long before its time limit a job is told.
    """

    what: str
    way: Literal["ray", "srun"]
    options: Mapping[str, object]
    stop_s: int
    log: Path
    token: Path
    command: Sequence[str]

    def script(self) -> str:
        options = {
            # One log for all attempts; % would begin one of Slurm's own patterns.
            "--output": str(self.log).replace("%", "%%"),
            "--open-mode": "append",
            "--requeue": "",
            "--signal": f"B:TERM@{self.stop_s}",
            **self.options,
        }
        lines = [f"#SBATCH {_option(name, value)}" for name, value in options.items() if value is not None]
        texts = resources.files(__package__)
        start = (texts / f"start_{self.way}.sh").read_text()
        start = start.format(token=shlex.quote(str(self.token)), command=shlex.join(self.command))
        return (texts / "job.sh").read_text().format(what=self.what, options="\n".join(lines), start=start)


def _option(name: str, value: object) -> str:
    """As sbatch reads it in a script, which is not as a shell does."""
    text = str(value)
    if {*" '\"#\\"} & {*text}:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}={text}" if text else name
