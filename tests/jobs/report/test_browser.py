"""The page in a real browser, where there is one: it runs, asks nobody for anything, and reads out."""

import json
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from by_hand import add_devices
from tiny import tiny

from moray.jobs.cli import dispatch
from moray.jobs.training.metrics import read_metrics

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
OWN_HOSTS = re.compile(rb"google|gvt1")  # which the browser asks for its own updates
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --enable-logging=stderr"
LAYERS, EXPERTS, DEVICES, STEPS = 2, 8, 4, 20

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on PATH")

# Moves the pointer over the first chart and the first heat map, and leaves what was read out in place of the page.
MOVE = """<script>
const said = [];
for (const name of [".chart svg", ".layer img"]) {
  const element = document.querySelector(name), box = element.getBoundingClientRect();
  const at = { clientX: box.right - box.width * 10 / 560, clientY: box.top + 1 };
  element.dispatchEvent(new PointerEvent("pointermove", at));
  said.push(document.getElementById("tip").textContent);
}
document.body.textContent = said.join("|");
</script></body>"""


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, run, train__steps=STEPS, model__n_layers=1 + LAYERS)]) == 0
        add_devices(run, LAYERS, EXPERTS, DEVICES)
        assert dispatch(["report", str(run)]) == 0
    return run


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; returns its document after its scripts, what it complained of, and what it asked of the network."""
    asked: list[bytes] = []
    proxy = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = proxy.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(1000))

    def open_page(page: Path) -> tuple[str, list[str], list[bytes]]:
        asked.clear()
        address = f"--proxy-server=127.0.0.1:{proxy.getsockname()[1]}"
        options = [*QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}", address, "--virtual-time-budget=2000"]
        command = [str(BROWSER), *options, "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        complaints = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
        return done.stdout, complaints, [request for request in asked if request and not OWN_HOSTS.search(request)]

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield open_page
    proxy.shutdown(socket.SHUT_RDWR)
    proxy.close()
    thread.join(10)


def test_it_runs_without_a_complaint_and_asks_nobody(browse: Callable[..., Any], run: Path) -> None:
    document, complaints, asked = browse(run / "report.html")
    assert complaints == asked == []
    n_charts = document.count('<figure class="chart">')
    assert n_charts > 10
    assert document.count('<path class="cursor">') == n_charts, "which page.js adds: the policy lets it run"


def test_what_another_page_does_would_be_seen(browse: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    """And the policy would refuse it: the same in a report neither runs nor asks."""
    bad = '<script>alarm()</script><img src="http://example.org/x.png">'
    (tmp_path / "bad.html").write_text(bad)
    _, complaints, asked = browse(tmp_path / "bad.html")
    assert "alarm is not defined" in complaints[0]
    assert b"http://example.org/x.png" in b"".join(asked)
    text = (run / "report.html").read_text()
    (tmp_path / "changed.html").write_text(text.replace("</header>", bad + "</header>"))
    _, complaints, asked = browse(tmp_path / "changed.html")
    assert asked == []
    assert len(complaints) == 2
    assert all("Content Security Policy" in complaint for complaint in complaints)


def test_the_pointer_reads_out(browse: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    text = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", (run / "report.html").read_text())
    (tmp_path / "moved.html").write_text(text.replace("</body>", MOVE))
    document, complaints, _ = browse(tmp_path / "moved.html")
    assert complaints == []
    of_chart, of_map = document.partition("<body>")[2].partition("</body>")[0].split("|")
    step, *values = of_chart.splitlines()
    assert step == f"step {STEPS}"
    read = dict(value.rsplit(" ", 1) for value in values)
    last = read_metrics(run)[-1]
    assert float(read["loss"]) == pytest.approx(last["loss"], rel=0.01)
    assert float(read["validation"]) == pytest.approx(last["validation_loss"], rel=0.01)
    load = last["expert_load"][0]
    where, what = of_map.splitlines()
    assert where == f"expert 0, step {STEPS}"
    assert float(what.split()[1]) == pytest.approx(load[0] / (sum(load) / len(load)), rel=0.1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two sources, of which one of equal texts, short ones, menus and bad records do not stay."""
    folder = tmp_path_factory.mktemp("prepared")
    words = [f"Number {n} of the <b>pages</b> somebody has written should be read with patience." for n in range(60)]
    pages = [" ".join(words[n : n + 12]) for n in range(40)] + [" ".join(words[:12]), words[0], "Menu | Home"]
    (folder / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pages) + "{\n")
    (folder / "other.md").write_text(f"Home\n{' '.join(words[40:])}\n")
    given = ["--vocab-size", "300", "--recipe", "web", "--duplicates.near", "none", "--rules.sets", "gopher-quality"]
    sources = [str(folder / name) for name in ("pages.jsonl", "other.md")]
    assert dispatch(["prepare", *sources, "--out", str(folder / "out"), *given]) == 0
    return folder / "out"


def test_the_report_of_a_preparation_shows_what_its_json_has(browse: Callable[..., Any], prepared: Path) -> None:
    document, complaints, asked = browse(prepared / "report.html")
    assert complaints == asked == []
    report = json.loads((prepared / "report.json").read_text())
    documents, n_bytes = Counter[str](), Counter[str]()
    for _, stage, reason, n, size in report["documents"]:
        if stage not in ("read", "kept"):
            name = stage if stage.endswith("duplicates") else f"{stage}: {reason}"
            documents[name] += n
            n_bytes[name] += size
    tables = [rows_of(table) for table in re.findall("<table.*?</table>", document, re.DOTALL)]
    reasons = next(rows for rows in tables if rows[0][0] == "dropped for")[1:]
    assert {name: (n, size) for name, n, size, _ in reasons} == {
        name: (f"{n:,}", f"{n_bytes[name]:,}") for name, n in documents.items() if n
    }
    assert {"exact duplicates", "reading: bad records", "rules: gopher_n_words"} <= {row[0] for row in reasons}
    cleaned = next(rows for rows in tables if rows[0][1] == "step")[1:]
    assert [row[:3] for row in cleaned] == [[*of, f"{n:,}"] for *of, n in report["cleaned"] if n]
    funnels = [rows for rows in tables if rows[0][0] == "stage"]
    kept = sum(n for _, stage, _, n, _ in report["documents"] if stage == "kept")
    assert funnels[0][-1][:2] == ["kept", f"{kept:,}"]
    assert len(funnels) == 3, "of all, and of each source"
    shown = sum(len(samples) for *_, samples in report["samples"])
    assert sum(len(rows) - 1 for rows in tables if rows[0][0] == "document") == shown
    assert ["tokenizer", "none"] in tables[-1]


def rows_of(table: str) -> list[list[str]]:
    rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
    return [[unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<t[dh].*?</t[dh]>", row)] for row in rows]
