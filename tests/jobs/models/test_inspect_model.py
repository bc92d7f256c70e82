"""`moray inspect`: presets, runs and Hugging Face folders, as a table and as JSON; training's bytes as measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from transformers import LlamaConfig

from moray.jobs.config.load import load_config
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.sections import OptimizerSection
from moray.jobs.models.describe import describe
from moray.jobs.models.inspect_model import find_config
from moray.jobs.models.units import binary, short
from moray.jobs.training.optimizer import build_optimizer
from moray.model import Decoder, ModelConfig
from moray.model.accounting.cost import training_state_bytes
from moray.parallel.memory import RankMemory

Moray = Callable[..., Any]


def test_a_preset_is_shown_in_a_table(moray: Moray) -> None:
    shown = moray("inspect", "deepseek-v3")
    assert (shown.code, shown.err) == (0, "")
    for fact in (
        "671,026,404,352 parameters, of which a token passes 37,552,282,624",
        "61 layers of width 7,168, vocabulary 129,280 (untied)",
        "attention: 128 heads of 192, latent of 512 + 64, queries through 1,536",
        "experts: 256 of width 2,048 in 58 layers, top-8 by sigmoid, from 4 of 8 groups",
        "FLOPs a token at 4,096 tokens",
    ):
        assert fact in shown.out
    row = next(line for line in shown.out.splitlines() if "routed experts" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("routed experts", "654B", "20.4B", "97.4%", "40.9G", "81.7G"),
    ]
    cache = next(line for line in shown.out.splitlines() if "KV cache a token" in line)
    assert f"{2 * 61 * 576:,}" in cache


def test_the_path_of_a_folder_is_shown_as_it_is(moray: Moray, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]" / ("long name " * 12)
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, vocab_size=96).save_pretrained(folder)
    assert moray("inspect", folder).out.splitlines()[0] == str(folder)


def test_json_has_every_number_and_the_config(moray: Moray) -> None:
    shown = moray("inspect", "mixtral-8x7b", "--seq-len", 512, "--json")
    found = json.loads(shown.out)
    assert ModelConfig(**found["model"]) == ModelConfig.preset("mixtral-8x7b")
    assert (found["source"], found["seq_len"]) == ("mixtral-8x7b", 512)
    parameters, flops, held = found["parameters"], found["flops_per_token"], found["bytes"]
    assert (parameters["total"], parameters["active"]) == (46_702_792_704, 12_879_925_248)
    assert sum(part["total"] for part in parameters["parts"].values()) == parameters["total"]
    assert sum(flops["forward_parts"].values()) == flops["forward"] == flops["backward"] / 2
    # 2 FLOPs a weight that a token meets, of which the embedding and 65 norms are none, and scores of 512 tokens.
    weights = 12_879_925_248 - 32000 * 4096 - 65 * 4096
    assert flops["forward"] == 2 * weights + 32 * 4 * 4096 * 513 / 2
    assert held["weights"] == held["gradients"] == held["optimizer"] / 2 == 4 * parameters["total"]
    # Two of each, of weights and moments; on several nodes each stands in for another.
    assert held["snapshots_on_one_node"] == 2 * 12 * parameters["total"] == held["snapshots_on_several_nodes"] / 2
    assert held["kv_cache_per_token"] * 512 == held["kv_cache"] == 2 * 2 * 32 * 8 * 128 * 512
    assert held["activations_per_token"] > sum(held["activations_per_token_of_layers"]) > 0


def test_a_run_is_its_newest_commit_and_before_that_its_config(dataset: Path, moray: Moray, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = tiny(dataset, run, train__steps=2)
    assert moray("pretrain", *arguments).code == 0
    given = json.loads(moray("inspect", run, "--json").out)["model"]
    assert (given["n_layers"], given["moe"]["n_experts"]) == (2, 8)

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    settings = {"model.preset": "gpt-neo-125m", "model.n_layers": "2", "data.path": str(dataset), "run.dir": str(fresh)}
    config = load_config(None, settings)
    (fresh / "config.toml").write_text(to_toml(config))
    assert find_config(str(fresh)) == ModelConfig.preset("gpt-neo-125m", n_layers=2)


def test_a_hugging_face_folder_is_its_config(moray: Moray, tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, vocab_size=96).save_pretrained(tmp_path)
    shown = moray("inspect", tmp_path)
    assert "3 layers of width 64, vocabulary 96" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepsek-v3"], "deepsek-v3 is neither a preset nor a folder; did you mean deepseek-v3?"),
        (
            ["{empty}"],
            "{empty} is neither a run (config.toml), a Hugging Face folder (config.json) nor a dataset (index.json)",
        ),
        (["llama2-7b", "--seq-len", "5000"], "seq_len=5000 must lie between 1 and max_seq_len=4096"),
        (["llama2-7b", "--seq-len", "0"], "seq_len=0 must lie between 1 and max_seq_len=4096"),
    ],
)
def test_a_mistake_is_one_line(moray: Moray, tmp_path: Path, arguments: list[str], message: str) -> None:
    shown = moray("inspect", *(word.format(empty=tmp_path) for word in arguments))
    assert (shown.code, shown.out, shown.err) == (2, "", f"moray: {message.format(empty=tmp_path)}\n")


def test_training_takes_the_bytes_it_was_said_to_take() -> None:
    """Weights, gradients and AdamW's moments after a real step; its counters of steps are one number a tensor."""
    config = ModelConfig.preset("demo-moe", n_layers=2, vocab_size=64)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = build_optimizer(decoder, OptimizerSection())
    tokens = torch.arange(16)[None]
    decoder.loss(tokens, tokens).cross_entropy.backward()
    optimizer.step()
    parameters = list(decoder.parameters())
    states = [x for p in parameters for name, x in optimizer.state[p].items() if name != "step"]
    gradients = [p.grad for p in parameters if p.grad is not None]
    measured = tuple(sum(x.nbytes for x in tensors) for tensors in (parameters, gradients, states))
    assert training_state_bytes(config) == measured


