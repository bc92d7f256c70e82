"""Bad input gets exit code 2 and one line that names the setting, its value and what would be right. Real commands."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import tiny
from version_1 import samples_of

from moray.data.dataset import Dataset
from moray.jobs.cli import VERBS, dispatch
from moray.jobs.config.load import settings
from moray.jobs.config.run import RunConfig
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., "Outcome"]  # noqa: F821 - of conftest.py


def line_of(outcome) -> str:  # type: ignore[no-untyped-def]
    """The one line of a refusal."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("moray: ")
    return line


def refusal_of_pretrain(moray: Moray, data: Path, run: Path, **changes: object) -> str:
    """The refusal, given before a worker could leave a trace."""
    line = line_of(moray("pretrain", *tiny(data, run, **changes)))
    assert not (run / "events.jsonl").exists()
    assert not (run / "metrics.jsonl").exists()
    return line


def test_an_unknown_verb_names_those_there_are(moray: Moray) -> None:
    line = line_of(moray("pretrian", "--run.dir", "x"))
    assert line == f"moray: pretrian is not a verb of moray; there are {', '.join(VERBS)}"


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["pretrain", "--help"]) == 0
    told = capsys.readouterr().out
    for name, _ in settings(RunConfig):
        assert f"--{name} " in told
    assert "true|false [true]" in told


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_80_columns_and_breaks_no_word(moray: Moray, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    shown = {}
    for columns in (80, 1000):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown[columns] = moray(*verb.split(), "--help").out
    assert max(map(len, shown[80].splitlines())) <= 80
    words = {columns: Counter(re.sub("[╭╮╰╯─│]", "", text).split()) for columns, text in shown.items()}
    assert words[80] == words[1000]


def test_the_version_is_the_installed_ones(moray: Moray) -> None:
    stated = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    assert moray("--version").out in (f"moray {stated}\n", "moray of a folder that is not installed\n")


def test_a_shell_that_is_not_known_is_named(moray: Moray) -> None:
    assert line_of(moray("--completion", "ksh")) == "moray: --completion ksh is not known; there are bash, zsh, fish"


def test_help_is_no_mistake(moray: Moray) -> None:
    for words in ([], ["--help"], ["pretrain", "--help"], ["generate", "--help"]):
        outcome = moray(*words)
        assert (outcome.code, outcome.err) == (0, "")
        assert "moray" in outcome.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__stepz": 3}, "train.stepz is not a setting; did you mean train.steps?"),
        ({"model__preset": "demo-moo"}, "model.preset=demo-moo is not known; did you mean demo-moe?"),
        ({"recipe": "dmo"}, "--recipe dmo is not known; did you mean demo?"),
        ({"data__path": os.fsdecode(b"caf\xe9")}, r"data.path='caf\udce9' is not UTF-8"),
        ({"train__steps": "many"}, "train.steps=many must be a whole number"),
        ({"model__attention__n_heads": 5}, "model.attention.n_kv_heads=2 must divide n_heads=5; try one of [1, 5]"),
        ({"train__seq_len": 4096}, "train.seq_len=4096 must be at most model.max_seq_len=2048"),
        ({"data__path": "nowhere"}, f"data.path={Path.cwd() / 'nowhere'} does not exist; make it with `moray prepare"),
        (
            {"model__vocab_size": 300},
            "holds token 399, beyond the model's vocab_size=300; set model.vocab_size=400,",
        ),
    ],
)
def test_settings_that_are_wrong(
    moray: Moray, dataset: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    assert message in refusal_of_pretrain(moray, dataset, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout__tp": 4, "model__attention__n_heads": 2},
            "layout.tp=4 must divide attention.n_heads=2; try [1, 2]",
        ),
        ({"layout__ep": 3}, "layout.ep=3 must divide n_experts=8 and dp_shard * tp = 4; try [1, 2, 4]"),
        ({"layout__dp_shard": 3}, "layout.dp_replicate=1 * dp_shard=3 * tp=1 = 3 must equal the 4 workers"),
        ({"train__global_batch": 6}, "train.global_batch=6 must be a multiple of the 4 data-parallel ranks"),
    ],
)
def test_layouts_that_do_not_fit_four_workers(
    moray: Moray, dataset: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    four = {"cluster__launcher": "ray", "cluster__workers": 4}
    assert message in refusal_of_pretrain(moray, dataset, tmp_path / "run", **four, **changes)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    """A dataset to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def test_data_that_is_not_finished(moray: Moray, copied: Path, tmp_path: Path) -> None:
    copied.rename(copied.with_name("data.moray-unfinished"))
    line = refusal_of_pretrain(moray, copied, tmp_path / "run")
    assert f"data.path={copied} is unfinished" in line
    assert "run `moray prepare` again" in line


def test_a_truncated_shard_is_named_with_the_byte_where_it_ends(moray: Moray, copied: Path, tmp_path: Path) -> None:
    shard = copied / "train-00000.tar"
    size = shard.stat().st_size
    os.truncate(shard, 1000)
    line = refusal_of_pretrain(moray, copied, tmp_path / "run")
    assert f"{shard} ends at byte 1000 of {size}" in line


def test_an_altered_shard_is_named_with_sample_and_byte(moray: Moray, copied: Path, tmp_path: Path) -> None:
    """Only reading it can tell: the run ends with the one line, and what came before is committed history."""
    shard, (split,) = copied / "train-00000.tar", Dataset.open(copied).splits["train"]
    content = bytearray(shard.read_bytes())
    samples = samples_of(split)
    for sample in samples:
        content[sample.tokens.offset + sample.tokens.length // 2] ^= 1
    shard.write_bytes(content)
    outcome = moray("pretrain", *tiny(copied, tmp_path / "run", train__steps=3))
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"moray: {shard}, sample ")
    assert any(f"sample {sample.key}, byte {sample.tokens.offset}: " in last for sample in samples)
    assert "restore the file from a copy, or run `moray prepare` again" in last


def test_a_run_folder_of_another_model(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert moray("pretrain", *tiny(dataset, run, train__steps=2)).code == 0
    line = line_of(moray("pretrain", *tiny(dataset, run, train__steps=2, model__ffn__width=64)))
    assert line.startswith(
        f"moray: run.dir={run} holds a different run: model.ffn.width=64 (there: 48); choose another"
    )


def test_a_run_trained_on_other_data(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert moray("pretrain", *tiny(dataset, run, train__steps=2)).code == 0
    source = Path(json.__file__).parent
    assert moray("prepare", source, "--out", other, "--tokenizer", dataset, "--validation", "0.3").code == 0
    line = line_of(moray("pretrain", *tiny(other, run, train__steps=3)))
    fingerprints = [json.loads((folder / "index.json").read_text())["fingerprint"] for folder in (other, dataset)]
    assert f"data.path={other} has fingerprint {fingerprints[0]}, but this run was trained on {fingerprints[1]}" in line


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of the given size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a tmpfs here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("size", ["8k", "300k"])
def test_a_disk_without_room_for_one_commit(
    moray: Moray, dataset: Path, disk: Callable[[str], Path], size: str
) -> None:
    run = disk(size) / "run"
    line = refusal_of_pretrain(moray, dataset, run)
    assert f"run.dir={run}: a commit takes at least 0.4 MiB, but its disk has 0." in line
    assert line.endswith("MiB left; free some or choose another")


def test_a_disk_that_fills_before_the_workers_start(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC; config.toml is made to land there."""
    (tmp_path / "run").mkdir()
    os.symlink("/dev/full", tmp_path / "run" / f"config.{os.getpid()}.partial")
    line = refusal_of_pretrain(moray, dataset, tmp_path / "run")
    assert line.startswith("moray: the disk is full: ")
    assert line.endswith("free space and give the same command again")


def test_a_disk_that_fills_while_training(moray: Moray, dataset: Path, disk: Callable[[str], Path]) -> None:
    """There is room for one commit, which stays whole; the second fails, and the third, which is its retry."""
    run = disk("900k") / "run"
    arguments = tiny(dataset, run, train__steps=6, checkpoint__every=2, checkpoint__keep=5)
    outcome = moray("pretrain", *arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "step 4 was not committed" in " ".join(outcome.err.split()), "it is said while there is time to act"
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"moray: run.dir={run}: the disk is full: step 6 was not committed: ")
    assert "No space left on device" in last
    assert [commit.step for commit in list_commits(run / "checkpoints")] == [2]
    subprocess.run(["mount", "-o", "remount,size=9m", run.parent], check=True)
    assert moray("pretrain", *arguments).code == 0, "the same command goes on once there is room"
    assert [commit.step for commit in list_commits(run / "checkpoints")] == [2, 4, 6]
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moray.jobs.cli import dispatch

    run = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        words = tiny(dataset, run, train__steps=4, checkpoint__every=2, model__max_seq_len=128)
        assert dispatch(["pretrain", *words]) == 0
    return run


def test_generate_continues_the_prompt_and_the_seed_decides(moray: Moray, finished: Path) -> None:
    first, again, other = (
        moray("generate", finished, "--prompt", "def é(", "--max-new-tokens", "20", "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("def é(")
    assert first.out.endswith("\n")
    assert len(first.out) > len("def é(\n")
    assert first == again != other


@pytest.mark.parametrize("prompt", ["-- select all", "--", "---\ntitle: x = 1\n", "- one", "--seeds", "-1", "=", ""])
def test_a_prompt_may_look_like_an_option(moray: Moray, finished: Path, prompt: str) -> None:
    outcome = moray("generate", finished, "--prompt", prompt, "--max_new_tokens", 3, "--temperature", 0)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(prompt)
    assert outcome.out == moray("generate", finished, f"--prompt={prompt}", "--max-new-tokens=3", "--temperature=0").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", os.fsdecode(b"caf\xe9")], r"prompt='caf\udce9' is not UTF-8"),
        (["--max-new-tokens", "128"], "prompt tokens and max_new_tokens=128 exceed max_seq_len=128"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0 (greedy) or more"),
        (["--top-p", "0"], "top_p=0.0 must lie above 0 and at most at 1"),
        (["--top-k", "-3"], "top_k=-3 must be 0 (all) or more"),
    ],
)
def test_generation_that_cannot_be(moray: Moray, finished: Path, options: list[str], message: str) -> None:
    assert message in line_of(moray("generate", finished, "--prompt", "def", *options))


def test_a_prompt_longer_than_the_model_can_take(moray: Moray, finished: Path) -> None:
    line = line_of(moray("generate", finished, "--prompt", "x = 1; " * 200))
    assert "prompt tokens leave no room for others: max_seq_len=128" in line


def test_folders_that_are_no_runs(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    assert "nowhere is not a run: there is no such folder" in line_of(moray("generate", "nowhere", "--prompt", "x"))
    assert f"{dataset} holds no commit yet" in line_of(moray("generate", dataset, "--prompt", "x"))
    assert f"{dataset} holds no checkpoints" in line_of(moray("checkpoints", dataset))


def flip_a_bit(run: Path, step: int) -> Path:
    (file,) = (run / "checkpoints" / f"step-{step:09d}").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def test_generate_passes_over_a_damaged_commit_loudly(moray: Moray, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    words = ["generate", run, "--prompt", "x", "--max-new-tokens", "5", "--temperature", "0"]
    shutil.rmtree(run / "checkpoints" / "step-000000004")
    of_step_2 = moray(*words)
    shutil.copytree(finished / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    file = flip_a_bit(run, 4)
    outcome = moray(*words)
    assert (outcome.code, outcome.out) == (0, of_step_2.out)
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"moray: refused the damaged commit step-000000004: {file}: its sha256 is")
    (run / "checkpoints" / "step-000000002" / "manifest.json").write_text("{}")
    outcome = moray(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "step-000000004" in outcome.err
    assert "step-000000002" in outcome.err
    assert f"{run} holds no whole commit; `moray checkpoints {run} --verify` says more" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "Missing from moray generate: PATH --prompt STR; `moray generate --help` says more"),
        (["generate", "RUN", "--promt", "a"], "--promt is not an option of moray generate; did you mean --prompt?"),
        (["generate", "RUN", "--max_new_token=3"], "--max-new-token is not an option of moray generate; did you mean"),
        (["generate", "RUN", "--prompt", "--top_k=3"], "Missing value for argument '--prompt'. Expected 1 values; "),
        (["generate", "RUN", "--prompt", "--top-k", "3"], "Missing value for argument '--prompt'. Expected 1 values; "),
        (["generate", "RUN", "--prompt"], "Missing value for argument '--prompt'. Expected 1 values; `moray generate"),
        (["generate", "RUN", "--prompt", "a", "--top-k", "b"], "Error parsing --top-k: invalid literal for int()"),
        (["generate", "RUN", "OTHER", "--prompt", "a"], "Unrecognized options: OTHER; `moray generate --help`"),
        (["generate", "RUN", "/far" * 50, "--prompt", "a"], f"Unrecognized options: {'/far' * 50}; "),
        (["prepare", "stdlib"], "out is missing: the folder to make, or its fsspec URL; for example --out data"),
        (
            ["prepare", "stdlib", "--vocab-sise", "9"],
            "vocab_sise is not a setting of a preparation; did you mean vocab_size?",
        ),
        (["prepare", "stdlib", "--dedup", "some"], "dedup=some must be auto, exact or none"),
        (["prepare", "stdlib", "--overwrite", "--out"], "--out needs a value"),
        (["checkpoints", "RUN", "--verfy"], "--verfy is not an option of moray checkpoints; did you mean --verify?"),
        (["demo", "--dri", "x"], "--dri is not an option of moray demo; did you mean --dir?"),
    ],
)
def test_arguments_that_do_not_fit_their_verb(moray: Moray, words: list[str], message: str) -> None:
    assert line_of(moray(*words)).startswith(f"moray: {message}")


def test_a_switch_can_be_turned_off(moray: Moray, finished: Path) -> None:
    assert moray("checkpoints", finished, "--no-verify").code == 0


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    outcome = moray("pretrain", *tiny(dataset, tmp_path / "run", train__steps=9, optimizer__lr=1e30))
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moray: step ")
    assert "the weights are as step" in last


def test_a_last_step_that_breaks_the_weights_has_failed(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """Its loss was that of the weights before it; only the validation after it sees what it did."""
    run = tmp_path / "run"
    plan = {"train__steps": 2, "optimizer__warmup_steps": 0, "checkpoint__every": 1}
    assert moray("pretrain", *tiny(dataset, run, **{**plan, "train__steps": 1})).code == 0
    outcome = moray("pretrain", *tiny(dataset, run, **plan, optimizer__lr=1e38, optimizer__min_lr_ratio=1))
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith("moray: step 2: validation loss nan; the step broke the weights and is not committed. Try")
    assert [commit.step for commit in list_commits(run / "checkpoints")] == [1]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_the_sequences_of_a_committed_run_cannot_be_skipped(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    """With config.toml gone, a larger batch would have gone on at step 2 * 8, past sequences 8 to 16."""
    run = tmp_path / "run"
    assert moray("pretrain", *tiny(dataset, run, train__steps=2)).code == 0
    (run / "config.toml").unlink()
    rows = read_metrics(run)
    line = line_of(moray("pretrain", *tiny(dataset, run, train__steps=4, train__global_batch=8, train__seed=5)))
    assert "holds a different run: train.seed=5 (there: 0), train.global_batch=8 (there: 4)" in line
    assert read_metrics(run) == rows


def test_torchrun_tells_a_mistake_once(dataset: Path, tmp_path: Path) -> None:
    words = tiny(dataset, tmp_path / "run", cluster__launcher="torchrun", train__steps="many")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moray"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "pretrain", *words], env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode != 0
    assert done.stderr.count("moray: train.steps=many") == 1


def test_the_module_is_the_command(finished: Path) -> None:
    """`python -m moray` in a shell of its own: nothing but the answer, and nothing on standard error."""
    command = [sys.executable, "-m", "moray", "checkpoints", str(finished)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole by its manifest" in done.stdout


def test_a_path_that_cannot_be_written_is_named(moray: Moray, dataset: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    below = tmp_path / "file" / "out"
    assert f"{below}.moray-unfinished: Not a directory; " in line_of(moray("export", finished, "--out", below))
    assert str(below) in line_of(moray("prepare", "stdlib", "--out", below))
    assert str(below) in line_of(moray("pretrain", *tiny(dataset, below)))


@pytest.mark.parametrize("below", ["", "runs/first"])
def test_a_link_to_a_disk_that_is_not_mounted(moray: Moray, dataset: Path, tmp_path: Path, below: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "moray")
    line = line_of(moray("pretrain", *tiny(dataset, link / below)))
    assert line.startswith(f"moray: run.dir={link / below} leads over the link {link} to {tmp_path}/disk/moray, which")
    assert not (tmp_path / "disk").exists()


def test_storage_that_does_not_answer_is_neither_damage_nor_a_traceback(
    moray: Moray, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "read_bytes", stale)
    outcome = moray("checkpoints", finished)
    assert (outcome.code, outcome.out) == (1, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("moray: [Errno 116] Stale file handle: ")
    assert line.endswith("the storage may answer again: give the same command once more")
