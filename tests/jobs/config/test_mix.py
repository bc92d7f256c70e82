"""data.mix and data.phases in words, what of them is refused, and how a resume puts them together with a run's past."""

from fractions import Fraction
from pathlib import Path

import pytest

from moray.data.mixture import CYCLE, Phase
from moray.jobs.config.load import load_config
from moray.jobs.config.mix import Mix
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig

TWO = "web=0.6:/d/web,poems=0.4:/d/poems"


def load(**settings: str) -> RunConfig:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(None, {"run.dir": "r", "cluster.launcher": "local", "train.global_batch": "8", **named})


def test_a_mix_is_read_and_written_by_name_with_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(data__mix="web=0.60:some/../web,p-2=.4:s3://bucket/p", data__phases="5:web=1;7:web=1,p-2=3")
    assert config.data.mix == ("p-2=.4:s3://bucket/p", f"web=0.60:{tmp_path}/web")
    assert config.data.phases == ("5:web=1", "7:p-2=3,web=1")
    assert config.data.folders == {"p-2": "s3://bucket/p", "web": f"{tmp_path}/web"}
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    assert load_config(str(written), {}) == config


def test_positions_are_steps_times_the_global_batch_and_equal_weights_no_new_phase() -> None:
    mixed = load(data__mix=TWO, data__phases="10:poems=2,web=3;20:web=1;30:web=7").data.mixed
    assert mixed
    # Sources are in the order of their names: poems, web.
    assert mixed.phases_of(8) == (Phase(0, (1638, 2458)), Phase(160, (0, CYCLE)))


