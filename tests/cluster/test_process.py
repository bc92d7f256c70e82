"""Whether a process is still there, told from outside of it."""

import subprocess
import sys
from dataclasses import replace

from moray.cluster.process import Process


def test_this_one_is_alive() -> None:
    assert Process.this().is_alive() is True


def test_one_that_ended_is_not_collected_or_not() -> None:
    script = "from moray.cluster.process import Process; print(Process.this().started, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)
    assert process.stdin
    assert process.stdout
    other = replace(Process.this(), pid=process.pid, started=int(process.stdout.readline()))
    assert other.is_alive() is True
    process.stdin.close()
    assert process.stdout.read() == ""
    while other.is_alive():  # it has closed its output, and is about to end
        pass
    assert process.returncode is None
    process.wait()
    assert other.is_alive() is False


def test_a_pid_that_was_given_again_is_another_process() -> None:
    here = Process.this()
    assert here.started is not None
    assert replace(here, started=here.started - 1).is_alive() is False


def test_of_another_machine_nothing_is_known() -> None:
    assert replace(Process.this(), kernel="another boot").is_alive() is None
    assert replace(Process.this(), kernel=None).is_alive() is None
