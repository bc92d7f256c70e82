"""Our ids against transformers' for trained and imported tokenizers; training against itself on other thread counts."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from moray.data import pieces, tokenizer
from moray.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_in,
    train_tokenizer,
)

TEXTS = [Path(__file__).read_text(), Path(os.__file__).read_text(), Path(json.__file__).read_text()]
STRANGE = "naïve Ünïcödé 三月 🙂\t\x00\r\n  indent\n\n<|im_start|>user\nhi<|im_end|> <|eos|> "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train_tokenizer(TEXTS, folder, 600)


def test_transformers_agrees_id_by_id(trained: tuple[Path, Tokenizer]) -> None:
    folder, ours = trained
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, STRANGE, "", " ", "a"]:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size == 600
    assert len(theirs("<|bos|><|eos|><|pad|><|im_start|><|im_end|>").input_ids) == 5


def test_a_document_is_bos_text_eos_and_its_text_is_only_text(trained: tuple[Path, Tokenizer]) -> None:
    folder, ours = trained
    theirs = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip([*TEXTS, STRANGE], ours.encode_documents([*TEXTS, STRANGE]), strict=True):
        plain = theirs(text, split_special_tokens=True).input_ids
        assert ids.tolist() == [ours.bos_id, *plain, ours.eos_id]
        assert ids.dtype == np.uint16
        assert ours.decode(ids[1:-1]) == text
    assert ours.encode("<|eos|>") == [ours.eos_id], "outside of documents a special token is read as one"


def test_long_documents_are_encoded_in_pieces_and_batches(
    trained: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 500)
    monkeypatch.setattr(tokenizer, "BATCH_BYTES", 1200)
    folder, ours = trained
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = ["", "short", TEXTS[1], "x" * 3000, STRANGE, TEXTS[2] * 3, ""]
    for text, ids in zip(texts, ours.encode_documents(texts), strict=True):
        assert ids.tolist() == [ours.bos_id, *theirs(text, split_special_tokens=True).input_ids, ours.eos_id]


# As in tests/data/reading/test_memory.py.
LONG_DOCUMENT = """
import random, sys
from pathlib import Path
from moray.data.tokenizer import load_tokenizer
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
tokenizer = load_tokenizer(sys.argv[1])
text = " ".join(random.Random(0).choices(["quick", "brown", "foxes", "jump"], k=700_000))
before = peak()
(ids,) = tokenizer.encode_documents([text])
print(len(ids), peak() - before)
"""


def test_memory_does_not_grow_with_a_documents_tokens(trained: tuple[Path, Tokenizer]) -> None:
    command = [sys.executable, "-c", LONG_DOCUMENT, str(trained[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    n_tokens, growth = map(int, done.stdout.split())
    assert n_tokens > 2_000_000
    assert growth < 150 << 20, "at 260 bytes a token it would be 500 MiB and more"


@pytest.mark.parametrize("word", ["abcdefgh", "三月人家山水風花", " ", "=-"])
def test_training_on_endless_words_ends(tmp_path: Path, word: str) -> None:
    """In time that grew with a word's length for each of its merges, these took many minutes."""
    texts = ["".join(random.Random(0).choices(word, k=300_000)), *TEXTS]
    ours = train_tokenizer(texts, tmp_path, 1000)
    assert ours.vocab_size == 1000
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts[0][:2000]).input_ids == ours.encode(texts[0][:2000])
    assert "Split" not in (tmp_path / "tokenizer.json").read_text(), "the tokenizer itself knows no such limit"


def test_words_of_common_length_are_trained_on_whole(tmp_path: Path) -> None:
    """Against a tokenizer that tokenizers alone trains, without any limit."""
    texts = [*TEXTS, "x" * 256 + " " + "ab" * 100, *(" ".join(TEXTS) for _ in range(3))]
    ours = train_tokenizer(texts, tmp_path, 800)
    alone = tokenizers.Tokenizer(models.BPE())
    alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    alone.train_from_iterator(texts, trainer)
    assert json.loads(ours.backend.to_str())["model"] == json.loads(alone.to_str())["model"]


def test_training_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moray.data.tokenizer import train_tokenizer\n"
        "texts = [path.read_text() for path in sorted(Path(sys.argv[2]).glob('*.py'))]\n"
        "train_tokenizer(texts, Path(sys.argv[1]), 2000)"
    )
    for threads in ("1", "5"):
        folder = tmp_path / threads
        folder.mkdir()
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, str(folder), str(Path(os.__file__).parent)]
        subprocess.run(command, check=True, env=environment, timeout=50)
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "5" / "tokenizer.json").read_bytes()


def test_the_vocabulary_has_the_size_asked_for_or_what_the_text_gives(tmp_path: Path) -> None:
    assert train_tokenizer(["ab"], tmp_path, 6400).vocab_size == 256 + 5 + 1
    with pytest.raises(ValueError, match="vocab_size=260 must be at least 261"):
        train_tokenizer(["ab"], tmp_path, 260)


def imported(folder: Path, config: dict, highest_id: int = 300) -> Path:
    """A tokenizer as others ship them: its template adds BOS, truncation and padding are on, its ids have a hole."""
    vocab = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {
        "<s>": 256,
        "</s>": highest_id,
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return folder


def test_an_imported_tokenizer(tmp_path: Path) -> None:
    source = imported(
        tmp_path / "theirs", {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    )
    (tmp_path / "ours").mkdir()
    ours = copy_tokenizer(source, tmp_path / "ours")
    text = "longer than four tokens"
    assert ours.encode(text) == AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False).input_ids
    assert next(ours.encode_documents([text])).tolist() == [256, *ours.encode(text), 300]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (256, 300, 300, 301)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").bos_token_id == 256


def test_the_tokenizer_of_a_dataset_at_a_url(trained: tuple[Path, Tokenizer]) -> None:
    folder, tokenizer = trained
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/at-a-url", recursive=True)
    try:
        for place in (folder, f"file://{folder}", "memory://at-a-url"):
            with tokenizer_in(place) as here:
                assert load_tokenizer(here).encode("def f(x): é") == tokenizer.encode("def f(x): é"), place
    finally:
        memory.rm("/at-a-url", recursive=True)
    assert not here.exists(), "what was fetched is not kept"
    assert folder.exists()


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    assert load_tokenizer(imported(tmp_path / "a", config, highest_id=65535)).dtype == np.uint16
    assert load_tokenizer(imported(tmp_path / "b", config, highest_id=65536)).dtype == np.uint32


def test_what_an_imported_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(imported(tmp_path / "a", {"bos_token": "<s>", "eos_token": None}))
    with pytest.raises(ValueError, match="has bos_token='<start>', which its tokenizer"):
        load_tokenizer(imported(tmp_path / "b", {"bos_token": "<start>", "eos_token": "</s>"}))
    assert load_tokenizer(imported(tmp_path / "c", {"eos_token": "</s>", "pad_token": "[PAD]"})).pad_id == 300
    with pytest.raises(ValueError, match=r"must be a folder that holds a tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Unheard"}}'])
def test_a_file_that_holds_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    folder = imported(tmp_path / "theirs", {"bos_token": "<s>", "eos_token": "</s>"})
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    folder = imported(tmp_path / "theirs", {"bos_token": "<s>", "eos_token": "</s>"})
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json (is not JSON|must hold a JSON object)"):
        load_tokenizer(folder)
