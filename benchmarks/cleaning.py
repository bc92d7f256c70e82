"""What cleaning is worth: text with known dirt in it, prepared as it is and by the recipe `web`, and a model on each.

    python benchmarks/cleaning.py SOURCE … [--mb 6] [--steps 300] [--into docs/data.md --picture docs/cleaning.png]

Clean are the sources' texts, in pieces of 3 kB, as the recipe leaves them. A twentieth of them is held out.
Into the rest are put near copies, copies in broken encoding, spam, stubs, menus and a footer; the first table compares
what was put in with what the recipe took out. Advertisements keep all rules: a classifier learns them from half of the
texts (as `moray quality train` does), and the second table is of the other half, with it. Then the same model is
trained twice, on as many tokens of the dirty text and of the cleaned one, and its loss is measured on the clean text
that neither has seen.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from optimizers import SMALL_RUN
from parity_table import replaced
from rich.console import Console

from moray.data.curation.paragraphs import hashes
from moray.data.preparation.curate import curate
from moray.data.preparation.ledger import Ledger
from moray.data.reading.account import Account
from moray.data.reading.documents import Document, read_documents
from moray.data.reading.rules import Rules
from moray.data.reading.texts import cut
from moray.jobs.config.load import load_config
from moray.jobs.datasets.config import PrepareConfig, load_preparation
from moray.jobs.datasets.curation import curation_of
from moray.jobs.datasets.prepare import Summary, prepare
from moray.jobs.datasets.quality import train_quality
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics

FOOTER = (
    "This page and all that is written on it were put together by the friends of good reading, who thank you for your "
    "visit and hope to see you again very soon."
)
MENU = "Home | Catalogue | Authors | Sign in"
SPAM = "Buy the best pills online today at the lowest price with free delivery."
SHORTEST = 1000  # characters; in shorter ones a changed word changes too many shingles
MOST_PIECES = 400  # of a document, so that there are some of many
SPAM_PAGES = 4  # to a text: of a crawl, too, most is not kept (of FineWeb's, 85%)


def clean_texts(sources: list[str], n_bytes: int) -> Iterator[str]:
    """What the recipe makes of pieces, where it keeps that as it is."""
    how, total, seen = curation_of(recipe(), Path()), 0, set[int]()
    for document in read_documents(sources, Account(Rules())):
        parts = islice(cut([document.text.encode()], 3000), MOST_PIECES)
        pieces = [Document(str(n), piece.decode()) for n, piece in enumerate(parts)]
        once = [each.document for each in curate(pieces, how, 0, "clean", Ledger())]
        kept = {each.document.key: each.document.text for each in curate(once, how, 0, "clean", Ledger())}
        for piece in once:
            own = set(hashes([piece.text])[0].tolist())
            if len(piece.text) >= SHORTEST and kept.get(piece.key) == piece.text and not own & seen:
                seen |= own
                total += len(piece.text.encode())
                yield piece.text
        if total >= n_bytes:
            return


@dataclass(frozen=True)
class Planted:
    """What was put into clean texts: documents by kind, and bytes of lines and paragraphs."""

    texts: list[str]
    near: int
    broken: int
    spam: int
    stubs: int
    menu_bytes: int
    footer_bytes: int


def planted(clean: list[str], seed: int = 0) -> Planted:
    """Of every ten texts, one comes in four copies with some words changed, one has a broken copy if it has any letter
    that breaks, three have a menu above them and three a footer below; there are four pages of spam to each text.
    """
    chance = random.Random(seed)
    texts, counts, with_footer = [], Counter[str](), 0
    for number, text in enumerate(clean):
        kind = number % 10
        is_spaced = text.count(" ") > len(text) / 10
        if kind in (2, 3, 4) and is_spaced:
            counts["menu"] += 1
            text = f"{MENU}\n{text}"
        if kind in (5, 6, 7) and is_spaced:
            with_footer += 1
            text = f"{text}\n\n{FOOTER}"
        texts.append(text)
        if kind == 0:
            counts["near"] += 4
            texts += changed(text, 4, chance)
        if kind == 1 and (broken := text.encode().decode("cp1252", "ignore")) != text and mended(broken) == text:
            counts["broken"] += 1
            texts.append(broken)
        for _ in range(SPAM_PAGES):
            topic = f"{chance.randrange(10**9):,}"
            texts.append("\n".join(f"{SPAM} Offer {topic} ends soon." for _ in range(chance.randrange(20, 40))))
        if kind in (8, 9):
            counts["stubs"] += 1
            texts.append(f"Page {topic} is empty. Please come back later.")
    chance.shuffle(texts)
    footer, menu = len(f"\n\n{FOOTER}".encode()), len(f"{MENU}\n".encode())
    dropped = (with_footer - 1) * footer
    spam, bytes_of_menus = SPAM_PAGES * len(clean), counts["menu"] * menu
    return Planted(texts, counts["near"], counts["broken"], spam, counts["stubs"], bytes_of_menus, dropped)


def changed(text: str, n_copies: int, chance: random.Random) -> list[str]:
    """Copies in which one word of two hundred is changed, or a character, another one in each: of 5-word shingles nine
    in ten or more are still there.
    """
    gap = " " if text.count(" ") > len(text) / 10 else ""
    words = text.split(gap) if gap else list(text)
    places, copies = chance.sample(range(len(words)), n_copies * max(len(words) // 200, 1)), []
    for number in range(n_copies):
        copy = list(words)
        for place in places[number::n_copies]:
            copy[place] = f"un{copy[place]}" if gap else "也"
        copies.append(gap.join(copy))
    return copies


def mended(text: str) -> str:
    import ftfy

    return ftfy.fix_encoding(text)


ADVERTS = """
The {} that you have been waiting for is now at {} in our {} store.
Our {} customers say that this {} is the best {} they have ever bought.
Order your {} before {} and we will send a {} with it, free of charge.
Do not miss the {} deals that we have on every {} and {} this week.
With a {} from us you save {} on the {} that your family will love.
Why should you pay more for a {} when {} is all that our {} costs?
Click on the {} below to get {} off and join the {} club today.
We have a {} for every home, from {} to {}, and you have the choice.
There is no better {} than the one with {} that comes in a {} box.
Hurry, because only {} of the {} are left and the {} sale ends soon.
Call the {} team and ask for {}, or visit the {} shop near you.
Sign up for {} news and be the first to hear of {} and of {} offers.
"""
WARES = "sofa lamp watch phone carpet kettle jacket camera garden summer premium budget luxury smart family"


def adverts(n: int, seed: int) -> list[str]:
    """Pages that no rule takes out: each of the sentences, with other words in it."""
    chance = random.Random(seed)
    pages = []
    for _ in range(n):
        sentences = chance.sample(ADVERTS.split("\n")[1:-1], 10)
        words = [" ".join(chance.sample(WARES.split(), 3)) for _ in range(30)]
        pages.append(" ".join(sentences).format(*words))
    return pages


def recipe(**settings: object) -> PrepareConfig:
    return load_preparation("web", {"clean.mojibake": True, "clean.mask": None, **settings})


def table(plants: Planted, cleaned: Summary, more: Sequence[tuple[str, int, int]] = ()) -> list[str]:
    """What was put in and what was taken out."""
    ledger = cleaned.ledger
    by_rule = Counter({reason: n for stage, reason, n, _ in ledger.dropped() if stage == "rules"})
    stubs = by_rule["gopher_n_words"] + by_rule["c4_n_sentences"]
    taken = Counter[str]()
    for (_, step), n in ledger.cleaned.items():
        taken[step] += n
    rows = [
        ("near copies", plants.near, ledger.total("near-duplicates")[0]),
        ("broken copies, equal once mended", plants.broken, ledger.total("exact duplicates")[0]),
        ("pages of spam, by rules of repetition", plants.spam, by_rule.total() - stubs),
        ("stubs, by rules of length", plants.stubs, stubs),
        ("bytes of menus, by lines", plants.menu_bytes, taken["lines"]),
        ("bytes of footers, by paragraphs", plants.footer_bytes, taken["paragraphs"]),
        *more,
    ]
    return ["| | put in | taken out |", "|---|---|---|", *(f"| {what} | {a:,} | {b:,} |" for what, a, b in rows)]


def judged(texts: list[str], tokenizer: Path, folder: Path) -> list[str]:
    """As `table`, of the half of the texts from which the classifier has not learnt, and of as many advertisements."""
    learnt, rest = texts[::2], texts[1::2]
    good, bad = written(folder / "good.jsonl", learnt), written(folder / "bad.jsonl", adverts(len(learnt), 1))
    how = {"held_out": 0.1, "seed": 0, "overwrite": False, "reading": Rules()}
    auc = train_quality([good], [bad], folder / "classifier", **how).classifier.auc
    plants, pages = planted(rest), adverts(len(rest), 2)
    sources = written(folder / "half.jsonl", plants.texts), written(folder / "adverts.jsonl", pages)
    quality = {"quality.classifier": str(folder / "classifier"), "quality.cut": 0.5}
    made = prepare(recipe(sources=sources, out=folder / "judged", tokenizer=tokenizer, **quality), Console(quiet=True))
    taken = [made.ledger.total("quality", source)[0] for source in ("adverts.jsonl", "half.jsonl")]
    rows = [("advertisements, by quality", len(pages), taken[0]), ("other texts, by quality", 0, taken[1])]
    print(f"AUC {auc:.4f}, {len(learnt):,} texts learnt or held out, {len(rest):,} judged", flush=True)
    return table(plants, made, rows)


def written(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def curve(data: Path, clean: Path, run: Path, steps: int) -> dict[int, float]:
    """Loss on the clean text, by step."""
    plan = {
        **SMALL_RUN,
        "data.mix": f"data=1:{data},clean=0:{clean}",
        "run.dir": str(run),
        "train.steps": str(steps),
        "optimizer.lr": "2e-3",
    }
    assert drive(load_config(None, plan), Console(quiet=True)) == 0
    rows = read_metrics(run)
    return {row["step"]: row["validation_loss/clean"] for row in rows if "validation_loss/clean" in row}


def picture(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on clean text that neither has seen")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def put(page: Path, what: str, lines: list[str]) -> None:
    page.write_text(replaced(page.read_text(), what, "\n".join(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--mb", type=float, default=6)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(dict.fromkeys(clean_texts(options.sources, int(options.mb * 1e6))))
        held_out, seen = texts[::20], [text for number, text in enumerate(texts) if number % 20]
        plants = planted(seen)
        print(f"{len(seen):,} clean texts, {len(held_out)} held out, {len(plants.texts):,} with dirt", flush=True)
        source = written(folder / "clean.jsonl", held_out)
        prepare(PrepareConfig(sources=(source,), out=folder / "clean", validation=0.9), quiet)
        dirt = {"sources": (written(folder / "dirty.jsonl", plants.texts),), "tokenizer": folder / "clean"}
        dirty = prepare(PrepareConfig(out=folder / "dirty", **dirt), quiet)
        cleaned = prepare(recipe(out=folder / "cleaned", **dirt), quiet)
        found, of_quality = table(plants, cleaned), judged(seen, folder / "clean", folder)
        print("\n".join([*found, "", *of_quality]), flush=True)
        if options.into:
            put(options.into, "quality table", of_quality)
        if not options.steps:
            return
        curves = {}
        for what, summary in (("as it is", dirty), ("cleaned", cleaned)):
            data = Path(summary.dataset.folder)
            curves[what] = curve(data, folder / "clean", folder / f"run of {what}", options.steps)
            n_tokens = summary.dataset.splits["train"].n_tokens
            print(f"{what}: {n_tokens:,} tokens, {curves[what]}", flush=True)
    steps = list(curves["cleaned"])
    rows = [f"| {step} | {curves['as it is'][step]:.3f} | {curves['cleaned'][step]:.3f} |" for step in steps]
    found += ["", "| step | as it is | cleaned |", "|---|---|---|", *rows]
    gap = statistics.mean(curves["as it is"][step] - curves["cleaned"][step] for step in steps[-2:])
    print("\n".join([*found, "", f"cleaned is {gap:.3f} lower at the end"]))
    if options.into:
        put(options.into, "cleaning table", found)
    if options.picture:
        picture(curves, options.picture)


if __name__ == "__main__":
    main()
