"""Reward models as files: begun from a language model, read again as they were, and given to transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from tiny import tiny_from
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moray import UserError
from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import load_config
from moray.jobs.models.weights import check_changes, config_of, fill_shards, locate, open_weights
from moray.model import Decoder, ModelConfig, initialise
from moray.model.hf import load_pretrained, save_pretrained
from moray.model.init import initial_tensor
from moray.model.tensors import tensor_shapes, whole
from moray.parallel.checkpoint.weights import write_weights
from moray.parallel.layout import Layout
from moray.parallel.shard import build_decoder

Moray = Callable[..., "Outcome"]  # type: ignore[name-defined]  # noqa: F821 - of conftest.py
LANGUAGE = ModelConfig.preset(
    "demo-dense",
    vocab_size=400,
    n_layers=2,
    d_model=32,
    attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    ffn={"width": 48},
    init={"std": 0.2},
)
SCALAR = LANGUAGE.but(head="scalar")
HEAD = "head.weight"


@pytest.fixture(scope="module")
def language(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a language model with tied embeddings."""
    folder = tmp_path_factory.mktemp("language")
    decoder = Decoder(LANGUAGE)
    initialise(decoder, 1)
    save_pretrained(decoder, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dataset / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def reward(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that holds a reward model, whose head is none that any seed gives."""
    folder = tmp_path_factory.mktemp("runs") / "reward"
    tensors = {**load_pretrained(language).state_dict(), HEAD: torch.linspace(-1, 1, 32)[None]}
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(language / name, folder / "tokenizer" / name)
    metadata = {"config": {"model": SCALAR.model_dump()}}
    write_weights(
        folder / "checkpoints", 0, metadata, tensor_shapes(SCALAR), lambda name, box: tensors[name][box].contiguous()
    )
    return folder


def filled(source: Path, layout: Layout, seed: int) -> dict[str, Tensor]:
    decoder = build_decoder(SCALAR, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32)
    fill_shards(decoder, source, seed)
    state = {name: decoder.state_dict()[name] for name in tensor_shapes(SCALAR)}
    whole_ones = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}
    return {name: x.detach().clone() for name, x in whole_ones.items()}


LAYOUTS = [Layout(dp_shard=1), Layout(dp_shard=2), Layout(dp_shard=1, tp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_scalar_head_begins_anew_and_nothing_else(pool: Pool, language: Path, layout: Layout) -> None:
    (found, *_) = pool.run(filled, layout.world_size, language, layout, 5)
    theirs = load_pretrained(language).state_dict()
    for name, shape in tensor_shapes(SCALAR).items():
        expected = initial_tensor(SCALAR, HEAD, shape, 5) if name == HEAD else theirs[name]
        assert torch.equal(found[name], expected), name
    assert found[HEAD].shape == (1, 32)
    assert found[HEAD].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_head_that_is_there_is_read_whatever_the_seed(pool: Pool, reward: Path, layout: Layout) -> None:
    (found, *_) = pool.run(filled, layout.world_size, locate(reward), layout, 5)
    weights = open_weights(locate(reward))
    for name, shape in tensor_shapes(SCALAR).items():
        assert torch.equal(found[name], weights.read(name, whole(shape))), name
    assert torch.equal(found[HEAD][0], torch.linspace(-1, 1, 32))


def test_settings_may_give_a_language_model_a_scalar_head_and_not_take_it_away(
    language: Path, reward: Path, dataset: Path, tmp_path: Path
) -> None:
    scores = {"train__objective": "reward"}
    words = tiny_from(language, dataset, tmp_path / "run", model__head="scalar", **scores)
    assert load_config(*parse_settings(words)).model == config_of(language).but(head="scalar")
    assert load_config(*parse_settings(tiny_from(reward, dataset, tmp_path / "run", **scores))).model == SCALAR
    with pytest.raises(UserError, match=r"model\.head=vocabulary \(there: scalar\)"):
        load_config(*parse_settings(tiny_from(reward, dataset, tmp_path / "run", model__head="vocabulary")))
    with pytest.raises(UserError, match=r"lora\.rank=8 with model\.head=scalar"):
        load_config(*parse_settings([*words, "--lora.rank", "8"]))
    check_changes(LANGUAGE.but(final_softcap=3.0, tied_embeddings=False, head_bias=True), SCALAR)
    with pytest.raises(UserError, match=r"model\.d_model=64 \(there: 32\)"):
        check_changes(LANGUAGE, SCALAR.but(d_model=64))


def test_a_config_from_before_there_were_scalar_heads_is_a_language_models() -> None:
    before = LANGUAGE.model_dump()
    del before["head"]
    assert ModelConfig.of(before) == LANGUAGE


def test_transformers_scores_as_we_do(moray: Moray, reward: Path, tmp_path: Path) -> None:
    """A batch as its own tokenizer pads it, of texts that end as answers do."""
    out = tmp_path / "hf"
    outcome = moray("export", reward, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    theirs = AutoModelForSequenceClassification.from_pretrained(out, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = ["def read(x):\n    return x<|im_end|>", "hi<|im_end|>", "for i in range(10):<|eos|>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).unique().numel() == 3
    ours = load_pretrained(out)
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0]
        alone = [ours.values(torch.tensor([tokenizer(text)["input_ids"]]))[0, -1] for text in texts]
    torch.testing.assert_close(torch.stack(alone), scores, rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.1
    assert not (out / "generation_config.json").exists()


def test_padding_that_ends_texts_is_refused(moray: Moray, reward: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reward, tmp_path / "run"))
    path = run / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|eos|>"}))
    outcome = moray("export", run, "--out", tmp_path / "hf")
    assert outcome.code == 2
    assert "the tokenizer pads with '<|eos|>', which ends texts" in outcome.err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("verb", [("generate", "--prompt", "def"), ("pretrain",)], ids=lambda verb: verb[0])
def test_what_scores_does_not_write(
    moray: Moray, reward: Path, dataset: Path, tmp_path: Path, verb: tuple[Any, ...]
) -> None:
    words = (
        (reward,)
        if verb[0] == "generate"
        else tiny_from(reward, dataset, tmp_path / "run", train__steps=1, optimizer__warmup_steps=1)
    )
    outcome = moray(verb[0], *words, *verb[1:])
    assert outcome.code == 2, outcome.err
    assert "model.head=scalar" in outcome.err
