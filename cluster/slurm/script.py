"""The batch script of a job of Slurm, as text: any command that ends with 75 when it was stopped and is to go on."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        start = _RAY if self.way == "ray" else _SRUN
        fields = {
            "what": self.what,
            "options": "\n".join(lines),
            "token": shlex.quote(str(self.token)),
            "command": shlex.join(self.command),
        }
        return (_HEAD + start + _END).format(**fields)


def _option(name: str, value: object) -> str:
    """As sbatch reads it in a script, which is not as a shell does."""
    text = str(value)
    if {*" '\"#\\"} & {*text}:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}={text}" if text else name


_HEAD = """\
#!/bin/bash
# {what}. Written by `moray submit`; `sbatch` of this file starts it, or goes on with it.
{options}

stopping=
"""

_RAY = """\
# A Ray of this job's own on its nodes. Who reaches it needs the token, which only its user can read.
export RAY_ADDRESS=slurm RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}-$SLURM_JOB_ID
unset RAY_AUTH_TOKEN
(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

{command} &
driver=$!
stop() {{ stopping=yes; kill -TERM $driver; }}
"""

_SRUN = """\
# One task for each worker. One that dies has the others ended.
srun --kill-on-bad-exit=1 --mpi=none --cpus-per-task="$SLURM_CPUS_PER_TASK" {command} &
driver=$!
# The tasks are told, and not srun, which would end them at once.
stop() {{ stopping=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID"; }}
"""

_END = """\

# SIGTERM, from Slurm before the time limit or by `scancel --batch --signal=TERM`, means: commit and leave.
trap stop TERM
while kill -0 $driver 2> /dev/null; do wait $driver; done  # wait returns for a signal, too
wait $driver
code=$?

# 75: stopped, and what was done is committed. 143: stopped before it could listen, and nothing was done.
# Where Slurm ends the job itself (scancel, preemption, scontrol requeue), it is not for us to start it again.
if [ $code = 75 ] || [ $code$stopping = 143yes ]; then
    [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
