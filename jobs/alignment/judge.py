"""A process beside each worker that computes the rewards of its answers, and is killed where one takes too long.

A function of the user's may loop, and an expression may backtrack, for ever, inside of C, where neither a thread nor a
signal's handler in Python stops it. A fork would copy the threads of torch and gloo half way: so this is a program of
its own (`judge_process.py`), started once. It imports no torch, and ends with the worker, however that ends.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np

from moray import UserError
from moray.jobs.alignment.rewards import SETTING, Reward, Sample

IMPORT_S = 120.0
"""Most seconds that the user's modules may take to be imported."""
N_ASKED_TWICE = 8


def check_rewards(rewards: Sequence[Reward], folder: str) -> None:
    """Imports the user's functions as a `Judge` would, and lets go of them. Raises UserError as it does."""
    Judge(rewards, folder, IMPORT_S).close()


class Judge:
    """Computes all rewards but reward models', in a process of its own, until it is closed.

    folder: that of the run's command, where modules are looked for first, before installed ones. timeout_s: most
    seconds of one reward of one sample.
    Raises UserError where a function cannot be imported, or does not take one sample.

    To be made by a thread that lives as long as the worker: the kernel ends the process with it.
    """

    def __init__(self, rewards: Sequence[Reward], folder: str, timeout_s: float) -> None:
        self._rewards = [reward for reward in rewards if reward.kind != "model"]
        self._timeout_s = timeout_s
        self._is_new = True
        self._pipe, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",  # the order of a set of texts must not differ between processes
        }
        words = [str(theirs.fileno()), str(os.getpid()), folder]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moray.jobs.alignment.judge_process", *words],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that what a function starts is killed with it
        )
        theirs.close()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pipe.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def score(self, samples: Sequence[Sample], on_value: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
        """By reward, in the order of the setting: fp64, [samples], in the samples' order. on_value: called after each.

        The first time, the first samples are asked twice, in both orders. Raises UserError naming the reward and the
        sample where that differs; where a function raises, takes too long, or returns what is no finite number; and
        where the process is killed. It is closed then.
        """
        try:
            scores = self._ask(samples, on_value)
            if self._is_new:
                self._ask_again(samples[:N_ASKED_TWICE], scores, on_value)
                self._is_new = not samples
        except BaseException:
            self.close()
            raise
        return {reward.name: np.array(values) for reward, values in zip(self._rewards, scores, strict=True)}

    def _begin(self) -> None:
        self._send(self._rewards)
        for reward in self._rewards:
            what = f"{SETTING}={reward}"
            if trouble := self._receive(what, f"{what}: importing it took more than {IMPORT_S:g} s", IMPORT_S):
                raise UserError(f"{what}: {trouble}")

    def _ask(self, samples: Sequence[Sample], on_value: Callable[[], None]) -> list[list[float]]:
        self._send(samples)
        return [[self._answer(reward, sample, on_value) for sample in samples] for reward in self._rewards]

    def _answer(self, reward: Reward, sample: Sample, on_value: Callable[[], None]) -> float:
        what = f"{SETTING}: {reward.name} on {sample.told}"
        slow = f"{what}: took more than rl.reward_timeout_s={self._timeout_s:g}"
        value = self._receive(what, slow, self._timeout_s)
        if isinstance(value, str):
            raise UserError(f"{what}: {value}")
        on_value()
        return value

    def _ask_again(self, samples: Sequence[Sample], first: list[list[float]], on_value: Callable[[], None]) -> None:
        again = self._ask(samples[::-1], on_value)
        for reward, ones, others in zip(self._rewards, first, again, strict=True):
            for sample, one, other in zip(samples, ones, others[::-1], strict=False):
                if one != other:
                    raise UserError(
                        f"{SETTING}: {reward.name} on {sample.told}: gave {one!r}, and asked again {other!r}; it must "
                        "be a function of its sample alone, without state, clock or random numbers"
                    )

    def _send(self, what: Any) -> None:
        with suppress(BrokenPipeError):  # the process is gone, as reading tells
            self._pipe.send(what)

    def _receive(self, what: str, slow: str, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise UserError(slow)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise UserError(f"{what}: ended the process that computes rewards, with code {code}") from None