@pytest.mark.parametrize(
    ("preset", "facts"),
    [
        ("gemma2-2b", ["RMSNorm (sandwich)", "soft-capped at 50", "a window of 4,096 in 13 layers", "GeGLU (tanh)"]),
        ("gpt-neox-20b", ["parallel residual", "on 24 of 96 channels", "GELU (tanh)", "with biases", "multi-head"]),
        ("llama3.1-8b", ["grouped-query with 8 key heads", "stretched 8 times (llama3)", "SwiGLU, 14,336 wide"]),
        ("gpt3-125m", ["positions: learned, sequences of up to 2,048", "LayerNorm (pre)"]),
        ("olmoe-1b-7b", ["QK-norm by full", "experts: 64 of width 1,024 in 16 layers, top-8 by softmax"]),
        ("switch-base-8", ["ReLU, 3,072 wide in 6 dense layers", "capacity factor 1.25"]),
    ],
)
def test_a_description_names_what_is_special(preset: str, facts: list[str]) -> None:
    told = "\n".join(describe(ModelConfig.preset(preset)))
    assert [fact for fact in facts if fact not in told] == []


def test_of_a_scalar_head_nothing_is_said_that_is_a_vocabularys() -> None:
    (whole, *_) = describe(ModelConfig.preset("gemma2-2b", head="scalar"))
    assert "vocabulary 256,000 (scalar head)" in whole
    assert "tied" not in whole
    assert "logits" not in whole


def test_numbers_are_short() -> None:
    assert [short(x, "kMBT") for x in (7, 1234, 999_999, 7.2417e9, 1.2e12)] == ["7", "1.23k", "1M", "7.24B", "1.2T"]
    assert [binary(x) for x in (7, 1536, 3 * 2**30, 2**50)] == ["7 B", "1.5 KiB", "3 GiB", "1,024 TiB"]


def test_a_workers_memory_falls_with_what_it_shares_and_computes_again(moray: Moray) -> None:
    words = ("inspect", "mixtral-8x7b", "--seq-len", 4096, "--micro-batch", 1, "--workers", 64, "--ep", 8)
    worker = json.loads(moray(*words, "--tp", 2, "--json").out)["worker"]
    assert worker["layout"] == "dp_replicate=1 dp_shard=32 tp=2 ep=8"
    found = {(row["zero_stage"], row["recompute"]): row for row in worker["bytes"]}
    assert len(found) == 6
    for row in found.values():
        assert row["weights"] == row["gradients"] == row["optimizer"] / 2 == 4 * 46_702_792_704 / 64
        assert row["total"] == sum(row[name] for name in RankMemory._fields)
    assert found[1, "none"]["gathered"] > 10 * found[3, "none"]["gathered"]
    alone = json.loads(moray(*words, "--json").out)["worker"]["bytes"][5]
    assert found[3, "full"]["activations"] == pytest.approx(alone["activations"] / 2, rel=0.05)
    # A layer's input alone, in bf16, and once for all the last norm, with two copies in fp32.
    assert alone["activations"] == pytest.approx((32 * 2 + 2 + 2 * 4) * 4096 * 4096, rel=0.05)


def test_a_layout_that_the_model_cannot_have_is_refused(moray: Moray) -> None:
    shown = moray("inspect", "mixtral-8x7b", "--workers", 6, "--ep", 3)
    assert shown.code == 2
    assert "layout.ep=3 must divide n_experts=8" in shown.err
