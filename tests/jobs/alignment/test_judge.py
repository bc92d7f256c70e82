"""Rewards in the real process beside a worker: in order, in time, and not without their worker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import marked_processes

from moray import UserError
from moray.jobs.alignment.judge import Judge, check_rewards
from moray.jobs.alignment.rewards import Sample, parse_rewards

FUNCTIONS = """
import os, random, re, subprocess, sys, time
from fractions import Fraction

import numpy as np

def length(sample):
    return len(sample.answer)

def fields(sample):
    return (sample.key, sample.prompt, sample.answer, sample.reference, sample.ended, sample.tokens) == (
        "k1", "Q", "answer 1", {"right": [1, None]}, True, (1, 2))

def as_told(sample):
    return eval(sample.answer)

def sleeps(sample):
    return 0 if sample.key != "k2" else time.sleep(1000)

def loops(sample):
    while sample.key == "k2":
        pass
    return 0

def backtracks(sample):
    return bool(re.fullmatch("(a+)+b", "a" * 64 if sample.key == "k2" else ""))

def begins_and_ends(sample):
    print("begun", flush=True)
    return 0

def begins_to_loop(sample):
    print("begun", flush=True)
    while True:
        pass

def begins_to_backtrack(sample):
    print("begun", flush=True)
    return bool(re.fullmatch("(a+)+b", "a" * 64))

def starts_another(sample):
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])

def random_(sample):
    return random.random()

def counts(sample, calls=[]):
    calls.append(0)
    return float(len(calls) > 3)

def first_of_set(sample):
    return float(ord(next(iter({*"abcdefgh"}))))

def imports_torch(sample):
    return "torch" in sys.modules

def fails_deep(sample):
    return re.compile("(")

async def later(sample):
    return 0

def of_batches(prompts, completions, **fields):
    return [0.0 for _ in completions]

class Judges:
    @staticmethod
    def half(sample):
        return Fraction(1, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "my_rewards.py").write_text(FUNCTIONS)
    (folder / "json.py").write_text("raise RuntimeError('this is not yours')")  # what we import is not from there
    (folder / "broken.py").write_text("\n\nnumber = 1 / 0\n")
    (folder / "lacking.py").write_text("import no_such_library\n")
    (folder / "wrong.py").write_text("def f(:\n")
    return str(folder)


@pytest.fixture
def judge(folder: str) -> Callable[..., dict[str, list[float]]]:
    def score(words: str | list[str], samples: list[Sample], timeout_s: float = 60) -> dict[str, list[float]]:
        with Judge(parse_rewards(words), folder, timeout_s) as process:
            return {name: values.tolist() for name, values in process.score(samples).items()}

    return score


def samples(*answers: str) -> list[Sample]:
    return [
        Sample(f"k{i}", "Q", answer, {"right": [1, None]}, ended=True, tokens=(1, 2))
        for i, answer in enumerate(answers)
    ]


def test_values_are_in_the_order_of_samples_and_settings(judge: Callable[..., dict[str, list[float]]]) -> None:
    words = ["my_rewards:length=1", "model:runs/r=1", "format:a.*=1", "my_rewards:fields=1", "my_rewards:Judges.half=1"]
    found = judge(words, samples("xxx", "answer 1", "", "y" * 100_000))
    assert list(found.items()) == [
        ("my_rewards:length", [3, 8, 0, 100_000]),
        ("format:a.*", [0, 1, 0, 0]),
        ("my_rewards:fields", [0, 1, 0, 0]),
        ("my_rewards:Judges.half", [0.5] * 4),
    ]


