"""Prompts in their order: each once an epoch, the same for every number of ranks, with its own reference."""

import numpy as np
import pytest
from dialogues import make_dialogues

from moray import UserError
from moray.data.dataset import Dataset
from moray.data.prompts import Prompt, Prompts, PromptStream, evaluation_prompts

LENGTHS = np.random.default_rng(0).integers(1, 20, 150).tolist()
FITTING = [number for number, length in enumerate(LENGTHS) if length <= 12]


def tokens_of(number: int) -> list[int]:
    return [number + 1] * LENGTHS[number]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    each = [(tokens_of(number), "." * length) for number, length in enumerate(LENGTHS)]
    folder = tmp_path_factory.mktemp("prompts") / "data"
    return make_dialogues(folder, each, each[:30], kind="prompts", block_tokens=60, shard_tokens=300)


def number_of(prompt: Prompt) -> int:
    """Tokens, key and reference are of one prompt."""
    number = int(prompt.key.removeprefix("dialogue-"))
    assert prompt.tokens.tolist() == tokens_of(number)
    assert prompt.reference == {"number": number}
    return number


def stream_of(dataset: Dataset, lanes: list[int], seed: int = 0) -> PromptStream:
    return PromptStream([dataset], most_tokens=12, global_batch=4, seed=seed, lanes=lanes)


def test_an_epoch_has_each_prompt_that_leaves_room_once(prompts: Dataset) -> None:
    assert len(prompts.splits["train"]) > 2
    steps = [stream_of(prompts, [0, 1, 2, 3]).batch(n).prompts for n in range(-(-2 * len(FITTING) // 4))]
    found = [number_of(prompt) for step in steps for prompt in step]
    positions = [prompt.position for step in steps for prompt in step]
    assert positions == [*range(len(positions))]
    first, second = found[: len(FITTING)], found[len(FITTING) : 2 * len(FITTING)]
    assert sorted(first) == sorted(second) == FITTING
    assert first != second
    other = stream_of(prompts, [0, 1, 2, 3], seed=1).batch(0)
    assert [number_of(prompt) for prompt in other.prompts] != first[:4]


def test_ranks_have_their_lanes_of_the_same_steps(prompts: Dataset) -> None:
    whole, *parts = (stream_of(prompts, lanes) for lanes in ([0, 1, 2, 3], [0, 1], [2, 3]))
    for n in (0, 7, 40):
        keys = [prompt.key for part in parts for prompt in part.batch(n).prompts]
        assert keys == [prompt.key for prompt in whole.batch(n).prompts]
    ahead = whole.batches(7)
    assert [prompt.key for prompt in next(ahead).prompts] == [prompt.key for prompt in whole.batch(7).prompts]


def test_an_evaluation_reads_the_first_once(prompts: Dataset) -> None:
    wanted = [number for number in FITTING if number < 30]
    parts = [evaluation_prompts(prompts, 12, 1000, lambda n, lane=lane: n % 2 == lane) for lane in range(2)]
    assert [number_of(prompt) for prompt in parts[0]] == wanted[0::2]
    assert [number_of(prompt) for prompt in parts[1]] == wanted[1::2]
    assert [number_of(prompt) for prompt in evaluation_prompts(prompts, 12, 3)] == wanted[:3]


def test_none_leaves_room(prompts: Dataset) -> None:
    assert Prompts(prompts, "train", 12).n_left_out == len(LENGTHS) - len(FITTING)
    with pytest.raises(UserError, match=r"no prompt of the train split of data.path=.* has at most 0 tokens .* has 1"):
        Prompts(prompts, "train", 0)
