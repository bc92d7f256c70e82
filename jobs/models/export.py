"""`moray export`: a run becomes a Hugging Face folder that transformers loads and serves."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors

from moray import UserError
from moray.data.chat.chatml import ChatML
from moray.data.chat.jinja_template import CHAT_TEMPLATE
from moray.data.chat.templates import stated_template
from moray.data.special_tokens import GENERATION_CONFIG
from moray.data.staging import staged_folder
from moray.data.tokenizer import Tokenizer, copy_tokenizer
from moray.jobs.models.weights import adapted_in, open_whole
from moray.model.hf import write_pretrained
from moray.model.hf.adapters import write_adapters
from moray.model.hf.choice import family_for
from moray.model.hf.families import family_of
from moray.parallel.checkpoint.commits import read_commit
from moray.parallel.checkpoint.weights import CommitWeights


def export(run: Path, out: Path, dtype: torch.dtype, tell: Callable[[str], None]) -> str:
    """Writes a run's newest whole commit as config, weights, tokenizer and generation config; returns the model_type.

    `out` appears whole or not at all. Memory holds a tensor at a time. Raises UserError for what no family can
    express, before anything is written, and for an `out` in use. `tell` hears what else its user should know.
    """
    weights = open_whole(run, tell)
    family = family_for(weights.config)
    if not family.in_transformers:
        tell(
            f"transformers has no model_type {family.model_type}: of all families only this one expresses the model, "
            f"and what loads it is {family.architecture} of its authors"
        )
    with staged_folder(out, overwrite=False) as folder:
        tokenizer = copy_tokenizer(weights.tokenizer, folder)
        ids = _special_ids(tokenizer, weights.config.vocab_size)
        if weights.config.head == "scalar":
            _check_padding(ids["pad_token_id"], tokenizer)
        else:
            _update_json(folder / GENERATION_CONFIG, {**ids, "eos_token_id": list(tokenizer.stop_ids)})
        _complete_tokenizer(folder, tokenizer, weights.config.max_seq_len)
        write_pretrained(folder, weights.config, weights.read, dtype)
        # Of a dialogue, too, the model ends its turn; config.json names the end of a document alone.
        _update_json(folder / "config.json", ids)
    return family.model_type


def export_adapters(run: Path, out: Path, dtype: torch.dtype, tell: Callable[[str], None]) -> Path:
    """Writes the adapters of a run's newest whole commit as a folder for peft; returns where their base is.

    Raises UserError for a run without adapters, and as `export` and `write_adapters` do.
    """
    weights = open_whole(run, tell)
    adapted = adapted_in(commit := read_commit(weights.path)) if weights.is_commit else None
    if adapted is None:
        raise UserError(f"--peft: {run} holds no adapters but whole weights; export it without")
    lora, base = adapted
    is_theirs = (Path(base.path) / "config.json").is_file()
    family = family_of(base.path) if is_theirs else family_for(weights.config)
    if not is_theirs:
        tell(f"peft adds these to a transformers model: `moray export {base.path} --out …` makes one of their base")
    read = CommitWeights(commit).read
    with staged_folder(out, overwrite=False) as folder:
        write_adapters(folder, weights.config, lora, family.table(weights.config), read, base.path, dtype)
    return Path(base.path)


def _special_ids(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """What transformers looks up in the embedding: a PAD token that has no row there is none."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer.pad_id >= vocab_size:
        ids["pad_token_id"] = tokenizer.eos_id
    return {name: token for name, token in ids.items() if token is not None}


def _check_padding(pad_id: int, tokenizer: Tokenizer) -> None:
    """transformers reads a score at the last token that is not PAD, which a text must not end with."""
    if pad_id in tokenizer.stop_ids:
        raise UserError(
            f"the tokenizer pads with {tokenizer.backend.id_to_token(pad_id)!r}, which ends texts, and transformers "
            "would not score them there; name another token as pad_token in its tokenizer_config.json"
        )


def _complete_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Adds what AutoTokenizer and a chat server need and the tokenizer does not say: names of tokens, how documents
    began, and ChatML where it has its marks and no template of its own.
    """
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    missing: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        **{name: tokenizer.backend.id_to_token(token) for name, token in names.items() if token is not None},
    }
    _update_json(path, {name: value for name, value in missing.items() if said.get(name) is None})
    if stated_template(folder) is None:
        with suppress(UserError):  # ChatML does not suit every tokenizer
            (folder / CHAT_TEMPLATE).write_text(ChatML(tokenizer, folder).jinja)
    if not tokenizer.prompt_start and tokenizer.bos_id is not None:
        bos = tokenizer.backend.id_to_token(tokenizer.bos_id)
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
        tokenizer.backend.save(str(folder / "tokenizer.json"))


def _update_json(path: Path, values: dict[str, Any]) -> None:
    """Sets fields of a JSON object in a file, which need not exist."""
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(said | values, indent=2, ensure_ascii=False) + "\n")
