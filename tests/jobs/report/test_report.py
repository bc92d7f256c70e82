"""`moray report`, of real runs: one that was killed and went on, a dense one; and with devices added by hand."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_hand import KEPT_EVERY, add_devices
from report_page import Element, addresses, chart, curve, pixels, read_page, table, titles
from tiny import tiny

from moray.cluster.events import EventLog, read_events
from moray.jobs.cli import dispatch
from moray.jobs.runs.status import status_of
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

Moray = Callable[..., Any]
STEPS, KILLED_AT = 24, 17
LAYERS, EXPERTS, DEVICES = 2, 8, 4

# Ends itself by a real SIGKILL once a step's row is written and before it is committed.
KILLED = f"""
import os, signal, sys
import moray.jobs.training.trainer
from moray.jobs.cli import main

speed = moray.jobs.training.trainer.speed

def speed_or_death(training, *rest):
    if training.step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return speed(training, *rest)

moray.jobs.training.trainer.speed = speed_or_death
main()
"""


def words(dataset: Path, run: Path, **changes: object) -> list[str]:
    plan = {"train__steps": STEPS, "train__eval_every": 8, "checkpoint__every": 5, "model__n_layers": 1 + LAYERS}
    return ["pretrain", *tiny(dataset, run, **{**plan, **changes})]


@pytest.fixture(scope="module")
def killed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only process was killed, and that the same command went on with."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        done = subprocess.run([sys.executable, "-c", KILLED, *words(dataset, run)], capture_output=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert dispatch(words(dataset, run)) == 0
        assert dispatch(["report", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def page(killed: Path) -> Element:
    return read_page(killed / "report.html")


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    """The run again, to be changed."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def report(moray: Moray, run: Path | str, *options: object) -> Element:
    outcome = moray("report", run, *options)
    assert (outcome.code, outcome.err) == (0, "")
    return read_page(Path(outcome.out.strip()))


def facts(page: Element) -> dict[str, str]:
    return {fact.all("span")[0].text: fact.one("b").text for fact in page.one(class_="facts").all("div")}


def test_the_head_says_what_status_and_metrics_say(page: Element, killed: Path) -> None:
    rows, status = read_metrics(killed), status_of(killed)
    assert (page.one("h1").text, page.one(class_="state").text, status.state) == ("killed", "done", "done")
    found = facts(page)
    assert found["steps"] == str(STEPS) == str(status.step)
    assert found["loss"] == f"{rows[-1]['loss']:.3f}"
    assert found["validation loss"] == f"{rows[-1]['validation_loss']:.3f}"
    assert found["tokens"] == f"{sum(row['tokens'] for row in rows) / 1000:.3g}k"
    names, values = ([part.text for part in page.one("dl").all(tag)] for tag in ("dt", "dd"))
    said = dict(zip(names, values, strict=True))
    assert said["layout"] == rows[-1]["layout"]
    assert said["folder"] == str(killed)
    assert "parameters, of which a token passes" in said["model"]
    assert f"experts: {EXPERTS} of width 16 in {LAYERS} layers" in said["model"]


