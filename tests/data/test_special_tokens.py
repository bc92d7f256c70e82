"""What begins and ends a text, for tokenizers of every kind, against what transformers does with the same folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig
from vocabularies import KINDS, glm, gpt2, llama2, qwen

from moray.data.special_tokens import named_stops
from moray.data.tokenizer import copy_tokenizer, load_tokenizer

TEXT = "The whale, said the man."
Kind = Callable[[Path], Path]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_before_a_text_is_what_transformers_puts_there(kind: Kind, tmp_path: Path) -> None:
    folder = kind(tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert [*ours.prompt_start, *ours.encode(TEXT)] == theirs(TEXT).input_ids
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize(
    ("kind", "start"),
    [(llama2, ["<s>"]), (qwen, []), (gpt2, ["<|endoftext|>"]), (glm, ["[gMASK]", "<sop>"])],
)
def test_a_document_begins_as_its_authors_pack_it(kind: Kind, start: list[str], tmp_path: Path) -> None:
    """By the template, or else by BOS, or with nothing: of Qwen's packed text only the ends are marked."""
    ours = load_tokenizer(kind(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = [*start, *theirs.tokenize(TEXT), theirs.eos_token]
    assert theirs.convert_ids_to_tokens(next(ours.encode_documents([TEXT])).tolist()) == expected


@pytest.mark.parametrize(
    ("generation", "model", "stops"),
    [
        (None, None, ["<|im_end|>"]),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 7}, ["<|im_end|>", "<|endoftext|>"]),
        ({"eos_token_id": 0}, None, ["<|im_end|>", "<|endoftext|>"]),
        ({"temperature": 0.7}, {"eos_token_id": [0, 1]}, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    ],
)
def test_a_text_ends_where_the_folder_says_and_so_it_does_in_a_copy(
    generation: dict[str, object] | None, model: dict[str, object] | None, stops: list[str], tmp_path: Path
) -> None:
    source, copy = qwen(tmp_path / "source"), tmp_path / "copy"
    for name, stated in (("generation_config.json", generation), ("config.json", model)):
        if stated is not None:
            (source / name).write_text(json.dumps(stated))
    copy.mkdir()
    for tokenizer in (load_tokenizer(source), copy_tokenizer(source, copy)):
        assert [tokenizer.backend.id_to_token(token) for token in tokenizer.stop_ids] == stops
    if generation and "eos_token_id" in generation:
        theirs = [GenerationConfig.from_pretrained(folder).eos_token_id for folder in (source, copy)]
        assert set(named_stops(copy)) == {*([theirs[0]] if isinstance(theirs[0], int) else theirs[0])} == {*theirs[1]}


def test_gpt2_as_published_names_its_end_in_config_json_alone(tmp_path: Path) -> None:
    source, copy = gpt2(tmp_path / "source"), tmp_path / "copy"
    (source / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (source / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    copy.mkdir()
    for tokenizer in (load_tokenizer(source), copy_tokenizer(source, copy)):
        assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.document_start) == (0, (0,), ())
    (source / "config.json").write_text('{"eos_token_id": 50256}')
    with pytest.raises(ValueError, match="no eos_token"):  # this vocabulary ends before it
        load_tokenizer(source)


@pytest.mark.parametrize("ends", ["</s>", -1, 1 << 32, [2, "3"], [True], 1.5])
def test_ends_that_are_no_ids_are_named(ends: object, tmp_path: Path) -> None:
    path = qwen(tmp_path) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* must be a token id or a list"):
        load_tokenizer(tmp_path)
