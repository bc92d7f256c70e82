"""`prepare` of dialogues, pairs and prompts, end to end."""

import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from rich.console import Console
from transformers import AutoTokenizer

from moray import UserError
from moray.data.blocks import BlockReader
from moray.data.dataset import Dataset
from moray.data.preparation import bucket
from moray.data.reading.documents import found_kind
from moray.data.reading.rules import Rules
from moray.data.shards import TRAINED, USER_TURN, SplitWriter
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import Summary, prepare

QUIET = Console(file=io.StringIO())


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(out: Path, *sources: Path, kind: Any = "chat", **settings: Any) -> Summary:
    given = {"vocab_size": 400, "validation": 0.2, **settings}
    return prepare(PrepareConfig(sources=sources, out=out, kind=kind, **given), QUIET)


def samples(dataset: Dataset, split: str) -> list[dict[str, Any]]:
    """The documents as webdataset reads them: key, tokens, mask, and a prompt's reference."""
    urls = [str(Path(dataset.folder, shard.name)) for shard in dataset.splits[split]]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        cuts = sample["ends.npy"][:-1]
        parts = zip(np.split(sample["tokens.npy"], cuts), np.split(sample["mask.npy"], cuts), strict=True)
        names = sample["json"]
        references = names.get("references", [None] * len(names["documents"]))
        found += [
            {"key": key, "tokens": tokens, "mask": mask, "reference": reference}
            for key, (tokens, mask), reference in zip(names["documents"], parts, references, strict=True)
        ]
    return found


SUMS = [{"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}."} for i in range(60)]


def test_dialogues_come_out_as_transformers_writes_them(tmp_path: Path) -> None:
    summary = prepared(tmp_path / "out", written(tmp_path / "sums.jsonl", SUMS))
    dataset, tokenizer = summary.dataset, AutoTokenizer.from_pretrained(tmp_path / "out")
    assert dataset.kind == "chat"
    dataset.verify()
    found = {each["key"]: each for split in dataset.splits for each in samples(dataset, split)}
    assert len(found) == 60
    for number, record in enumerate(SUMS, 1):
        messages = [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        ]
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ours = found[f"sums.jsonl:{number}"]
        assert ours["tokens"].tolist() == theirs["input_ids"]
        assert (ours["mask"] & TRAINED).tolist() == theirs["assistant_masks"]
        assert (ours["mask"] & USER_TURN > 0).sum() == 1
    lengths = np.concatenate([split.all_lengths for split in dataset.splits.values()])
    assert sorted(lengths.tolist()) == sorted(len(each["tokens"]) for each in found.values())
    said = str(summary)
    assert "dialogues, " in said
    assert f"longest {lengths.max()}" in said
    trained = sum(int((each["mask"] & TRAINED > 0).sum()) for each in found.values())
    assert f"{trained:,} tokens of answers and their ends, {trained / lengths.sum():.1%}" in said


def test_the_same_bytes_whatever_the_order_of_sources(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a.jsonl", SUMS[:30]), written(tmp_path / "b.jsonl", SUMS[30:])
    first, second = prepared(tmp_path / "1", one, other), prepared(tmp_path / "2", other, one)
    assert first.dataset.fingerprint == second.dataset.fingerprint


def test_all_answers_to_a_prompt_are_on_one_side(tmp_path: Path) -> None:
    """OpenRLHF 1089: an answer that is held out, and another to the same question that is not."""
    records = [{"instruction": f"Name {i}", "input": "", "outputs": [f"n{i}", f"m{i}", f"o{i}"]} for i in range(40)]
    dataset = prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records)).dataset
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = {
        split: [tokenizer.decode(each["tokens"]).split("assistant")[0] for each in samples(dataset, split)]
        for split in dataset.splits
    }
    assert not set(asked["train"]) & set(asked["validation"])
    assert len(asked["train"]) + len(asked["validation"]) == 120
    assert all(len(texts) == 3 * len(set(texts)) for texts in asked.values())


def test_a_source_given_twice_counts_twice(tmp_path: Path) -> None:
    source = written(tmp_path / "x.jsonl", SUMS)
    twice = prepared(tmp_path / "twice", source, source).dataset
    keys = [each["key"] for split in twice.splits for each in samples(twice, split)]
    assert len(keys) == len(set(keys)) == 120
    once = prepared(tmp_path / "once", source, source, dedup="exact")
    assert once.n_duplicates == 60
    assert sum(split.n_documents for split in once.dataset.splits.values()) == 60


def test_pairs_stand_side_by_side_and_differ_in_what_is_trained_on(tmp_path: Path) -> None:
    records = [
        {
            "conversations": [
                {"from": "human", "value": f"first {i}"},
                {"from": "gpt", "value": "before"},
                {"from": "human", "value": "and?"},
            ],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        }
        for i in range(30)
    ]
    dataset = prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records), kind="preference").dataset
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for split in dataset.splits:
        found = samples(dataset, split)
        for better, worse in zip(found[::2], found[1::2], strict=True):
            assert better["key"] == worse["key"]
            for each, text in ((better, "good"), (worse, "bad")):
                trained = each["tokens"][each["mask"] & TRAINED > 0]
                assert tokenizer.decode(trained) == text + "<|im_end|>", "the last answer alone"


def test_a_pair_is_in_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.data.preparation.encode.SplitWriter", partial(SplitWriter, block_tokens=40))
    records = [{"prompt": f"p {i}", "chosen": "a " * i, "rejected": "b"} for i in range(1, 40)]
    dataset = prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records), kind="preference").dataset
    blocks = [
        shard.sample(n) for split in dataset.splits.values() for shard in split for n in range(len(shard.records))
    ]
    assert len(blocks) > 10
    assert all(block.n_documents % 2 == 0 for block in blocks)


