"""Every document is accounted for: a corpus of known numbers of each kind, and what is told of it everywhere."""

import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console

from moray import UserError
from moray.data.curation.masking import masked
from moray.data.preparation.ledger import KEPT, READ, Ledger, Sample
from moray.data.preparation.runs import digest_of
from moray.jobs.datasets.config import PrepareConfig, load_preparation
from moray.jobs.datasets.page import render
from moray.jobs.datasets.prepare import Summary, prepare
from moray.jobs.datasets.table import MOST_REASONS, table_of

ITEM = "which of these seven painted birds had flown over the northern sea before winter came"
MENU = "Home About Contact"
ADDRESS = "somebody.else@example.com"
FOOTER = "This page was written with the help of many friendly readers and is given to all of them."
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
INVISIBLE = "\u2060\u2060"
QUIET = Console(file=io.StringIO())

RULES = {
    ("rules", "gopher_n_words"): 5,
    ("rules", "gopher_duplicate_lines"): 4,
    ("rules", "c4_curly_brackets"): 3,
    ("rules", "chinese_n_words"): 6,
}
PLANTED = {
    **RULES,
    ("reading", "bad records"): 2,
    ("reading", "empty"): 3,
    ("reading", "too long"): 1,
    ("cleaning", "nothing left"): 2 + 1,
    ("benchmarks", "run of words of an evaluation"): 3,
    ("exact duplicates", "equal text"): 2 + 2 + 1,
    ("near-duplicates", "MinHash"): 6,
    ("paragraphs", "nothing else"): 1,
}