def test_curves_hold_the_numbers_of_each_step(page: Element, killed: Path) -> None:
    """Back from the points of the drawing, to what a tenth of a pixel is worth."""
    rows = read_metrics(killed)
    for title, name, values in (
        ("Loss", "loss", [row["loss"] for row in rows]),
        ("Gradient norm", "norm", [row["grad_norm"] for row in rows]),
        ("Learning rate", "rate", [row["lr"] for row in rows]),
        ("Auxiliary loss", "auxiliary", [row["auxiliary_loss"] for row in rows]),
        ("Speed", "that teach", [row["tokens_per_second"] for row in rows]),
        ("MFU", "MFU", [100 * row["mfu"] for row in rows]),
        ("Memory", "peak, rank 0", [row["memory_bytes"] / 2**30 for row in rows]),
        ("Experts: max/mean load", "mean", [np.mean(row["expert_balance"]) for row in rows]),
        ("Experts: entropy", "mean", [np.mean(row["expert_entropy"]) for row in rows]),
    ):
        steps, drawn = curve(chart(page, title), name)
        assert steps == pytest.approx(range(1, STEPS + 1), abs=0.01), title
        assert drawn == pytest.approx(values, abs=1e-3 * max(values)), title
    steps, drawn = curve(chart(page, "Loss"), "validation")
    assert steps == pytest.approx([8, 16, 24], abs=0.01)
    assert drawn == pytest.approx([row["validation_loss"] for row in rows if "validation_loss" in row], rel=1e-3)
    smoothed = curve(chart(page, "Loss"), "loss, smoothed")[1]
    assert np.ptp(np.diff(smoothed)) < np.ptp(np.diff([row["loss"] for row in rows]))
    described = chart(page, "Loss").one("desc").text
    assert f"{rows[0]['loss']:.4g} at step 1, {rows[-1]['loss']:.4g} at step {STEPS}" in described


def test_a_kill_is_told_and_marked(page: Element, killed: Path) -> None:
    """Of a kill of all processes no event tells; the rows of 11 to 16 or 16 stand twice in the file."""
    (resume,) = [event for event in read_events(killed / "events.jsonl") if event["kind"] == "resume"]
    back, last = resume["step"], KILLED_AT - 1
    assert back in (10, 15), "15, unless the kill came while it was being written"
    (row,) = table(page.one(id="faults"))
    assert row[1:] == [
        str(last),
        "all processes had ended, nobody was left to tell why, and were started again",
        "",
        "",
        str(last - back),
    ]
    assert status_of(killed).steps_again == last - back
    x = [50 + (step - 1) / (STEPS - 1) * 500 for step in (back, last)]
    for name, at in zip(("resumed", "fault"), x, strict=True):
        assert page.one("path", class_=name).attributes["d"] == f"M{at:.1f} 8V168"
    assert len(page.all("use", href="#marks")) == len(titles(page))


def test_settings_that_differ_and_all_of_them(page: Element, killed: Path) -> None:
    config = page.one(id="config")
    found = {name: (value, default) for name, value, default in table(config)}
    assert found["train.steps"] == (str(STEPS), "1000")
    assert found["cluster.launcher"] == ("local", "ray")
    assert found["model.moe.n_experts"] == (str(EXPERTS), "")
    assert found["model.attention.qk_norm"] == ("head", "none")
    assert not {"train.seed", "optimizer.lr", "optimizer.clip_norm", "run.trackers"} & set(found)
    assert config.one("details").one("pre").text == (killed / "config.toml").read_text()


