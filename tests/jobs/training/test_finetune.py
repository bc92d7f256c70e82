"""`moray finetune`, end to end: what it learns, what it tells, that it goes on after a kill, and what it refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny, tiny_from
from transformers import AutoModelForCausalLM, AutoTokenizer

from moray import UserError
from moray.data.blocks import FIRST, BlockReader
from moray.data.dataset import Dataset
from moray.data.rows import rows_of
from moray.data.tokenizer import load_tokenizer
from moray.jobs.cli import dispatch
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.config.starting import STARTS
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.training.metrics import read_metrics

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
WORDS = ("red", "blue", "list", "dict")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues in which the word that was asked for is the answer; some are long, some have two answers."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("source") / "echo.jsonl"
    with open(path, "w") as file:
        for number in range(200):
            said = []
            for _ in range(draw.randint(1, 3)):
                word = draw.choice(WORDS)
                asked = f"Say {word}" + " please" * draw.randint(0, 5) + f" {number}"
                said += [{"role": "user", "content": asked}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": said}) + "\n")
    return path


@pytest.fixture(scope="module")
def chat(source: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "data"
    prepare(PrepareConfig(sources=(source,), out=folder, tokenizer=dataset, validation=0.1, kind="chat"))
    return folder


@pytest.fixture(scope="module")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, folder, train__steps=2, train__eval_every=0)]) == 0
    return folder


def words(base: Path, chat: Path, run: Path, **changes: object) -> list[str]:
    return ["finetune", *tiny_from(base, chat, run, **{"train__seq_len": 128, "optimizer__lr": 0.01, **changes})]


@pytest.fixture(scope="module")
def tuned(base: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(words(base, chat, folder, train__steps=160, train__eval_every=80)) == 0
    return folder


def test_it_learns_to_answer_and_to_stop(tuned: Path) -> None:
    rows = read_metrics(tuned)
    assert rows[-1]["validation_loss"] < 0.2 < 3 < rows[0]["loss"]
    told = rows[-1]["answers"]
    assert [answer["written"] for answer in told] == [answer["expected"] for answer in told]
    assert all(answer["expected"].removesuffix("<|im_end|>") in WORDS for answer in told)
    assert rows[-1]["answers_ended"] == 1


def test_answers_are_in_the_log_and_in_tensorboard(tuned: Path) -> None:
    events = [json.loads(line) for line in (tuned / "events.jsonl").read_text().splitlines()]
    answered = [event for event in events if event["kind"] == "answered"]
    assert [event["step"] for event in answered] == [80, 160]
    board = EventAccumulator(str(tuned / "tensorboard"))
    board.Reload()
    (shown, *_) = [board.Tensors(name)[-1] for name in board.Tags()["tensors"] if name.startswith("answers/0")]
    assert answered[-1]["written"] in shown.tensor_proto.string_val[0].decode()
    assert board.Scalars("answers_ended")[-1].value == 1


def test_the_first_loss_is_what_transformers_computes_on_answers_alone(
    moray: Moray, base: Path, source: Path, chat: Path, tmp_path: Path
) -> None:
    """The mean over all answer tokens of the global batch, dialogue by dialogue, with the mask of transformers."""
    assert moray("export", base, "--out", tmp_path / "hf").code == 0
    (tmp_path / "hf" / "chat_template.jinja").write_bytes((chat / "chat_template.jinja").read_bytes())
    data = Dataset.open(chat)
    longest = max(int(lengths.max()) for lengths in map(data.splits["train"].lengths, range(len(data.splits["train"]))))
    n_rows = int(rows_of(data, "train", longest, 1 << 20, "cut").counts.sum())
    once = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}
    sizes = {"train__seq_len": longest, "train__global_batch": n_rows}
    outcome = moray(*words(base, chat, tmp_path / "run", **once, **sizes))
    assert outcome.code == 0, outcome.err
    assert f"{data.splits['train'].n_documents} dialogues in {n_rows} rows of {longest} tokens" in outcome.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    trained = documents(data, "train")
    total, count = 0.0, 0
    for line in source.read_text().splitlines():
        whole = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        if whole["input_ids"][0].tolist() in trained:
            targets = torch.where(whole["assistant_masks"][0].bool(), whole["input_ids"][0], -100)[1:]
            with torch.no_grad():
                logits = model(whole["input_ids"]).logits[0, :-1]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets != -100).sum())
    (row,) = read_metrics(tmp_path / "run")
    assert row["tokens"] == count
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def documents(data: Dataset, split: str) -> list[list[int]]:
    reader, found = BlockReader(data, split), []
    for number, shard in enumerate(data.splits[split]):
        tokens, flags = reader.read(number, 0, shard.n_tokens)
        starts = [*(flags & FIRST).nonzero()[0].tolist(), len(tokens)]
        found += [tokens[a:b].tolist() for a, b in pairwise(starts)]
    return found


def test_a_kill_changes_nothing(base: Path, chat: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, the same command again: every loss has the same bits, and no answer is another one."""
    changes = {"train__epochs": 2, "train__eval_every": 5, "checkpoint__every": 4}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "moray", *words(base, chat, tmp_path / name, **changes)]

    killed = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 50
        while len(read_metrics(tmp_path / "killed")) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    reached = len(read_metrics(tmp_path / "killed"))
    for name in ("killed", "whole"):
        subprocess.run(command(name), env=environment, check=True, capture_output=True, timeout=50)
    cut, whole = (told(read_metrics(tmp_path / name)) for name in ("killed", "whole"))
    assert 6 <= reached < len(whole)
    assert cut == whole


