"""The tokens of the pieces against those that tokenizers gives for the whole text, for every family of tokenizers."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from moray.data import pieces
from moray.data.pieces import Cutter

# As published with Llama 3 (cl100k with digits by three), gpt-oss (o200k) and DeepSeek-V3.
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _END
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _END
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _END,
)
SENTENCEPIECE = pre_tokenizers.Metaspace(prepend_scheme="always")


def byte_level(**settings: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


def split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, byte_level(use_regex=False)])


def strange(seed: int, n: int) -> str:
    """Whatever stands beside whatever: spaces and line ends of all kinds, digits, scripts, marks, and no order."""
    rare = [
        *"\t。，人_é🙂▁-\u3000…Aß.",
        "  ",
        "\n\n",
        " \n",
        "\r\n",
        "'s",
        " don't",
        "三月",
        "1234",
        " 7",
        "//",
        "e\u0301",
    ]
    rare += ["<s>", "नमस्ते"]
    return "".join(random.Random(seed).choices([*rare, *[" ", "\n", "a", " the", "word"] * 4], k=n))


HAN = [chr(0x4E00 + int(random.Random(n).paretovariate(1) * 20) % 3000) for n in range(400)]
CHINESE = "".join(random.Random(0).choices([*HAN, "，", "。", "、\n"], k=6000))
ENGLISH = " ".join(random.Random(0).choices(Path(os.__file__).read_text().split(), k=4000))
TEXTS = [Path(os.__file__).read_text()[:30_000], ENGLISH, CHINESE, *(strange(seed, 3000) for seed in range(6))]
WITH_SPACES = [text for text in TEXTS if text is not CHINESE]


def trained(pre_tokenizer: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    bytes_first = "Metaspace" not in repr(pre_tokenizer)
    model = models.BPE() if bytes_first else models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        show_progress=False,
        special_tokens=[] if bytes_first else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if bytes_first else [],
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def changed(backend: tokenizers.Tokenizer, **parts: Any) -> tokenizers.Tokenizer:
    """The same vocabulary with other parts of a tokenizer.json."""
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | parts))


SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SIGN]}
BY_SPACE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

# Family: the tokenizer, and the texts that it is known to split.
FAMILIES: dict[str, tuple[Callable[[], tokenizers.Tokenizer], list[str]]] = {
    "ours, gpt2": (lambda: trained(byte_level()), TEXTS),
    "gpt2 with a prefix": (lambda: trained(byte_level(add_prefix_space=True)), WITH_SPACES),
    "llama 3": (lambda: trained(split(LLAMA_3)), TEXTS),
    "qwen, nfc": (lambda: trained(split(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()), TEXTS),
    "o200k": (lambda: trained(split(O200K)), TEXTS),
    "deepseek": (lambda: trained(split(*DEEPSEEK)), TEXTS),
    "digits": (lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])), TEXTS),
    "metaspace": (lambda: trained(SENTENCEPIECE), WITH_SPACES),
    "llama 2": (lambda: changed(trained(SENTENCEPIECE), pre_tokenizer=None, normalizer=PREPEND), WITH_SPACES),
    "mistral": (lambda: changed(trained(SENTENCEPIECE), pre_tokenizer=METASPACE), WITH_SPACES),
    "gemma": (lambda: changed(trained(SENTENCEPIECE), pre_tokenizer=BY_SPACE, normalizer=SIGN), WITH_SPACES),
}


def joined(backend: tokenizers.Tokenizer, parts: list[str]) -> list[int]:
    return [token for part in parts for token in backend.encode(part, add_special_tokens=False).ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_pieces_are_those_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 200)
    make, divisible = FAMILIES[family]
    backend = make()
    cutter = Cutter(backend)
    for text in TEXTS:
        parts = list(cutter.pieces(text))
        assert joined(backend, parts) == backend.encode(text, add_special_tokens=False).ids
        if text in divisible:
            assert len(parts) > len(text) / 400


def over_spaces() -> tokenizers.Tokenizer:
    """A vocabulary with tokens of two words, as SuperBPE has them."""
    backend = trained(SENTENCEPIECE)
    stated = json.loads(backend.to_str())
    vocab, merges = stated["model"]["vocab"], stated["model"]["merges"]
    vocab["e▁"] = len(vocab)
    merges.insert(0, ["e", "▁"])
    return changed(backend, pre_tokenizer=METASPACE, model=stated["model"])


def with_added(**flags: bool) -> tokenizers.Tokenizer:
    backend = trained(byte_level())
    backend.add_tokens([AddedToken("<mask>", **flags)])
    return backend


@pytest.mark.parametrize(
    "make",
    [
        over_spaces,
        lambda: changed(trained(byte_level()), pre_tokenizer=None),
        lambda: changed(trained(byte_level()), pre_tokenizer={**BY_SPACE, "type": "Digits", "individual_digits": True}),
        lambda: trained(split(r"(?<=e) w|\w+|\s+|\W+")),
        lambda: trained(split(r"[\s\S]{1,7}")),
        lambda: trained(byte_level(), normalizers.Strip()),
        lambda: with_added(rstrip=True),
        lambda: changed(trained(byte_level()), pre_tokenizer=byte_level_stated(use_regex=False)),
    ],
)
def test_where_no_cut_is_known_a_text_is_one_piece(
    make: Callable[[], tokenizers.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 200)
    assert list(Cutter(make()).pieces(ENGLISH)) == [ENGLISH]


def byte_level_stated(**settings: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | settings


def test_an_added_token_within_reach_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    backend = with_added()
    text = "word <mask> word <mask>\nword " * 100
    parts = list(Cutter(backend).pieces(text))
    assert len(parts) > 20
    assert joined(backend, parts) == backend.encode(text, add_special_tokens=False).ids
