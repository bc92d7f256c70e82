"""A real Slurm on the two nodes of nodes_of_one.py: munged, slurmctld, and a slurmd on each (Linux, root)."""

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from nodes_of_one import SmallNode, two_nodes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurm-wlm munge"
START_S = 30

# A job that goes back into the queue may start once its credential has expired. CPUs must be the machine's true number.
CONFIG = """
ClusterName=moray
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=30
JobRequeue=1
MailProg=/bin/true
NodeName={first.name} NodeAddr={first.address} NodeHostname={first.name} CPUs={cpus} RealMemory=1000
NodeName={second.name} NodeAddr={second.address} NodeHostname={second.name} CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


@contextmanager
def slurm(folder: Path) -> Iterator[SmallNode]:
    """The first node, from which Slurm's commands reach it; SLURM_CONF tells where it is."""
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        if "CI" in os.environ:
            pytest.fail(f"{', '.join(missing)} missing: .ci/run installs {PACKAGES}")
        pytest.skip(f"{', '.join(missing)} missing: apt install {PACKAGES}")
    with two_nodes(folder) as nodes, ExitStack() as running, pytest.MonkeyPatch.context() as environment:
        config = folder / "slurm.conf"
        config.write_text(CONFIG.format(first=nodes[0], second=nodes[1], folder=folder, cpus=os.cpu_count()))
        environment.setenv("SLURM_CONF", str(config))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (folder / "state").mkdir()
        own = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        _start(running, folder, "munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *own)
        _start(running, folder, *nodes[0].command("slurmctld", "-D", "-c"))
        for node in nodes:
            _start(running, folder, *node.command("slurmd", "-D", "-N", node.name))
        deadline = time.monotonic() + START_S
        ask = nodes[0].beside("sinfo", "--noheader", "--format=%T %D")
        while subprocess.run(ask, capture_output=True, text=True).stdout.strip() != "idle 2":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield nodes[0]


def _start(running: ExitStack, folder: Path, *command: str) -> None:
    with (folder / "daemons.log").open("a") as log:
        process = running.enter_context(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    running.callback(process.kill)
