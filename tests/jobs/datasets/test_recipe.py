"""Recipes and the settings that win over them: what is read of them, and what is refused before any work is done."""

import re
from pathlib import Path

import numpy as np
import pytest

from moray import UserError
from moray.data.curation.classifier import probability_of
from moray.data.preparation.selection import SCORES, Selection, by_pareto, cut_for
from moray.jobs.cli import dispatch
from moray.jobs.datasets.config import PrepareConfig, load_preparation
from moray.jobs.datasets.curation import selection_of
from moray.jobs.datasets.prepare import prepare
from moray.jobs.datasets.recipe import QualitySection


def test_every_named_recipe_is_one() -> None:
    web = load_preparation("web", {})
    assert web.clean.lines
    assert web.duplicates.bands == (14, 8), "FineWeb's"
    assert {rule.name.partition("_")[0] for rule in web.rules.rules} == {"gopher", "c4", "fineweb", "chinese"}
    assert load_preparation("books", {}).clean.characters
    assert load_preparation("none", {}) == load_preparation("chat", {}) == PrepareConfig()


def test_the_command_wins_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        '[clean]\nmask = ["email"]\n[duplicates]\nnear = 0.8\n[rules]\nsets = ["c4"]\nbounds = ["c4_n_sentences=3.."]\n'
    )
    own = load_preparation(str(tmp_path / "own.toml"), {"duplicates.near": "none", "clean.mask": "ip,card"})
    assert (own.duplicates.near, own.clean.mask) == (None, ("ip", "card"))
    assert {rule.name: (rule.low, rule.high) for rule in own.rules.rules}["c4_n_sentences"] == (3, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean.line": "true"}, r"clean\.line is not a setting of a preparation; did you mean clean\.lines\?"),
        ({"cleaning.lines": "true"}, r"did you mean clean\.lines\?"),
        ({"clean.mask": "mail"}, r"clean\.mask=mail must be email, ip or card"),
        ({"clean.lines": "perhaps"}, r"clean\.lines=perhaps must be true or false"),
        ({"rules.sets": "gofer-quality"}, r"rules\.sets=gofer-quality.* did you mean gopher-quality\?"),
        ({"rules.sets": "c4", "rules.bounds": "c4_n_sentences"}, r"must be NAME=LOW\.\.HIGH"),
        (
            {"rules.sets": "c4", "rules.bounds": "c4_n_sentences=9..3"},
            r"rules\.bounds: those of c4_n_sentences are '9\.\.3'",
        ),
        ({"rules.sets": "c4", "rules.bounds": "c4_sentences=3.."}, r"did you mean c4_n_sentences\?"),
        ({"duplicates.near": "0.07"}, r"duplicates\.near: threshold=0\.07 is not reached with 112 hashes"),
        ({"duplicates.near": "1.5"}, r"duplicates\.near=1\.5 must be less than 1"),
        ({"quality.keep": "0.5"}, r"quality\.keep needs quality\.classifier"),
        ({"quality.classifier": "c", "quality.keep": "0.5", "quality.cut": "0.5"}, r"keep and quality\.cut both say"),
        ({"quality.classifier": "c"}, r"nothing says what stays; add quality\.keep=0\.7"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_preparation("none", settings)


def test_recipes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--recipe wbe is not known; did you mean web\?"):
        load_preparation("wbe", {})
    (tmp_path / "bad.toml").write_text("[clean\n")
    with pytest.raises(UserError, match=r"bad\.toml is not TOML"):
        load_preparation(str(tmp_path / "bad.toml"), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality.classifier": "nowhere.safetensors", "quality.keep": "0.5"}, r"nowhere\.safetensors"),
        ({"benchmarks.tasks": "nowhere.jsonl"}, r"benchmarks\.tasks: .*nowhere\.jsonl cannot be read"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(load_preparation("none", {"out": tmp_path / "out", **settings}))
    assert not list(tmp_path.iterdir())


def test_what_is_for_text_is_not_done_to_dialogues(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clean\.characters is for text, and this is of kind chat"):
        prepare(load_preparation("web", {"out": tmp_path / "out", "kind": "chat"}))


def test_settings_are_words_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"Page {number} has a word\u200bjoiner and {'many words ' * number}.\n")
    words = ["prepare", *(str(path) for path in sorted(tmp_path.glob("*.txt"))), "--out", str(tmp_path / "out")]
    rule = ["--rules.sets=gopher_n_words", "--rules.bounds", "gopher_n_words=17..", "--clean.characters=true"]
    assert dispatch([*words, "--vocab-size", "300", *rule]) == 0
    told = capsys.readouterr().err
    assert re.search(r"rules: gopher_n_words +6 ", told)
    assert "cleaned: characters" in told


def test_selections() -> None:
    scores = np.zeros(SCORES, np.int64)
    scores[[10, 20, 30, 40]] = 1, 2, 3, 4
    for share, cut in ((0.1, 40), (0.4, 40), (0.41, 30), (0.7, 30), (0.71, 20), (1.0, 10)):
        assert cut_for(scores, share) == cut
        assert selection_of(QualitySection(classifier="c", keep=share), scores) == Selection(cut=cut)
    half = selection_of(QualitySection(classifier="c", cut=0.5), scores).cut
    assert probability_of(half - 1) < 0.5 <= probability_of(half)


def test_sampling_keeps_what_gpt_3_would() -> None:
    """P(Pareto(9) > 1 - p), measured with numpy's generator, which is the one that the paper names."""
    chances = by_pareto(np.array([0.0, 0.5, 0.9, 1.0]))
    drawn = np.random.default_rng(0).pareto(9, 200_000)
    for probability, chance in zip((0.0, 0.5, 0.9, 1.0), chances, strict=True):
        assert abs((drawn > 1 - probability).mean() - chance) < 4 * (chance * (1 - chance) / 200_000) ** 0.5 + 1e-9
    digests = np.random.default_rng(1).integers(0, 256, (40_000, 16), np.uint8).view("S16")[:, 0]
    table = (0.25, *(1.0 for _ in range(SCORES - 1)))
    kept = Selection(chances=table).keeps(np.repeat(np.array([0, 1], np.uint16), 20_000), digests)
    assert abs(kept[:20_000].mean() - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert kept[20_000:].all()