def test_several_processes_and_batches_agree(folder: str) -> None:
    """Also where a function goes through a set of texts, whose order is another one in each process."""
    all_samples, rewards = samples(*map(str, range(40))), parse_rewards("my_rewards:length=1,my_rewards:first_of_set=1")
    found = []
    for n in (40, 7):
        with Judge(rewards, folder, 60) as one, Judge(rewards, folder, 60) as other:
            parts = [all_samples[at : at + n] for at in range(0, 40, n)]
            scores = [(one, other)[i % 2].score(part) for i, part in enumerate(parts)]
            found.append({reward.name: [x for score in scores for x in score[reward.name]] for reward in rewards})
            assert one.score([])["my_rewards:length"].tolist() == []
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        ("float('nan')", r"returned nan \(float\); it must return a finite number"),
        ("-math.inf", r"raised NameError: name 'math' is not defined \(my_rewards.py:15\)"),
        ("-np.inf", r"returned .*-?inf.*; it must return a finite number"),
        ("np.float32('nan')", r"returned .*nan.* \(float32\); it must return a finite number"),
        ("None", r"returned None \(NoneType\); it must return a finite number"),
        ("'1'", r"returned '1' \(str\); it must return a finite number"),
        ("[1.0, 2.0]", r"returned 2 values, \[1.0, 2.0\]; it judges one sample and must return one finite number"),
        ("10**400", r"raised OverflowError"),
        ("1 / 0", r"raised ZeroDivisionError: division by zero \(my_rewards.py:15\)"),
        ("sys.exit(3)", r"raised SystemExit: 3"),
        ("os._exit(3)", r"ended the process that computes rewards, with code 3"),
        ("os.kill(os.getpid(), 9)", r"ended the process that computes rewards, with code -9"),
    ],
)
def test_what_is_no_reward_stops_the_run_and_names_the_sample(
    judge: Callable[..., dict[str, list[float]]], answer: str, trouble: str
) -> None:
    with pytest.raises(UserError, match=trouble) as caught:
        judge("my_rewards:length=1,my_rewards:as_told=1", samples("1", "2.5", answer, "None"))
    told = f"rl.rewards: my_rewards:as_told on sample k2 (its answer: {answer!r}): "
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_a_sign_of_life_comes_with_every_value(folder: str) -> None:
    """A group of slow rewards is silent for minutes, and would count as hung; the first time, some are asked twice."""
    samples = [Sample(f"k{i}", "Q", "answer", "x", True, (1,)) for i in range(4)]
    beats: list[int] = []
    with Judge(parse_rewards("my_rewards:length=1,exact=0"), folder, 20.0) as judge:
        for expected in (16, 24):
            judge.score(samples, lambda: beats.append(1))
            assert len(beats) == expected


def test_an_error_names_the_users_own_line(judge: Callable[..., dict[str, list[float]]]) -> None:
    line = FUNCTIONS.splitlines().index('    return re.compile("(")') + 1
    with pytest.raises(UserError, match=rf"raised .*error: missing \).* \(my_rewards.py:{line}\)"):
        judge("my_rewards:fails_deep=1", samples("a"))


def test_numbers_of_any_real_type_are_taken(judge: Callable[..., dict[str, list[float]]]) -> None:
    answers = ["True", "2", "0.1", "np.float32(0.5)", "np.int64(-3)", "Fraction(1, 4)"]
    assert judge("my_rewards:as_told=1", samples(*answers)) == {"my_rewards:as_told": [1, 2, 0.1, 0.5, -3, 0.25]}


@pytest.mark.parametrize("name", ["my_rewards:sleeps", "my_rewards:loops", "my_rewards:backtracks", "format:(a+)+b"])
def test_what_takes_too_long_ends_the_run_by_name(judge: Callable[..., dict[str, list[float]]], name: str) -> None:
    """Be it in Python or within C."""
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        judge([f"{name}=1"], samples("a", "b", "a" * 64, "d"), timeout_s=1)
    assert str(caught.value).startswith(f"rl.rewards: {name} on sample k2 (its answer: 'aaa")
    assert str(caught.value).endswith("took more than rl.reward_timeout_s=1")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("name", ["random_", "counts"])
