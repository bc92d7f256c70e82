"""Weights in and out of Hugging Face folders: parts of tensors, shards, and everything that is wrong at once."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moray.model import Decoder, ModelConfig, initialise
from moray.model.hf import HFWeights, load_pretrained, read_config, save_pretrained, write_pretrained
from moray.model.hf.places import Place, Source, inverse, runs, their_shape
from moray.model.tensors import Box

TINY = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "max_seq_len": 32, "ffn": {"width": 48}}


@pytest.fixture
def decoder() -> Decoder:
    """The demo's kind of model: one dense layer, then routed and shared experts with a routing bias."""
    config = ModelConfig.preset("demo-moe", **TINY, moe={"expert_width": 16}, attention={"head_dim": 8})
    decoder = Decoder(config)
    initialise(decoder, seed=1)
    decoder.blocks[1].ffn.router.bias_E.normal_()
    return decoder


def test_a_folder_gives_back_what_was_saved(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.head.weight is loaded.embedding.weight
    expected = decoder.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens_BT = torch.randint(64, (2, 9))
    torch.testing.assert_close(loaded(tokens_BT), decoder.eval()(tokens_BT), rtol=0, atol=0)


def test_any_part_of_any_tensor_is_read(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    weights = HFWeights(tmp_path, decoder.config)
    for name, tensor in decoder.state_dict().items():
        if name == "head.weight":
            continue
        box = tuple(slice(size // 4, size // 2 + 1) for size in tensor.shape)
        assert torch.equal(weights.read(name, box), tensor[box]), name
        nothing = (slice(2, 2), *box[1:])
        assert weights.read(name, nothing).shape == tensor[nothing].shape


def test_shards_have_the_size_asked_for_and_an_index(decoder: Decoder, tmp_path: Path) -> None:
    tensors = decoder.state_dict()
    limit = 20_000
    save_pretrained(decoder, tmp_path)  # a single file, which the shards replace
    whole = load_file(tmp_path / "model.safetensors")
    write_pretrained(tmp_path, decoder.config, lambda name, box: tensors[name][box], max_shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files, "config.json", "model.safetensors.index.json"]
    )
    found = {}
    for file in files:
        shard = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit
        found |= shard
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_pretrained(tmp_path).state_dict().items())


def test_a_save_in_bf16_keeps_the_routing_bias_in_fp32(decoder: Decoder, tmp_path: Path) -> None:
    bias_E = decoder.blocks[1].ffn.router.bias_E.clone()
    save_pretrained(decoder.to(torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {
        "model.layers.1.mlp.gate.e_score_correction_bias"
    }
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    router = loaded.blocks[1].ffn.router
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert router.bias_E.dtype == router.linear.weight.dtype == torch.float32
    torch.testing.assert_close(router.bias_E, bias_E, rtol=1e-2, atol=0)


def test_memory_is_that_of_one_tensor_of_theirs(tmp_path: Path) -> None:
    config = ModelConfig.preset(
        "demo-moe", **TINY | {"vocab_size": 4096, "d_model": 128}, moe={"n_experts": 64, "expert_width": 256}
    )
    held: list[weakref.ref[Tensor]] = []
    bytes_held, written = [], 0

    def read(name: str, box: Box) -> Tensor:
        nonlocal written
        part = torch.zeros([bound.stop - bound.start for bound in box])
        held.append(weakref.ref(part))
        bytes_held.append(sum(tensor.nbytes for ref in held if (tensor := ref()) is not None))
        written += part.nbytes
        return part

    write_pretrained(tmp_path, config, read)
    # One tensor of theirs, and the one before it that is not yet let go.
    embedding, expert = 4 * 4096 * 128, 4 * 256 * 128
    assert max(bytes_held) <= embedding + expert
    assert written > 10 * embedding
    assert read_config(tmp_path).n_experts == 64


def test_all_that_is_wrong_is_said_at_once(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(48)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # computes nothing
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json describes other weights") as error:
        load_pretrained(tmp_path)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "model.layers.0.mlp.gate_proj.bias is unknown",
        "model.layers.0.self_attn.k_proj.weight is [16, 31] and must be [16, 32]",
        "model.layers.1.mlp.experts.3.up_proj.weight is missing",
        "model.norm.weight is missing",
    ]


def test_a_tied_head_may_be_there_if_it_is_the_embedding(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_pretrained(tmp_path)
    tensors["lm_head.weight"][5, 7] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head\.weight differs"):
        load_pretrained(tmp_path)


def test_missing_files_are_named(decoder: Decoder, tmp_path: Path) -> None:
    tensors = decoder.state_dict()
    write_pretrained(tmp_path, decoder.config, lambda name, box: tensors[name][box], max_shard_size=40_000)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"lacks files .*{second.name}"):
        load_pretrained(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abcd", b"version https://git-lfs.github.com/spec/v1\n" * 9, None])
def test_a_damaged_file_is_named(decoder: Decoder, tmp_path: Path, content: bytes | None) -> None:
    save_pretrained(decoder, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"norm": 1}}'])
def test_an_index_that_is_none_is_named(decoder: Decoder, tmp_path: Path, index: str) -> None:
    save_pretrained(decoder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (is not JSON|must hold)"):
        load_pretrained(tmp_path)


def test_a_single_file_is_taken_before_an_index_as_in_transformers(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "older.safetensors"}}')
    loaded = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_are_refused(decoder: Decoder, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save_pretrained(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.norm.weight is of dtype {name} and must be F64, F32, F16 or BF16"):
        load_pretrained(tmp_path)


def test_a_routing_bias_without_a_place_must_be_zero(tmp_path: Path) -> None:
    decoder = Decoder(ModelConfig.preset("minimind-3-moe", **TINY, moe={"expert_width": 16}))
    initialise(decoder, seed=1)
    save_pretrained(decoder, tmp_path)
    weights = HFWeights(tmp_path, decoder.config)
    assert not weights.read("blocks.0.ffn.router.bias_E").any()
    decoder.blocks[0].ffn.router.bias_E[0] = 1
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.router\.bias_E is not zero"):
        save_pretrained(decoder, tmp_path)


def test_a_model_with_more_weights_than_the_folder_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    save_pretrained(decoder, tmp_path)
    with pytest.raises(ValueError, match=r"attention_post_norm\.weight has no place in this model_type"):
        HFWeights(tmp_path, decoder.config.but(norm={"placement": "sandwich"}))


def test_rows_and_transposes() -> None:
    """A fused matrix of theirs: two heads, each [query; key] of 2 rows, stored as [inputs, outputs]."""
    query = Source("qkv", rows=(slice(0, 2), slice(4, 6)), transposed=True)
    key = Source("qkv", rows=(slice(2, 4), slice(6, 8)), transposed=True)
    found = {"query": Place(torch.Size((4, 3)), (query,), False), "key": Place(torch.Size((4, 3)), (key,), False)}
    assert their_shape(inverse(found)["qkv"], found) == (3, 8)
    assert list(runs(query, slice(1, 3))) == [slice(1, 2), slice(4, 5)]
    assert list(runs(key, slice(0, 4))) == [slice(2, 4), slice(6, 8)]
    assert list(runs(Source("w"), slice(1, 3))) == [slice(1, 3)]
