"""`moray export`: a run becomes a Hugging Face folder that transformers loads and serves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moray.data.staging import staged_folder
from moray.data.tokenizer import IM_END, Tokenizer, copy_tokenizer
from moray.jobs.models.weights import open_whole
from moray.model.hf import write_pretrained
from moray.model.hf.choice import family_for

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a tokenizer without a chat template of its own. As in training, a document begins with BOS."""


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
        write_pretrained(folder, weights.config, weights.read, dtype)
        tokenizer = copy_tokenizer(weights.tokenizer, folder)
        _complete_tokenizer(folder, tokenizer, weights.config.max_seq_len)
        ends = _special_ids(tokenizer)
        _update_json(folder / "generation_config.json", ends)
        # Of a dialogue, too, the model ends its turn; config.json names the end of a document alone.
        _update_json(folder / "config.json", {**ends, "eos_token_id": tokenizer.eos_id})
    return family.model_type


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    turn_id = tokenizer.backend.token_to_id(IM_END)
    ends = [tokenizer.eos_id] if turn_id in (None, tokenizer.eos_id) else [tokenizer.eos_id, turn_id]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}


def _complete_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Adds to tokenizer_config.json what AutoTokenizer and a chat server need and the tokenizer does not say."""
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    missing: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        **{name: tokenizer.backend.id_to_token(token) for name, token in names.items()},
    }
    if not (folder / "chat_template.jinja").is_file():
        missing["chat_template"] = CHATML
    _update_json(path, {name: value for name, value in missing.items() if said.get(name) is None})


def _update_json(path: Path, values: dict[str, Any]) -> None:
    """Sets fields of a JSON object in a file, which need not exist."""
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(said | values, indent=2, ensure_ascii=False) + "\n")