def test_dialogues_are_mixed_as_text_is(dataset: Path, base: Path, chat: Path, tmp_path: Path, moray: Moray) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(chat, copy)

    def asked(run: str, mix: str) -> list[str]:
        return words(base, chat, tmp_path / run, data__path="", data__mix=mix, train__steps=2)

    outcome = moray(*asked("run", f"one=3:{chat},two=1:{copy}"))
    assert outcome.code == 0, outcome.err
    assert "one train: " in outcome.err
    assert "two validation: " in outcome.err
    row = read_metrics(tmp_path / "run")[-1]
    assert row["validation_loss/one"] == row["validation_loss/two"] == pytest.approx(row["validation_loss"])
    prompts = [answer["prompt"] for answer in row["answers"]]
    assert prompts[0::2] == prompts[1::2], "from each in turn"
    with pytest.raises(
        UserError, match=rf"one={chat} is of kind chat, but data.mix: two={dataset} of kind text; a run"
    ):
        dispatch(asked("other", f"one=3:{chat},two=1:{dataset}"))
    (copy / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match=rf"one={chat} and data.mix: two={copy} write dialogues by different templates"):
        dispatch(asked("other", f"one=3:{chat},two=1:{copy}"))
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/two", recursive=True)
    try:
        with pytest.raises(UserError, match=r"data\.mix: two=memory://two write dialogues by different templates"):
            dispatch(asked("other", f"one=3:{chat},two=1:memory://two"))
    finally:
        memory.rm("/two", recursive=True)


def told(rows: list[dict[str, Any]]) -> list[Any]:
    names = ("step", "loss", "grad_norm", "positions", "validation_loss", "answers")
    return [{name: row.get(name) for name in names} for row in rows]


