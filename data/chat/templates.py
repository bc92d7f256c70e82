"""Which chat template a tokenizer's folder has."""

import json
from pathlib import Path

from moray.data.chat.chatml import ChatML
from moray.data.chat.jinja_template import CHAT_TEMPLATE, JinjaTemplate
from moray.data.chat.turns import ChatTemplate
from moray.data.special_tokens import IM_START
from moray.data.tokenizer import load_tokenizer


def chat_template_of(folder: str | Path) -> ChatTemplate:
    """Its own, or ChatML where it has none. Raises UserError for one that cannot be used."""
    folder, tokenizer = Path(folder), load_tokenizer(folder)
    stated = stated_template(folder)
    if stated is None:
        return ChatML(tokenizer, folder)
    if tokenizer.backend.token_to_id(IM_START) is not None:
        chatml = ChatML(tokenizer, folder)
        if chatml.jinja.strip() == stated.strip():
            return chatml
    return JinjaTemplate(stated, tokenizer, folder)


def stated_template(folder: Path) -> str | None:
    """The template in a folder, as a file of its own or in tokenizer_config.json; of several the default one."""
    if (file := folder / CHAT_TEMPLATE).is_file():
        return file.read_text()
    config = folder / "tokenizer_config.json"
    stated = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    if isinstance(stated, list):
        stated = next((each["template"] for each in stated if each.get("name") == "default"), None)
    return None if stated is None else str(stated)
