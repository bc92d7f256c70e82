"""The tokenizer of a dataset: trained on a sample of its training split, or one that exists."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.data.chat.jinja_template import CHAT_TEMPLATE
from moray.data.chat.templates import chat_template_of
from moray.data.index import Kind
from moray.data.preparation.bucket import read_bucket
from moray.data.preparation.dialogues import texts
from moray.data.preparation.encode import of_split
from moray.data.preparation.progress import tick
from moray.data.preparation.runs import Run
from moray.data.preparation.tasks import LEDGER
from moray.data.special_tokens import add_stop
from moray.data.tokenizer import copy_tokenizer, train_tokenizer

# The first documents of the shuffled training split are a random sample; more text than this moves few merges.
SAMPLE_BYTES = 16 << 20


@dataclass(frozen=True)
class MakeTokenizer:
    """The files of a tokenizer of `vocab_size` entries or, where it is given, of the one in the folder `own`."""

    out: Path
    buckets: tuple[Path, ...]
    runs: tuple[Run, ...]
    limit: int
    kind: Kind
    vocab_size: int
    own: Path | None
    size: int = SAMPLE_BYTES

    def run(self, folder: Path) -> dict[str, Any]:
        if self.own is None:
            tokenizer = train_tokenizer(self._sample(), folder, self.vocab_size)
        else:
            tokenizer = copy_tokenizer(self.own, folder)
        if self.kind != "text":
            template = chat_template_of(folder)
            (folder / CHAT_TEMPLATE).write_text(template.jinja)
            if template.turn_end is not None:  # a base model's folder names the end of its documents alone
                add_stop(folder, tokenizer.stop_ids, template.turn_end)
        return {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}

    def _sample(self) -> Iterator[str]:
        n_bytes = 0
        for bucket in self.buckets:
            for record in read_bucket(of_split(bucket, "train", self.limit), self.runs):
                if n_bytes >= SAMPLE_BYTES:
                    return
                n_bytes += len(record.text)
                tick(len(record.text))
                yield from [record.text.decode()] if self.kind == "text" else texts(record)


def put_tokenizer(made: Path, folder: Path) -> None:
    """Copies the files of a tokenizer that was made."""
    for path in made.iterdir():
        if path.name != LEDGER:
            shutil.copyfile(path, folder / path.name)
