"""Reads config.json so that no field is overlooked: what nobody takes is refused unless it is known to be harmless."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moray import UserError

_HARMLESS = """
model_type architectures transformers_version dtype torch_dtype auto_map _name_or_path name_or_path _commit_hash
use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset
experts_implementation _experts_implementation pretraining_tp gradient_checkpointing chunk_size_feed_forward
output_attentions output_hidden_states output_router_logits return_dict use_return_dict torchscript use_bfloat16
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
tokenizer_class prefix task_specific_params problem_type transformers.js_config id2label label2id finetuning_task
temperature top_k top_p typical_p max_length min_length do_sample early_stopping num_beams num_beam_groups
diversity_penalty length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences begin_suppress_tokens suppress_tokens return_dict_in_generate output_scores
exponential_decay_length_penalty remove_invalid_values
attention_dropout hidden_dropout attn_pdrop resid_pdrop embd_pdrop embed_dropout classifier_dropout dropout
"""
"""Who wrote the file; how transformers computes the same values; tokens, and the settings of tasks and generation that
old versions wrote here; dropout, which moray never has."""

MISSING = object()
"""The default of a field that must be there."""


class Fields:
    """The fields of one config.json: each must be taken, or be harmless, or be off (null, false, 0 or empty)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = MISSING) -> Any:
        """A field's value; `default` where the file does not say. Raises UserError naming a field without either."""
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is MISSING:
            raise UserError(f"config.json has no {name}")
        return value

    def count(self, name: str, default: Any = MISSING) -> int:
        """A field that is a number of things. Raises UserError for one that is not a whole number of at least 1."""
        value = self.take(name, default)
        if type(value) is not int or value < 1:  # bool is an int
            raise refused(name, value, "it must be a whole number of at least 1")
        return value

    def number(self, name: str, default: Any = MISSING) -> float:
        """A field to calculate with. Raises UserError for one that is not a number."""
        value = self.take(name, default)
        if type(value) not in (int, float):
            raise refused(name, value, "it must be a number")
        return float(value)

    def finish(self) -> None:
        """Raises UserError naming, with their values, all fields that were not taken and may not be ignored."""
        left = {name: value for name, value in self._values.items() if name not in self._taken | set(_HARMLESS.split())}
        refused = [f"{name}={value!r}" for name, value in left.items() if value not in (None, False, "", [], {})]
        if refused:
            raise UserError(
                f"config.json of model_type={self._values.get('model_type')} has fields that moray does not know and "
                f"that may change what the model computes: {', '.join(refused)}"
            )


def json_object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds. Raises UserError naming a file that holds no JSON object."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {str(values)[:40]}")
    return values


def refused(name: str, value: Any, right: str) -> UserError:
    """The error for a field whose value has no equal among ours."""
    return UserError(f"config.json: {name}={value!r} is not supported; {right}")
