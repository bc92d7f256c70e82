"""Decoders with a scalar head against transformers' …ForSequenceClassification, out of files and back."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_parity import randomise
from torch import Tensor

from moray import UserError
from moray.model import Decoder, ModelConfig, initialise
from moray.model.hf import load_pretrained, save_pretrained
from moray.model.hf.choice import family_for
from moray.model.hf.families import FAMILIES
from moray.model.hf.families.olmoe import OLMOE

VOCABULARY, PAD, TOKENS = 96, 7, 20
LENGTHS = [20, 3, 11]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GPT = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {
    **GPT,
    **LATENT,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GPT_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": {name: SIZES[name] for name in SIZES if name != "head_dim"},
    "Qwen3": {**SIZES, "tie_word_embeddings": True},
    "Gemma2": {**SIZES, "final_logit_softcapping": 0.1, "query_pre_attn_scalar": 16},
    "Mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "DeepseekV3": DEEPSEEK,
    "GPTNeoX": GPT,
    "GPT2": GPT2,
    "GPTNeo": {**GPT_NEO, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "GPTBigCode": GPT2,
}


@dataclass(frozen=True)
class Pair:
    """transformers' model and its folder."""

    theirs: Any
    folder: Path


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifiers") / request.param
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=VOCABULARY, num_labels=1, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        **MODELS[request.param],
    )  # fmt: skip
    theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    randomise(theirs, 0.15)
    theirs.save_pretrained(folder)
    return Pair(theirs, folder)


def texts() -> tuple[Tensor, Tensor]:
    """Of unequal lengths, padded at the right; none has PAD among its own tokens. Tokens, and which are real."""
    tokens_BT = torch.randint(PAD + 1, VOCABULARY, (len(LENGTHS), TOKENS), generator=torch.Generator().manual_seed(1))
    real_BT = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    return torch.where(real_BT, tokens_BT, PAD), real_BT


@torch.no_grad()
def theirs_of(model: Any) -> Tensor:
    tokens_BT, real_BT = texts()
    return model(tokens_BT, attention_mask=real_BT.long()).logits[:, 0]


@torch.no_grad()
def ours_of(decoder: Decoder) -> Tensor:
    """Each text alone, without any padding."""
    tokens_BT, _ = texts()
    return torch.stack([decoder.values(row[None, :n])[0, -1] for row, n in zip(tokens_BT, LENGTHS, strict=True)])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert theirs.std() > 0.1, "or anything would be close"
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_scores_are_theirs(pair: Pair) -> None:
    ours = load_pretrained(pair.folder)
    assert ours.config.head == "scalar"
    assert_close(ours_of(ours), theirs_of(pair.theirs), 1e-5)


def test_scores_are_theirs_in_fp64(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, angles, softmaxes and routers in fp32 by name: here that name means fp64."""
    ours = ours_of(load_pretrained(pair.folder, torch.float64))
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config = copy.deepcopy(pair.theirs.config)
    config._experts_implementation = "eager"
    exact = type(pair.theirs)._from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    exact.load_state_dict(pair.theirs.state_dict())
    assert_close(ours, theirs_of(exact), 1e-10)


def test_what_we_write_they_load_whole_and_we_read_again_as_it_was(pair: Pair, tmp_path: Path) -> None:
    """Of a head that was trained, nothing begins anew (ms-swift#9239, OpenRLHF#643)."""
    ours = load_pretrained(pair.folder)
    save_pretrained(ours, tmp_path)
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True, pad_token_id=PAD
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(loaded) is type(pair.theirs)
    assert loaded.config.num_labels == 1
    assert torch.equal(loaded.score.weight, pair.theirs.score.weight)
    assert_close(theirs_of(loaded.eval()), theirs_of(pair.theirs), 1e-6)
    again = load_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_two_labels_are_not_one_score(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **SIZES)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="num_labels=2 is not supported; a scalar head gives one number"):
        load_pretrained(tmp_path)


def test_a_family_without_such_a_class_is_named() -> None:
    config = OLMOE.read(transformers.OlmoeConfig(vocab_size=VOCABULARY, hidden_size=64).to_dict())
    assert family_for(config) is OLMOE
    with pytest.raises(UserError, match="nearest is olmoe, but transformers has no OlmoeForSequenceClassification"):
        family_for(config.but(head="scalar"))


def test_who_has_such_a_class_is_what_transformers_says() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    for family in FAMILIES:
        assert family.has_classifier == (family.model_type in CLASSES), family.model_type
        assert CLASSES.get(family.model_type, family.classifier) == family.classifier


def test_a_head_of_one_is_no_part_of_a_tied_or_capped_vocabulary() -> None:
    """Gemma's cap is on logits; a tied embedding has nothing to do with scores."""
    config = ModelConfig.preset("demo-dense", n_layers=1, final_softcap=1e-3, tied_embeddings=True, head="scalar")
    decoder = Decoder(config)
    initialise(decoder, 0)
    assert decoder.head.weight is not decoder.embedding.weight
    assert decoder.values(torch.tensor([[1, 2, 3]])).abs().max() > 1e-3
