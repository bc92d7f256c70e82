"""An exported run is served by transformers as it stands: a chat completion over HTTP from a real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from moray.jobs.generation.generate import Sampling, generate_tokens, load_run

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
pytestmark = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("uvicorn") is None, reason="needs pip install 'transformers[serving]'"
)


@pytest.fixture
def exported(moray: Moray, dataset: Path, tmp_path: Path) -> Path:
    """A demo-moe in small after a few steps."""
    plan = {"train__steps": 3, "train__eval_every": 0, "optimizer__lr": 0.01, "model__init__std": 0.2}
    assert moray("pretrain", *tiny(dataset, tmp_path / "run", **plan)).code == 0
    assert moray("export", tmp_path / "run", "--out", tmp_path / "hf").code == 0
    return tmp_path / "hf"


@pytest.fixture
def server(exported: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve` with the folder, once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [Path(sys.executable).with_name("transformers"), "serve", exported, "--port", port, "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    with (
        open(tmp_path / "log", "w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 50
            while not is_healthy(address):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, "the server did not start: " + (tmp_path / "log").read_text()
                time.sleep(0.2)
            yield address
        finally:
            process.kill()


def is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=50) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def test_a_chat_completion_says_what_the_run_would(server: str, exported: Path) -> None:
    """Greedy, and ours continues the prompt that ChatML makes of the message."""
    messages = [{"role": "user", "content": "def read(self):"}]
    body = {"model": str(exported), "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = post(f"{server}/v1/chat/completions", body)
    with urllib.request.urlopen(f"{server}/v1/models", timeout=50) as reply:
        assert str(exported) in {model["id"] for model in json.load(reply)["data"]}
    decoder, tokenizer = load_run(exported, pytest.fail)
    prompt = tokenizer.encode("<|bos|><|im_start|>user\ndef read(self):<|im_end|>\n<|im_start|>assistant\n")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    ours = list(generate_tokens(decoder, prompt, answer["usage"]["completion_tokens"], Sampling(temperature=0)))
    said = "".join(tokenizer.decode([token]) for token in ours if token >= 5)
    assert answer["choices"][0]["message"]["content"] == said != ""