def test_prompts_keep_their_references(tmp_path: Path) -> None:
    records = [{"question": f"{i} + 1?", "answer": f"well\n#### {i + 1}"} for i in range(30)]
    dataset = prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records), kind="prompts").dataset
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = {each["key"]: each for split in dataset.splits for each in samples(dataset, split)}
    for number, record in enumerate(records, 1):
        each = found[f"x.jsonl:{number}"]
        assert each["reference"] == str(number)
        message = [{"role": "user", "content": record["question"]}]
        assert (
            each["tokens"].tolist() == tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        )
        assert not each["mask"].any()


def test_bad_records_are_named_and_bounded(tmp_path: Path) -> None:
    source = written(
        tmp_path / "x.jsonl", [*SUMS, {"body": "x"}, {"messages": [{"role": "assistant", "content": "a"}]}]
    )
    said = str(prepared(tmp_path / "out", source))
    (tmp_path / "half.jsonl").write_text('{"instruction": "hi \\ud83d", "output": "yes"}\n')
    assert "line 1: not UTF-8 (half of a surrogate pair)" in str(
        prepared(tmp_path / "2", source, tmp_path / "half.jsonl")
    )
    assert "x.jsonl, line 61: of no form that is known as chat; its fields: ['body']" in said
    assert "x.jsonl, line 62: roles out of order: turn 1 is assistant's" in said
    with pytest.raises(UserError, match=r"line 62: .*; more than max_bad=1 records are bad"):
        prepared(tmp_path / "other", source, max_bad=1)


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    source = written(tmp_path / "x.jsonl", [{"instruction": "i", "output": " "}] * 3)
    with pytest.raises(UserError, match=r"3 empty: .*line 1: an answer is empty"):
        prepared(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_the_template_refuses_whole_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "BUCKET_BYTES", 1 << 14)
    source = written(tmp_path / "x.jsonl", [{"instruction": f"say {n}", "output": f"{n} " * 200} for n in range(200)])
    whole = prepared(tmp_path / "whole", source).dataset
    assert len(whole.splits["train"]) >= 3
    blocks = BlockReader(whole, "train")
    refused = [key for block in range(len(whole.splits["train"][1].records)) for key in blocks.documents(1, block)[0]]
    lines = [int(key.rpartition(":")[2]) - 1 for key in refused]
    template = tmp_path / "whole" / "chat_template.jinja"
    stated = template.read_text()

    def refusing(said: str) -> None:
        template.write_text(f"{{% if {said} %}}{{{{ raise_exception('no, never') }}}}{{% endif %}}{stated}")

    refusing(f"messages[0].content in {[f'say {n}' for n in lines]}")
    made = prepared(tmp_path / "out", source, tokenizer=tmp_path / "whole")
    assert len(made.dataset.splits["train"]) == len(whole.splits["train"]) - 1
    kept = {sample["key"] for split in ("train", "validation") for sample in samples(made.dataset, split)}
    assert kept == {f"x.jsonl:{n + 1}" for n in range(200)} - {*refused}
    made.dataset.verify()
    dropped = [(stage, reason, n) for stage, reason, n, _ in made.ledger.dropped()]
    assert dropped == [("template", "not written by the chat template", len(refused))]
    assert "template: not written by the chat template" in str(made)
    refusing("true")
    with pytest.raises(UserError, match=r"no dialogues are left.* template of tokenizer=.*whole refuses .*no, never"):
        prepared(tmp_path / "none", source, tokenizer=tmp_path / "whole")


def test_repeated_answers_are_told(tmp_path: Path) -> None:
    records = [{"instruction": f"Is {i} odd?", "output": "Yes" if i % 2 else f"No, {i} is not."} for i in range(60)]
    assert "repeated   30 times 'Yes'" in str(prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records)))


def test_as_many_repeats_as_there_may_be_cost_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is counted at a time, the rarest are forgotten, half of them at once."""
    monkeypatch.setattr("moray.data.preparation.profile.MOST_ANSWERS", 10)
    records = [{"instruction": f"{i}", "output": "often" if i % 2 else f"a{i % 48}"} for i in range(96)]
    assert "repeated   48 times 'often'" in str(prepared(tmp_path / "out", written(tmp_path / "x.jsonl", records)))


@pytest.mark.parametrize(
    ("name", "record", "kind"),
    [
        ("x.jsonl", {"text": "t"}, "text"),
        ("x.jsonl", {"messages": [{"role": "user", "content": "q"}]}, "chat"),
        ("x.jsonl.gz", {"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ("x.txt", {}, "text"),
        ("x.jsonl", {"unheard": "of"}, "text"),
    ],
)
def test_the_kind_is_found(tmp_path: Path, name: str, record: Any, kind: str) -> None:
    opener: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write(json.dumps(record))
    assert found_kind([tmp_path / name], Rules()) == kind


def test_a_kind_that_is_not_clear(tmp_path: Path) -> None:
    source = written(tmp_path / "x.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(UserError, match=r"may be of kind chat or prompts, by its fields \['answer', 'question'\]"):
        found_kind([source], Rules())


def test_text_is_no_dialogue(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UserError, match=r"x.txt: plain text, which holds no chat; what does is .jsonl"):
        prepared(tmp_path / "out", tmp_path / "x.txt")


def test_parquet(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    messages = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(20)]
    parquet.write_table(arrow.table({"messages": messages}), tmp_path / "x.parquet")
    assert found_kind([tmp_path / "x.parquet"], Rules()) == "chat"
    dataset = prepared(tmp_path / "out", tmp_path / "x.parquet").dataset
    assert sum(split.n_documents for split in dataset.splits.values()) == 20