def test_one_path_has_no_mixture() -> None:
    config = load(data__path="/d/web")
    assert (config.mixture, config.data.folders) == (None, {"": "/d/web"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.mix": TWO, "data.path": "/d"}, "data.path=/d and data.mix=poems=0.4:/d/poems,web=0.6:/d/web are both"),
        ({"data.path": ""}, "data.path is missing: the folder that `moray prepare` made; or data.mix, several of them"),
        ({"data.mix": "/d/web,/d/poems"}, "data.mix=/d/web,/d/poems must be NAME=WEIGHT:FOLDER, as in web=0.6:data/w"),
        ({"data.mix": "web=0.6"}, "data.mix=web=0.6 must be NAME=WEIGHT:FOLDER"),
        ({"data.mix": "a/b=1:/d"}, "data.mix=a/b=1:/d must be NAME=WEIGHT:FOLDER"),
        ({"data.mix": "a=1:/d,a=2:/e"}, "data.mix=a=1:/d,a=2:/e has a twice; give each source a name of its own"),
        ({"data.mix": "a=1:/d,b=-2:/e"}, "data.mix=a=1:/d,b=-2:/e: b=-2 must not be negative"),
        ({"data.mix": "a=1:/d,b=nan:/e"}, "data.mix=a=1:/d,b=nan:/e: b=nan must be a weight, a number like 0.6"),
        ({"data.mix": "a=1:/d,b=:/e"}, "b=nothing must be a weight, a number like 0.6"),
        ({"data.mix": "a=1:/d,b=1e99:/e"}, "b=1e99 must be a weight, a number like 0.6"),
        ({"data.mix": "a=0:/d,b=0.0:/e"}, "the weights add up to 0; one of them at least must be more"),
        (
            {"data.mix": "a=1:/d,b=0.0002:/e"},
            "data.mix=a=1:/d,b=0.0002:/e: b=0.0002 is less than one of 4,096 sequences; beside the others it must "
            "be at least 0.000244201, or 0",  # 1 / 4095
        ),
        ({"data.path": "/d", "data.phases": "5:a=1"}, "data.phases=5:a=1 are of data.mix, which is missing"),
        ({"data.mix": TWO, "data.phases": "web=1"}, "data.phases=web=1 must be STEP:NAME=WEIGHT,…, as in 2000:web=0.2"),
        ({"data.mix": TWO, "data.phases": "-3:web=1"}, "data.phases=-3:web=1 must be STEP:NAME=WEIGHT,…"),
        ({"data.mix": TWO, "data.phases": "5:wbe=1"}, "5:wbe=1: wbe is no source of data.mix; did you mean web?"),
        ({"data.mix": TWO, "data.phases": "5:web=1,web=2"}, "data.phases=5:web=1,web=2 has web twice"),
        ({"data.mix": TWO, "data.phases": "5:web=0"}, "data.phases=5:web=0: the weights add up to 0"),
        ({"data.mix": TWO, "data.phases": "0:web=1"}, "data.phases=0:web=1 must begin after step 0"),
        ({"data.mix": TWO, "data.phases": "5:web=1;5:poems=1"}, "5:poems=1 must begin after the phase of step 5"),
        ({"data.mix": TWO, "train.epochs": "2"}, "train.epochs=2 is of one dataset, and each source of data.mix has"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at
        load(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_least_weight_that_is_named_will_do() -> None:
    mixed = load(data__mix="a=1:/d,b=0.000244201:/e").data.mixed
    assert mixed
    assert mixed.phases_of(8) == (Phase(0, (CYCLE - 1, 1)),)


def mix(*phases: str, names: str = "ab", first: str = "1") -> Mix:
    return Mix.of([f"{name}={first if name == 'a' else '1'}:/{name}" for name in names], phases)


@pytest.mark.parametrize(
    ("before", "asked", "batch", "then"),
    [
        # What was asked for is what is recorded, in the same words or in others.
        (mix("5:a=1"), mix("5:a=1"), 3, mix("5:a=1")),
        (mix("5:a=1"), mix("5:a=1"), 5, mix("5:a=1")),
        (mix("5:a=1"), mix("5:a=1"), 9, mix("5:a=1")),
        (mix(), Mix.of(["a=0.5:/a", "b=0.5:/b"], ()), 9, mix()),
        # Other weights are a phase from here on; asked for again, they are no change any more.
        (mix(), mix(first="3"), 9, mix("9:a=3,b=1")),
        (mix("9:a=3,b=1"), mix(first="3"), 9, mix("9:a=3,b=1")),
        (mix("9:a=3,b=1"), mix(first="3"), 20, mix("9:a=3,b=1")),
        # And once more others, one after another.
        (mix("9:a=3,b=1"), mix(), 20, mix("9:a=3,b=1", "20:a=1,b=1")),
        # What was to come is what is asked for now.
        (mix("5:a=1", "30:b=1"), mix("5:a=1", "40:b=1"), 20, mix("5:a=1", "40:b=1")),
        (mix("30:b=1"), mix(), 20, mix()),
        (mix(), mix("30:b=1", first="3"), 20, mix("20:a=3,b=1", "30:b=1")),
        # A past that was other is not made up.
        (mix(), mix("5:a=1"), 20, mix("20:a=1")),
        # An older commit than the one that recorded the change: as it was planned.
        (mix(), mix("9:a=3,b=1"), 4, mix("9:a=3,b=1")),
        # A source that comes later had nothing before.
        (mix(), mix(names="abc"), 9, Mix.of(["a=1:/a", "b=1:/b", "c=0:/c"], ["9:a=1,b=1,c=1"])),
    ],
)
def test_a_resume_goes_on_with_its_own_past(before: Mix, asked: Mix, batch: int, then: Mix) -> None:
    found = asked.going_on_from(before, batch)
    assert found.phases_of(1) == then.phases_of(1)
    assert Mix.of(*found.texts).phases_of(1) == then.phases_of(1), "what is recorded is that"
    assert found.going_on_from(found, batch).phases_of(1) == then.phases_of(1), "once decided, it stays"


def test_counts_are_exact_fractions() -> None:
    """0.1 and 0.2 are no binary fractions: 3 times 0.1 is 0.3 all the same."""
    mixed = Mix.of(["a=0.1:/a", "b=0.1:/b", "c=0.1:/c", "d=0.3:/d"], ())
    assert mixed.phases_of(1)[0].counts == (683, 683, 682, int(Fraction(CYCLE, 2)))