def test_the_same_run_gives_the_same_page_and_samples(
    moray: Moray, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever it is named, into a folder that is made."""
    again = tmp_path / "new" / "again.html"
    monkeypatch.chdir(killed.parent)
    report(moray, killed.name, "--out", again)
    assert again.read_bytes() == (killed / "report.html").read_bytes()


def test_samples_go_on_with_documents_of_the_validation_split(page: Element, dataset: Path) -> None:
    from moray.data.dataset import Dataset
    from moray.data.stream import evaluation_batches
    from moray.data.tokenizer import load_tokenizer

    split = {"seq_len": 32, "global_batch": 1, "lanes": [0]}
    batch = next(evaluation_batches(Dataset.open(dataset), "validation", **split))  # type: ignore[arg-type]
    beginning = load_tokenizer(dataset).decode(batch.tokens_BT[0].tolist())
    samples = page.one(id="samples").all(class_="sample")
    assert len(samples) == 2
    prompts = [sample.all("b")[0].text for sample in samples]
    assert len(prompts[0]) > 20
    assert beginning.endswith(prompts[0])
    assert prompts[0] != prompts[1]
    for sample, prompt in zip(samples, prompts, strict=True):
        written, document = (pre.text for pre in sample.all("pre"))
        assert written.startswith(prompt)
        assert len(written) > len(prompt)
        assert document.startswith(prompt)


def test_the_page_asks_for_nothing_and_lets_nothing_in(page: Element) -> None:
    found = addresses(page)
    assert "#marks" in found
    assert [address for address in found if not address.startswith(("#", "data:image/png;base64,"))] == []
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none'; img-src data:; ")


def test_a_dense_model_has_no_experts(moray: Moray, dataset: Path, tmp_path: Path) -> None:
    assert dispatch(words(dataset, tmp_path / "dense", model__moe="none", train__steps=3)) == 0
    page = report(moray, tmp_path / "dense")
    assert titles(page) == ["Loss", "Gradient norm", "Learning rate", "Speed", "MFU", "A step", "Memory"]
    assert page.all(id="experts") == page.all(class_="heat") == []
    assert "None." in page.one(id="faults").text
    assert curve(chart(page, "Loss"), "loss")[1] == pytest.approx(
        [row["loss"] for row in read_metrics(tmp_path / "dense")], rel=1e-3
    )


def color_of(ratio: float, doublings: int) -> tuple[bool | None, float]:
    """Whether a load over its mean is red, and how strong its colour is."""
    strength = float(np.clip(np.log2(max(ratio, 1e-9)), -doublings, doublings)) / doublings
    return (strength > 0 if abs(strength) > 1 / 16 else None), abs(strength)


def assert_shows(heat: Element, ratios_RC: np.ndarray, doublings: int) -> None:
    image = pixels(heat).astype(int)
    assert image.shape[:2] == ratios_RC.shape
    for place, ratio in np.ndenumerate(ratios_RC):
        red, _, blue, alpha = image[place]
        is_red, strength = color_of(ratio, doublings)
        assert alpha / 255 == pytest.approx(strength, abs=0.04)
        assert is_red is None or (red > blue) == is_red


def test_heat_maps_curves_and_tables_of_experts_on_devices(moray: Moray, copied: Path) -> None:
    written = add_devices(copied, LAYERS, EXPERTS, DEVICES)
    counted = {step: made for step, made in sorted(written.items()) if step % KEPT_EVERY == 0}
    page = report(moray, copied, "--samples", "0")
    experts = page.one(id="experts")
    busiest, *rest = experts.all(class_="heat")
    balance_LS = np.array([made["expert_balance"] for made in counted.values()]).T
    assert_shows(busiest, balance_LS, 2)
    for layer in range(LAYERS):
        of_layer = experts.all(class_="layer")[layer]
        maps = of_layer.all(class_="heat")
        for heat, name, doublings in zip(maps, ("expert_load", "device_load"), (2, 1), strict=True):
            load_SR = np.array([made[name][layer] for made in counted.values()], float)
            assert_shows(heat, (load_SR / load_SR.mean(1, keepdims=True)).T, doublings)
            assert heat.attributes["data-first"] == str(min(counted))
    assert "1 unused" in experts.all(class_="layer")[1].text
    sent_SLP = np.array([made["rows_sent"] for made in counted.values()], float)
    over_time, by_layer = rest[-2:]
    assert_shows(over_time, (sent_SLP.sum(1) / sent_SLP.sum(1).mean(1, keepdims=True)).T, 1)
    assert_shows(by_layer, sent_SLP.mean(0) / sent_SLP.mean((0, 2))[:, None], 1)
    rows = table(experts)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    load_SLP = np.array([made["device_load"] for made in counted.values()], float)
    ratio_SLP = load_SLP / load_SLP.mean(2, keepdims=True)
    for device, row in enumerate(rows):
        assert float(row[1]) == pytest.approx(ratio_SLP[..., device].mean(), abs=5e-4)
        assert float(row[2]) == pytest.approx(ratio_SLP[..., device].max(), abs=5e-4)
        assert row[3] == f"{sent_SLP[..., device].sum(1).mean() / 1000:.3g}k"
        mean_bytes = np.mean([made["bytes_sent"][device] for made in counted.values()])
        assert row[4] == f"{mean_bytes / 1024:,.4g} KiB"
    for title, name in (
        ("Experts: coefficient of variation", "expert_cv"),
        ("Devices: max/mean load", "device_balance"),
        ("Devices: coefficient of variation", "device_cv"),
        ("Devices: entropy", "device_entropy"),
        ("Dropped", "dropped_by_layer"),
        ("Router z", "router_z"),
    ):
        means = [np.mean(made[name]) for _, made in sorted(written.items())]
        assert curve(chart(page, title), "mean")[1] == pytest.approx(means, abs=2e-3 * max(1, *means)), title


def test_faults_with_what_they_cost(moray: Moray, tmp_path: Path) -> None:
    """Two by events: steps 9 and 10 undone, and none. Undone steps, of an absurd loss, stand in no curve."""
    log, at = EventLog(tmp_path / "events.jsonl"), datetime(2026, 11, 28, 2, 0, 5, tzinfo=UTC).timestamp()
    log.write("start", generation=1, workers=2)
    log.write("fault", generation=1, reason="was killed by SIGKILL", rank=1, pid=7, node="n2", step=10, time=at)
    log.write("start", generation=2, workers=2)
    log.write("resume", generation=2, step=8, position=0)
    log.write("recovered", generation=2, seconds=2.25)
    log.write("fault", generation=2, reason="node is silent", rank=None, node="n1", step=None)
    log.write("node_set_aside", node="n1", why="silent twice")
    log.write("resume", generation=3, step=12, position=0)
    log.write("end", code=1)
    steps = [(step, 1, 99.0 if step > 8 else 3.0) for step in range(1, 11)]
    lines = [{"step": step, "generation": generation, "loss": loss} for step, generation, loss in steps]
    lines.append({"resumed_from": 8, "generation": 2})
    lines += [{"step": step, "generation": 2 + (step > 12), "loss": 2.5} for step in range(9, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(moray, tmp_path)
    first, second, third = table(page.one(id="faults"))
    assert first == ["2026-11-28 02:00:05", "10", "was killed by SIGKILL", "rank 1, n2", "2.2 s", "2"]
    assert second[1:] == ["12", "node is silent", "n1", "", "0"]
    assert third[2] == "node n1 is set aside: silent twice; others take its place"
    assert curve(chart(page, "Loss"), "loss")[1].max() == pytest.approx(3, abs=0.01)
    assert "config.toml" in page.one(id="config").text, "that there is none"


EVIL = "<script>alert('evil')</script><img src=x onerror=alert(1)>\"'&"


def test_nothing_that_a_run_says_is_markup(moray: Moray, copied: Path) -> None:
    run = copied.rename(copied.with_name("<script>alert(1)<"))
    log = EventLog(run / "events.jsonl")
    log.write("fault", generation=2, reason=EVIL, rank=0, pid=1, node=EVIL, step=3)
    with open(log.path, "a") as file:
        file.write(json.dumps({"kind": "commit_failed", "error": EVIL + "\ud800"}) + "\n")  # half a character
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"why": EVIL, "nodes": [EVIL], "launcher": EVIL}))
    row = {"step": STEPS + 1, "generation": 9, "loss": 1.0, "layout": EVIL, "expert_balance": [EVIL], "lr": EVIL}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('kind = "adamw"', f"kind = {json.dumps(EVIL)}"))
    page = report(moray, run)
    assert len(page.all("script")) == 1
    assert [image for image in page.all("img") if "onerror" in image.attributes] == []
    assert page.one("h1").text == run.name
    assert page.one("head").one("title").text == f"{run.name}: moray report"
    head = page.one("header").text
    assert head.count(EVIL) == 4, "why, layout, launcher and node"
    cells = table(page.one(id="faults"))
    assert [cells[-2][2], cells[-2][3], cells[-1][2]] == [
        EVIL,
        f"rank 0, {EVIL}",
        f"{EVIL}�; the next commit tries again",
    ]
    assert ["optimizer.kind", EVIL, "adamw"] in table(page.one(id="config"))


def test_a_document_and_what_is_written_after_it_are_no_markup(moray: Moray, tmp_path: Path) -> None:
    source, data, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"<script>alert({number})</script> " * 20)
    assert moray("prepare", source, "--out", data, "--vocab-size", 300, "--validation", 0.3).code == 0
    assert moray("pretrain", *tiny(data, run, train__steps=20, optimizer__lr=0.01)).code == 0
    page = report(moray, run, "--samples", 3)
    samples = page.one(id="samples").all(class_="sample")
    assert len(samples) == 3
    assert all("<script>alert(" in sample.text for sample in samples)
    assert len(page.all("script")) == 1


@pytest.mark.parametrize(
    "lost",
    ["commits", "a commit's bytes", "the dataset", "other data", "the config", "the config's end", "the tokenizer"],
)
def test_what_cannot_be_read_is_said_and_the_rest_is_there(
    moray: Moray, dataset: Path, copied: Path, lost: str
) -> None:
    config = (copied / "config.toml").read_text()
    if lost == "commits":
        shutil.rmtree(copied / "checkpoints")
        why = f"{copied} holds no commit yet"
    elif lost == "a commit's bytes":
        for commit in list_commits(copied / "checkpoints"):
            for file in commit.path.glob("*.safetensors"):
                file.write_bytes(b"x" * file.stat().st_size)
        why = f"{copied} holds no whole commit"
    elif lost == "the dataset":
        (copied / "config.toml").write_text(config.replace(str(dataset), "/nowhere"))
        why = "data.path=/nowhere does not exist"
    elif lost == "other data":
        other = shutil.copytree(dataset, copied.with_name("other"))
        source = Path(json.__file__).parent
        shutil.rmtree(other)
        assert moray("prepare", source, "--out", other, "--tokenizer", dataset, "--validation", 0.3).code == 0
        (copied / "config.toml").write_text(config.replace(str(dataset), str(other)))
        why = "but this run was trained on"
    elif lost == "the tokenizer":
        (copied / "tokenizer" / "tokenizer.json").write_text("{}")
        why = "tokenizer.json"
    elif lost == "the config's end":
        (copied / "config.toml").write_text(config[:100] + "\ndata =")
        why = "config.toml is not TOML: "
    else:
        (copied / "config.toml").unlink()
        why = "the folder has no config.toml"
    page = report(moray, copied)
    assert page.one(id="samples").all(class_="sample") == []
    assert why in page.one("main").text
    assert "Loss" in titles(page)


def test_without_samples_no_weights_are_read(moray: Moray, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    page = report(moray, copied, "--samples", "0")
    assert "left out, as --samples is 0" in page.one(id="samples").text


def test_a_run_without_a_step_says_so(moray: Moray, tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("start", generation=1, workers=1)
    page = report(moray, tmp_path)
    assert "No step has been taken yet" in page.one("main").text
    assert page.all("figure") == []
    assert facts(page)["steps"] == "0"


def test_a_run_of_one_step_is_a_dot(moray: Moray, tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write("start", generation=1, workers=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    page = report(moray, tmp_path)
    assert curve(chart(page, "Loss"), "loss")[1] == pytest.approx([2.5])
    assert len(page.all("path", class_="dots")) == 1


def test_what_is_asked_for_wrongly_is_one_line(moray: Moray, copied: Path, tmp_path: Path) -> None:
    for options, message in (
        ([tmp_path], f"{tmp_path} is not a run; `moray pretrain --run.dir {tmp_path} …` makes one"),
        (["nowhere"], "nowhere is not a run"),
        ([copied, "--out", tmp_path], f"out={tmp_path} is a folder; name a file in it"),
        ([copied, "--samples", "-1"], "samples=-1 must be 0 (none) or more"),
        ([copied, "--smaples", "1"], "--smaples is not an option of moray report; did you mean --samples?"),
    ):
        outcome = moray("report", *options)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"moray: {message}")
        assert len(outcome.err.splitlines()) == 1
