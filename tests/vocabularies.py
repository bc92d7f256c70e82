"""Tokenizers as others ship them, in small: the kinds of decoder, of template and of special tokens that there are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [Path(__file__).read_text(), "The whale, the ship; and the sea again, said the old man. " * 20]


def _save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def _byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _sentence_piece() -> tokenizers.Tokenizer:
    """Pieces in which ▁ is a space, bytes for what no piece holds, and BOS before every text."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: n for n, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def llama2(folder: Path) -> Path:
    """A space is put before every text, and taken away again from what is decoded."""
    backend = _sentence_piece()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _save(folder, backend, {"bos_token": "<s>", "eos_token": "</s>"})


def mistral(folder: Path) -> Path:
    """The same by way of Metaspace."""
    backend = _sentence_piece()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    return _save(folder, backend, {"bos_token": "<s>", "eos_token": "</s>"})


def qwen(folder: Path) -> Path:
    """Bytes, no BOS, two ends of which the tokenizer names one."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    return _save(folder, backend, config)


def gpt2(folder: Path) -> Path:
    """Bytes, and a BOS that is not put anywhere by default."""
    backend = _byte_level(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _save(folder, backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def glm(folder: Path) -> Path:
    """No BOS by name, and two tokens before every text."""
    backend = _byte_level(["<|endoftext|>", "[gMASK]", "<sop>"])
    template = [("[gMASK]", 1), ("<sop>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=template)
    return _save(folder, backend, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})


KINDS: tuple[Callable[[Path], Path], ...] = (llama2, mistral, qwen, gpt2, glm)
