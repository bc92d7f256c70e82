"""What reinforcement learning starts from: prompts, and a small model that can answer them."""

import json
import random
from pathlib import Path

import pytest
from tiny import tiny, tiny_from

from moray.jobs.cli import dispatch
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare

WORDS = ("red", "blue", "list", "dict")


@pytest.fixture(scope="session")
def prompts(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, folder = random.Random(0), tmp_path_factory.mktemp("prompts")
    with open(folder / "prompts.jsonl", "w") as file:
        for number in range(120):
            word = draw.choice(WORDS)
            asked = f"Say {word}" + "!" * draw.randint(0, 3) + " or not, and then again" * 9 * (number % 40 == 7)
            file.write(json.dumps({"prompt": f"{asked} {number}", "reference": word}) + "\n")
    sources = (folder / "prompts.jsonl",)
    prepare(PrepareConfig(sources=sources, out=folder / "data", tokenizer=dataset, validation=0.2, kind="prompts"))
    return folder / "data"


@pytest.fixture(scope="session")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned a little on dialogues in which any of the words is the answer."""
    draw, folder = random.Random(1), tmp_path_factory.mktemp("base")
    with open(folder / "said.jsonl", "w") as file:
        for number in range(200):
            asked = {"role": "user", "content": f"Say {draw.choice(WORDS)} {number}"}
            said = {"role": "assistant", "content": draw.choice(WORDS)}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")
    sources = (folder / "said.jsonl",)
    prepare(PrepareConfig(sources=sources, out=folder / "said", tokenizer=dataset, validation=0.1, kind="chat"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        assert dispatch(["pretrain", *tiny(dataset, folder / "first", train__steps=2, train__eval_every=0)]) == 0
        settings = {"train__steps": 60, "train__eval_every": 0, "optimizer__lr": 0.01}
        assert dispatch(["finetune", *tiny_from(folder / "first", folder / "said", folder / "run", **settings)]) == 0
    return folder / "run"