class Corpus:
    """page.jsonl and a folder of texts. keys: by what was planted."""

    def __init__(self, folder: Path) -> None:
        self._rng = random.Random(7)
        self._words = [
            "".join(self._rng.choices("abcdefghijklmnoprstuvw", k=self._rng.randint(4, 8))) for _ in range(3000)
        ]
        self.rows: list[str] = []
        self.pages, self.texts = folder / "pages.jsonl", folder / "texts"
        self.texts.mkdir()
        self.items = folder / "items.jsonl"
        self.items.write_text(json.dumps({"question": ITEM, "answer": "#### 4"}) + "\n")

    def sentence(self) -> str:
        words = [*self._rng.choices(self._words, k=9), "the", "of", "with", "that"]
        self._rng.shuffle(words)
        return " ".join(words).capitalize() + "."

    def paragraph(self) -> str:
        return " ".join(self.sentence() for _ in range(4))

    def prose(self, n_paragraphs: int = 4) -> str:
        return "\n\n".join(self.paragraph() for _ in range(n_paragraphs))

    def add(self, name: str, *texts: str) -> None:
        self.rows += [json.dumps({"id": f"{name}-{n}", "text": text}) for n, text in enumerate(texts)]

    def plant(self) -> None:
        good = [self.prose() for _ in range(40)]
        self.add("good", *good)
        self.add("exact", *good[:2])
        self.add("crlf", *(text.replace("\n", "\r\n") + INVISIBLE for text in good[2:4]))
        (self.texts / "bom.txt").write_bytes(b"\xef\xbb\xbf" + good[4].encode())
        (self.texts / "own.txt").write_text(self.prose())
        self.add("near", *(f"{text[:-1]} {word}." for text, word in zip(good[10:16], self._words, strict=False)))
        self.add("short", *(" ".join(self.sentence() for _ in range(2)) for _ in range(5)))
        self.add("repetitive", *("\n".join([self.paragraph()] + [self.sentence()] * 9) for _ in range(4)))
        self.add("curly", *(f"{self.prose()}\n\n{self.sentence()[:-1]} {{ x }} so." for _ in range(3)))
        self.add("poem", *(POEM + chr(0x4E00 + n) * 2 + "。" for n in range(6)))
        self.add("item", *(f"{self.prose()}\n\nNobody said {ITEM} and went." for _ in range(3)))
        self.add("menu", *(f"{MENU}\n{self.prose()}" for _ in range(5)))
        self.add("nothing", MENU, f"{MENU}\n{MENU}")
        self.add("invisible", "\xad\xad")
        self.add("empty", "\u200b", "", "\ufeff \n")
        self.add("mail", *(f"{self.prose()} Write to {ADDRESS} of the house." for _ in range(2)))
        self.add("footer", *(f"{self.prose()}\n\n{FOOTER}" for _ in range(8)))
        self.add("long", "word " * 9000)
        self.rows += ['{"id": "bad"', '{"id": "worse", "text": ']
        # What is made of paragraphs that others have must come after them in the shuffle.
        latest = sorted(good[20:], key=lambda text: digest_of(text, 0))[:4]
        made = [text.split("\n\n")[n] for n, text in enumerate(latest)]
        while True:
            self._rng.shuffle(made)
            copied = "\n\n".join(made)
            if digest_of(copied, 0) > digest_of(latest[-1], 0):
                break
        self.add("copied", copied)
        self._rng.shuffle(self.rows)
        self.pages.write_text("\n".join(self.rows) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    corpus.plant()
    return corpus


def prepared(corpus: Corpus, out: Path, **settings: object) -> Summary:
    config = load_preparation(
        "web",
        {
            "rules.sets": "gopher-quality,gopher-repetition,c4,chinese",
            "benchmarks.tasks": str(corpus.items),
            "clean.mask": "email",
            "max_document_bytes": 30_000,
            "long_documents": "drop",
            "vocab_size": 400,
            "validation": 0.1,
            "sources": (corpus.pages, corpus.texts),
            "out": out,
            **settings,
        },
    )
    return prepare(config, QUIET)


@pytest.fixture(scope="module")
def made(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, Path]:
    folder = tmp_path_factory.mktemp("made")
    return prepared(corpus, folder / "out", drops=folder / "drops.parquet"), folder


def shown(ledger: Ledger, stage: str) -> dict[str, Sample]:
    return {sample.key: sample for (of, _), samples in ledger.samples.items() if of == stage for sample in samples}


def test_what_was_planted_is_what_is_counted(made: tuple[Summary, Path], corpus: Corpus) -> None:
    ledger = made[0].ledger
    ledger.check()
    assert {(stage, reason): n for stage, reason, n, _ in ledger.dropped()} == PLANTED
    assert ledger.total(READ)[0] == len(corpus.rows) + 2
    assert ledger.total(KEPT)[0] == ledger.total(READ)[0] - sum(PLANTED.values())
    n_kept = sum(split.n_documents for split in made[0].dataset.splits.values())
    assert n_kept == ledger.total(KEPT)[0] == 40 + 1 + 5 + 2 + 8
    texts = [json.loads(row)["text"] for row in corpus.rows if not row.startswith(('{"id": "bad', '{"id": "worse'))]
    usable = [text for text in texts if text.strip("\ufeff\u200b \n") and len(text) <= 30_000]
    assert ledger.total(READ, "pages.jsonl")[1] == sum(len(text.replace("\r\n", "\n").encode()) for text in usable)
    for source in ("pages.jsonl", "texts"):
        keys = [key for key in ledger.documents if key[0] == source and key[1] not in (READ, KEPT)]
        dropped = [sum(counts[key] for key in keys) for counts in (ledger.documents, ledger.bytes)]
        cleaned = sum(count for (of, _), count in ledger.cleaned.items() if of == source)
        kept = ledger.total(KEPT, source)
        assert ledger.total(READ, source) == (kept[0] + dropped[0], kept[1] + dropped[1] + cleaned)


def test_what_is_cleaned_away_is_told_to_the_byte(made: tuple[Summary, Path]) -> None:
    cleaned = made[0].ledger.cleaned
    assert cleaned["pages.jsonl", "lines"] == 5 * len(MENU + "\n")
    assert cleaned["pages.jsonl", "paragraphs"] == 7 * len("\n\n" + FOOTER)
    assert cleaned["pages.jsonl", "characters"] == 2 * len(INVISIBLE.encode())
    assert cleaned["pages.jsonl", "mask"] == 2 * (len(ADDRESS) - len(masked(ADDRESS, ("email",))))


def test_samples_say_what_was_measured_and_who_stayed(made: tuple[Summary, Path]) -> None:
    ledger = made[0].ledger
    rules = shown(ledger, "rules")
    assert rules["pages.jsonl:short-0"].value == "26, must be >= 50"
    assert rules["pages.jsonl:poem-0"].value == "22, must be >= 50"
    assert rules["pages.jsonl:curly-0"].value.endswith("must be <= 0")
    near = shown(ledger, "near-duplicates")
    assert {frozenset((key, sample.kept)) for key, sample in near.items()} == {
        frozenset((f"pages.jsonl:good-{10 + n}", f"pages.jsonl:near-{n}")) for n in range(6)
    }
    assert all(float(sample.value.removeprefix("Jaccard index ")) > 0.8 for sample in near.values())
    exact = shown(ledger, "exact duplicates")
    assert {frozenset((key, sample.kept)) for key, sample in exact.items()} == {
        frozenset(f"pages.jsonl:{name}" if "." not in name else name for name in pair)
        for pair in (("good-0", "exact-0"), ("good-1", "exact-1"), ("good-2", "crlf-0"), ("good-3", "crlf-1"))
    } | {frozenset(("pages.jsonl:good-4", "texts/bom.txt"))}
    assert ITEM.split()[3] in next(iter(shown(ledger, "benchmarks").values())).value
    assert "not JSON" in " ".join(sample.value for sample in shown(ledger, "reading").values())
    assert all("pages.jsonl, line " in key and not key.startswith("/") for key in shown(ledger, "reading"))


def test_the_list_of_drops_adds_up_to_the_ledger(made: tuple[Summary, Path], corpus: Corpus) -> None:
    summary, folder = made
    rows = pyarrow.parquet.read_table(folder / "drops.parquet").to_pylist()
    documents: Counter[tuple[str, ...]] = Counter()
    n_bytes: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        documents[row["source"], row["stage"], row["reason"]] += 1
        n_bytes[row["source"], row["stage"], row["reason"]] += row["bytes"]
    dropped = {key for key in summary.ledger.documents if key[1] not in (READ, KEPT)}
    assert documents == {key: summary.ledger.documents[key] for key in dropped}
    assert n_bytes == {key: summary.ledger.bytes[key] for key in dropped}
    assert {row["key"]: row["kept"] for row in rows if row["stage"] == "near-duplicates"} == {
        key: sample.kept for key, sample in shown(summary.ledger, "near-duplicates").items()
    }
    assert sorted(path.name for path in folder.iterdir()) == ["drops.parquet", "out"]
    without = prepared(corpus, folder / "without")
    assert without.dataset.fingerprint == summary.dataset.fingerprint
    for name in ("report.json", "report.html"):
        assert (folder / "without" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_list_of_drops_that_cannot_be_written_is_refused_before_reading(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for drops, message in (
        ("drops.csv", r"drops.csv must be a .parquet file, for example .*drops.parquet"),
        ("no/drops.parquet", "there is no folder .*no; make it"),
        ("out/drops.parquet", "lies in out=.*out, which holds the dataset alone"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(corpus, tmp_path / "out", drops=tmp_path / drops)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"writing a .parquet file needs pyarrow.parquet: pip install"):
        prepared(corpus, tmp_path / "out", drops=tmp_path / "drops.parquet")
    assert not list(tmp_path.iterdir())


def test_the_table_tells_all_in_a_few_lines(made: tuple[Summary, Path]) -> None:
    lines = table_of(made[0].ledger)
    assert len(lines) <= 24
    assert lines[0].split() == ["documents", "bytes", "share"]
    assert lines[1].startswith("read ")
    assert any(line.startswith("  rules: gopher_n_words ") and line.split()[2] == "5" for line in lines)
    assert any(line.startswith("  cleaned: paragraphs ") for line in lines)
    assert lines[-2].startswith("  of pages.jsonl ")
    assert table_of(made[0].ledger)[1:4] == str(made[0]).splitlines()[4:7]
    many = Ledger()
    for n in range(30):
        many.count("a [bracket]", "rules", f"rule {n:02d}", n, n + 1)
    many.count("a [bracket]", READ, "", 465, 465)
    rest = next(line for line in table_of(many) if "rarer" in line)
    assert rest.split()[:4] == [str(30 - MOST_REASONS), "rarer", "reasons", "(report.html)"]
    assert rest.split()[4] == str(sum(range(1, 31 - MOST_REASONS)))


def test_the_page_is_inert_whatever_documents_hold(made: tuple[Summary, Path]) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    ledger = Ledger()
    ledger.count(evil, READ, "", 100)
    ledger.drop(evil, "rules", evil, 100, Sample("00", evil, evil, evil, evil))
    page = render(ledger, {"text_field": evil, "é": ["a", "b"]})
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert page.isascii()
    page = (made[1] / "out" / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "src=" not in page.replace("-src ", "")
    for word in ("after near-duplicates", "gopher_n_words", "texts/bom.txt", "duplicates.near"):
        assert word in page


def test_an_interrupted_preparation_that_listed_nothing_cannot_give_the_list(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moray.jobs.datasets.prepare.write_reports", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(corpus, tmp_path / "out")
    with pytest.raises(UserError, match="preparation there has drops=False, this one drops=True; give the same"):
        prepared(corpus, tmp_path / "out", drops=tmp_path / "drops.parquet")


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_template_refuses_is_listed_too(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(30)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    first = prepare(PrepareConfig(sources=(chats,), out=tmp_path / "plain", vocab_size=300, kind="chat"), QUIET)
    template = tmp_path / "plain" / "chat_template.jinja"
    refusal = "{% if messages[0].content == 'say 7' %}{{ raise_exception('not 7') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    drops = tmp_path / "drops.parquet"
    given = {"sources": (chats,), "kind": "chat", "tokenizer": first.dataset.folder}
    made = prepare(PrepareConfig(out=tmp_path / "out", drops=drops, **given), QUIET)  # type: ignore[arg-type]
    (row,) = pyarrow.parquet.read_table(drops).to_pylist()
    assert (row["stage"], row["key"], row["bytes"]) == ("template", "chats.jsonl:8", made.ledger.total("template")[1])
    assert "not 7" in row["value"]
