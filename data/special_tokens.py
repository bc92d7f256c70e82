"""What a folder says of a tokenizer's special tokens: which they are, what begins a text, and what ends one."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from moray import UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML
SPECIAL_TOKENS = (BOS, EOS, PAD, IM_START, IM_END)
GENERATION_CONFIG = "generation_config.json"


def special_id(backend: tokenizers.Tokenizer, folder: Path, name: str) -> int | None:
    """The id of `bos_token`, `eos_token` or `pad_token`, as the folder's configuration names it; None: it names none.

    Raises UserError for a name that the vocabulary does not hold; only PAD, which no data holds, may be such.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _stated(folder / file).get(name)
        if isinstance(token, dict):  # an AddedToken, written out
            token = token.get("content")
        if token is not None:
            if (found := backend.token_to_id(str(token))) is None and name != "pad_token":
                raise UserError(
                    f"tokenizer={str(folder)!r} has {name}={token!r}, which its tokenizer.json does not hold; "
                    f"name one of its tokens in {file}"
                )
            return found
    return None


def default_start(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the template in tokenizer.json puts before a text; `add_bos_token` does not matter beside it."""
    encoding = backend.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(token for token, _ in takewhile(lambda pair: pair[1], marked))


def named_stops(folder: Path) -> tuple[int, ...]:
    """The ids that end a text by generation_config.json or, where that names none, by config.json.

    Raises UserError for what are no ids.
    """
    for path in (folder / GENERATION_CONFIG, folder / "config.json"):
        named = _stated(path).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if any(type(token) is not int or not 0 <= token < 1 << 32 for token in ids):  # bool is an int
            raise UserError(f"{path}: eos_token_id={named!r} must be a token id or a list of them")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def copy_stops(source: Path, folder: Path) -> None:
    """Writes into a tokenizer's folder which ids end a text where the model in `source` says so."""
    if stops := named_stops(source):
        (folder / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": list(stops)}) + "\n")


def add_stop(folder: Path, stops: tuple[int, ...], token: int) -> None:
    """Has a tokenizer's folder say that a text ends at `token`, too, beside the `stops` that it ends at."""
    if token not in stops:
        (folder / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [*stops, token]}) + "\n")


def _stated(path: Path) -> dict[str, Any]:
    """What a configuration says, if it is there. Raises UserError naming a file that holds no JSON object."""
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(stated, dict):
        raise UserError(f"{path} must hold a JSON object, not {str(stated)[:40]}")
    return stated