def test_a_reward_with_a_state_is_found(judge: Callable[..., dict[str, list[float]]], name: str) -> None:
    with pytest.raises(UserError, match=rf"my_rewards:{name} on sample k\d .*: gave .*, and asked again .*; it must"):
        judge(f"my_rewards:{name}=1", samples(*"abcdef"))


def test_the_process_imports_no_torch(judge: Callable[..., dict[str, list[float]]]) -> None:
    assert judge("gsm8k=0,my_rewards:imports_torch=1", samples())["my_rewards:imports_torch"] == []
    assert judge("my_rewards:imports_torch=1", samples("a")) == {"my_rewards:imports_torch": [0]}


@pytest.mark.parametrize(
    ("entry", "trouble"),
    [
        ("my_rewads:length", r"there is no module my_rewads in /.*, nor among installed ones"),
        ("os.pth:join", r"there is no module os.pth"),
        ("my_rewards:lenght", r"my_rewards has no lenght; did you mean length\?"),
        ("my_rewards:np", r"np must be a function of one sample: def np\(sample: Sample\) -> float"),
        ("my_rewards:of_batches", r"of_batches must be a function of one sample"),
        ("my_rewards:later", r"later must be a plain function, not an async one"),
        ("broken:f", r"importing it raised ZeroDivisionError: division by zero \(broken.py:3\)"),
        ("lacking:f", r"importing it raised ModuleNotFoundError: No module named 'no_such_library'"),
        ("wrong:f", r"importing it raised SyntaxError: .*wrong.py, line 1"),
    ],
)
def test_a_function_that_cannot_be_imported_is_told_at_the_start(folder: str, entry: str, trouble: str) -> None:
    with pytest.raises(UserError, match=trouble) as caught:
        check_rewards(parse_rewards(f"exact=1,{entry}=0.5"), folder)
    assert str(caught.value).startswith(f"rl.rewards={entry}=0.5: ")


def test_what_can_be_imported_passes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # where a file has the name of a library that we import ourselves
    check_rewards(parse_rewards("gsm8k=1,os.path:basename=1,my_rewards:length=1,model:runs/none=1"), folder)


WORKER = """
import sys
from moray.jobs.alignment.judge import Judge
from moray.jobs.alignment.rewards import Sample, parse_rewards

judge = Judge(parse_rewards(f"my_rewards:{sys.argv[2]}=1"), sys.argv[1], 1000)
judge.score([Sample("k2", "Q", "A", None, True, ())])
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["begins_and_ends", "begins_to_loop", "begins_to_backtrack"])
def test_a_worker_that_is_killed_leaves_no_process(folder: str, tmp_path: Path, name: str) -> None:
    mark = str(tmp_path)
    command = [sys.executable, "-c", WORKER, folder, name]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, env={**os.environ, "MARK": mark}, stdin=pipe, stdout=pipe)
    assert worker.stdin
    assert worker.stdout
    with worker.stdin, worker.stdout:
        assert worker.stdout.readline() == b"begun\n"
        assert len(marked_processes(mark)) == 2
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    _until(lambda: not marked_processes(mark))


def test_what_a_function_started_ends_with_it(
    judge: Callable[..., dict[str, list[float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path))
    with pytest.raises(UserError, match="took more than"):
        judge("my_rewards:starts_another=1", samples("a"), timeout_s=2)
    _until(lambda: not marked_processes(str(tmp_path)))


def test_a_terminated_process_goes_on(folder: str) -> None:
    """SIGTERM asks the run to stop after its step, which wants its rewards."""
    with Judge(parse_rewards("my_rewards:length=1"), folder, 60) as judge:
        os.killpg(judge._process.pid, signal.SIGTERM)
        assert judge.score(samples("abc"))["my_rewards:length"].tolist() == [3]


def _until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not is_so() and time.monotonic() < until:
        time.sleep(0.05)
    assert is_so()