def test_epochs_are_steps(base: Path, chat: Path, tmp_path: Path) -> None:
    rows = int(rows_of(Dataset.open(chat), "train", 128, 1 << 20, "cut").counts.sum())
    asked = words(base, chat, tmp_path / "run", train__epochs=2.5)[1:]
    config = load_config(*parse_settings(asked), STARTS["finetune"])
    assert config.train.steps == -(-int(2.5 * rows) // 4)
    default = load_config(*parse_settings(words(base, chat, tmp_path / "run")[1:]), STARTS["finetune"])
    assert (default.train.epochs, default.train.objective) == (3.0, "sft")
    assert default.train.steps == -(-3 * rows // 4)
    stated = load_config(*parse_settings(words(base, chat, tmp_path / "run", train__steps=7)[1:]), STARTS["finetune"])
    assert (stated.train.steps, stated.train.epochs) == (7, None)
    with pytest.raises(UserError, match=r"train.steps=7 and train.epochs=2 both say how long the run is"):
        load_config(*parse_settings(words(base, chat, tmp_path / "run", train__steps=7, train__epochs=2)[1:]))


def test_a_run_says_its_steps_and_its_epochs(tuned: Path, base: Path, chat: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = words(base, chat, run, train__epochs=0.1, train__eval_every=0)
    assert dispatch(settings) == 0
    recorded = load_config(str(run / "config.toml"), {})
    assert recorded.train.epochs == 0.1
    assert recorded == load_config(*parse_settings(settings[1:]), STARTS["finetune"])
    longer = load_config(str(run / "config.toml"), {"train.epochs": "0.2"})
    assert longer.train.steps > recorded.train.steps
    assert load_config(str(run / "config.toml"), {"train.steps": "3"}).train.epochs is None


def test_the_export_answers_as_the_run_did(moray: Moray, tuned: Path, tmp_path: Path) -> None:
    """The folder has the template and the stop tokens: transformers writes the same answers, greedily."""
    assert moray("export", tuned, "--out", tmp_path / "hf").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for answer in read_metrics(tuned)[-1]["answers"]:
        asked = answer["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert tokenizer.decode(prompt["input_ids"][0]) == answer["prompt"]
        found = model.generate(**prompt, do_sample=False, max_new_tokens=48)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(found) == answer["written"]


def test_a_base_that_ends_at_documents_alone_learns_to_end_turns(
    moray: Moray, base: Path, dataset: Path, source: Path, tmp_path: Path
) -> None:
    """A base model's generation_config names its end of document: after the tuning, the end of a turn stops it, too."""
    assert moray("export", base, "--out", tmp_path / "hf").code == 0
    document_end = load_tokenizer(dataset).eos_id
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": document_end}))
    assert load_tokenizer(tmp_path / "hf").stop_ids == (document_end,)
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    given = {"tokenizer": tmp_path / "hf", "validation": 0.1}
    prepare(PrepareConfig(sources=(source,), out=tmp_path / "data", kind="chat", **given))  # type: ignore[arg-type]
    once = {"train__steps": 1, "train__eval_every": 0, "optimizer__warmup_steps": 1}
    assert moray(*words(tmp_path / "hf", tmp_path / "data", tmp_path / "run", **once)).code == 0
    assert moray("export", tmp_path / "run", "--out", tmp_path / "tuned").code == 0
    for folder in (tmp_path / "data", tmp_path / "run" / "tokenizer", tmp_path / "tuned"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.stop_ids == (document_end, tokenizer.backend.token_to_id("<|im_end|>"))


def test_epochs_need_the_data(moray: Moray, base: Path, tmp_path: Path) -> None:
    outcome = moray(*words(base, tmp_path / "elsewhere", tmp_path / "run"))
    assert outcome.code == 2
    assert "is not here, and train.epochs=3 is counted from it" in outcome.err


def test_what_it_refuses(moray: Moray, base: Path, chat: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for arguments, message in (
        (words(base, dataset, run), "is of kind text, which `moray pretrain` learns from"),
        (["pretrain", *words(base, chat, run)[1:]], "is of kind chat, which `moray finetune` learns from"),
        (["finetune", "--data.path", chat, "--run.dir", run], "model.from is missing: the run or Hugging Face folder"),
        (words(base, chat, run, train__seq_len=16), "train.seq_len=16 is under every dialogue of the train split"),
        (words(base, chat, run, data__long_dialogues="keep"), "data.long_dialogues=keep"),
    ):
        outcome = moray(*arguments)
        assert outcome.code == 2
        assert message in outcome.err
    assert not run.exists()


def test_it_is_another_run_with_another_objective(moray: Moray, tuned: Path, base: Path, chat: Path) -> None:
    outcome = moray(*words(base, chat, tuned, train__steps=200, data__long_dialogues="drop"))
    assert outcome.code == 2
    assert "holds a different run: data.long_dialogues=drop (there: cut)" in outcome.err
