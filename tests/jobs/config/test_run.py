"""Where a run's settings come from, what is said when they are wrong, and that they can be written down and read."""

from pathlib import Path

import pytest

from moray.jobs.config.arguments import parse_settings
from moray.jobs.config.load import check_name, flatten, load_config
from moray.jobs.config.recipe_file import to_toml
from moray.jobs.config.run import RunConfig
from moray.model import ModelConfig

NEEDED = {"data.path": "d", "run.dir": "r", "cluster.launcher": "local"}
# What the issue promises to those who build on it.
CONTRACT = {
    "model": ["preset"],
    "data": ["path"],
    "layout": ["dp_replicate", "dp_shard", "tp", "ep"],
    "train": ["steps", "global_batch", "micro_batch", "seq_len", "seed", "dtype", "eval_every"],
    "checkpoint": ["every", "keep"],
    "cluster": ["launcher", "workers", "max_restarts"],
    "run": ["dir"],
}


def load(recipe: str | Path | None = None, **settings: str) -> RunConfig:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(None if recipe is None else str(recipe), {**NEEDED, **named})


def refusal(**settings: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every caller looks at the message
        load(**settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_command_line_wins_over_the_recipe_over_the_preset_over_the_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\npreset = "minimind-3"\nn_layers = 3\n[model.ffn]\nwidth = 64\n[train]\nsteps = 50\nseq_len = 128\n'
    )
    config = load(recipe, model__ffn__width="96", train__steps="70")
    assert (config.model.ffn.width, config.train.steps) == (96, 70), "the command line"
    assert (config.model.n_layers, config.train.seq_len) == (3, 128), "the recipe"
    assert config.model.d_model == ModelConfig.preset("minimind-3").d_model, "the preset"
    assert config.train.global_batch == RunConfig.model_fields["train"].default.global_batch, "the default"
    other = load(recipe, model__preset="demo-dense")
    assert (other.model.d_model, other.model.n_layers) == (256, 3), "the preset can be changed on the command line"


def test_without_a_recipe_and_a_preset_it_is_demo_moe() -> None:
    assert load().model == ModelConfig.preset("demo-moe")


def test_a_named_recipe_comes_with_the_package() -> None:
    assert load("demo", cluster__launcher="ray").model.n_experts > 0


def test_every_setting_of_the_contract_is_known() -> None:
    for section, keys in CONTRACT.items():
        for key in keys:
            assert check_name(f"{section}.{key}") == f"{section}.{key}"


FIELDS = dict(flatten(ModelConfig.preset("demo-moe").model_dump()))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_model_is_a_setting(name: str) -> None:
    value = FIELDS[name]
    written = ",".join(value) if isinstance(value, tuple) else str(value)
    config = load(**{"model__preset": "demo-moe", f"model__{name.replace('.', '__')}": written})
    assert dict(flatten(config.model.model_dump()))[name] == value


def test_a_missing_part_of_the_model_is_made_by_its_settings() -> None:
    scaling = {"kind": "linear", "factor": "4"}
    config = load(model__preset="demo-dense", **{f"model__position__scaling__{name}": x for name, x in scaling.items()})
    assert (config.model.position.scaling.kind, config.model.position.scaling.factor) == ("linear", 4.0)
    assert load(model__preset="demo-moe", model__moe="none").model == ModelConfig.preset("demo-dense")
    assert "model.moe.expert_width" in refusal(model__preset="demo-dense", model__moe__n_experts="4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.step": "3"}, "train.step is not a setting; did you mean train.steps?"),
        ({"trian.steps": "3"}, "trian.steps is not a setting; did you mean train.steps?"),
        ({"model.moe.n_expert": "3"}, "model.moe.n_expert is not a setting; did you mean model.moe.n_experts?"),
        ({"steps": "3"}, "steps is not a setting; "),
        ({"model.preset": "demo-mo"}, "model.preset=demo-mo is not known; did you mean demo-moe?"),
        ({"data.path": ""}, "data.path is missing"),
        ({"run.dir": ""}, "run.dir is missing"),
        ({"train.steps": "many"}, "train.steps=many must be a whole number"),
        ({"train.steps": "0"}, "train.steps=0 must be at least 1"),
        ({"train.dtype": "fp8"}, "train.dtype=fp8 must be auto, bfloat16 or float32"),
        ({"train.dtype": "fp16"}, "train.dtype=fp16 is not offered: its gradients vanish below 6e-8"),
        ({"train.dtype": "float16"}, "train.dtype=float16 is not offered: its gradients vanish below 6e-8"),
        ({"optimizer.lr": "-1"}, "optimizer.lr=-1 must be more than 0"),
        ({"optimizer.lr": "nan"}, "optimizer.lr=nan must be finite"),
        ({"optimizer.lr": "inf"}, "optimizer.lr=inf must be finite"),
        ({"optimizer.eps": "inf"}, "optimizer.eps=inf must be finite"),
        ({"model.position.theta": "inf"}, "model.position.theta=inf must be finite"),
        ({"model.moe.expert_width": "20"}, "model.moe.expert_width=20 must be a multiple of 8"),
        ({"train.seed": str(2**63)}, "train.seed=9223372036854775808 must be less than 9223372036854775808"),
        ({"cluster.workers": "4"}, "cluster.workers=4 must be 1 with cluster.launcher=local; or choose ray"),
        ({"cluster.workers": "0"}, "cluster.workers=0 must be a number of at least 1, or MIN:MAX"),
        ({"cluster.workers": "2:"}, "cluster.workers=2: must be a number of at least 1, or MIN:MAX"),
        ({"cluster.workers": "8:2"}, "cluster.workers=8:2 must have its minimum first: 2:8"),
        (
            {"cluster.workers": "1:2", "cluster.launcher": "torchrun"},
            "cluster.workers=1:2 must be one number with cluster.launcher=torchrun, which starts them all at once",
        ),
        (
            {"cluster.workers": "3:8", "cluster.launcher": "ray", "train.global_batch": "8"},
            "cluster.workers=3:8: no layout of 3 workers suits the model and train.global_batch=8; these numbers do: "
            "[1, 2, 4, 8]",
        ),
        ({"cluster.startup_timeout_s": "0"}, "cluster.startup_timeout_s=0 must be more than 0"),
        ({"cluster.launcher": "pbs"}, "cluster.launcher=pbs must be ray, torchrun, slurm or local"),
        ({"model.tied_embeddings": "perhaps"}, "model.tied_embeddings=perhaps must be true or false"),
        ({"model.attention.n_heads": "3"}, "model.attention.n_kv_heads=2 must divide n_heads=3; try one of [1, 3]"),
        ({"train.seq_len": "4096"}, "train.seq_len=4096 must be at most model.max_seq_len=2048"),
        (
            {"model.moe.group_size": "4", "train.micro_batch": "6"},
            "model.moe.group_size=4 must divide train.micro_batch=6 and the 32 sequences of each data-parallel rank; "
            "try one of [1, 2]",
        ),
        (
            {"model.preset": "demo-dense", "model.moe.n_experts": "8", "model.moe.expert_width": "16"},
            "model.moe.top_k=1 with normalise_gates=true makes every gate 1, and no loss tells the router anything; "
            "set normalise_gates=false, a balance_loss, or a higher top_k",
        ),
        (
            {"train.steps": "5", "optimizer.warmup_steps": "20"},
            "optimizer.warmup_steps=20 must be at most train.steps=5",
        ),
        (
            {"optimizer.moments": "bfloat16", "optimizer.beta2": "0.999"},
            "optimizer.moments=bfloat16 needs optimizer.beta2=0.999 to be at most 0.99",
        ),
        ({"optimizer.kind": "sgd"}, "optimizer.kind=sgd must be adamw or muon"),
        ({"train.compile": "true", "train.exact": "true"}, "train.compile=true must be false with train.exact=true"),
        (
            {"train.compile": "true", "train.recompute": "selective"},
            "train.recompute=selective must be none or full with train.compile=true",
        ),
        ({"train.recompute": "some"}, "train.recompute=some must be none, selective or full"),
        (
            {"recovery.snapshot_every": "-1"},
            "recovery.snapshot_every=-1 must be auto, 0 for none, or a number of steps",
        ),
        ({"recovery.snapshot_every": "often"}, "recovery.snapshot_every=often must be auto, 0 for none, or a number"),
        ({"train.on_bad_step": "ignore"}, "train.on_bad_step=ignore must be stop, skip or rollback"),
        (
            {"train.on_bad_step": "skip"},
            "train.on_bad_step=skip needs a bound: train.max_skipped=0, the most batches in a row, must be at least 1",
        ),
        (
            {"train.on_bad_step": "rollback", "train.max_skipped": "100"},
            "train.max_skipped=100, the most batches in a row, must be at least 101, as it may go back over "
            "checkpoint.every=100 steps",
        ),
        (
            {"train.on_bad_step": "rollback", "train.max_skipped": "101", "checkpoint.keep": "1"},
            "checkpoint.keep=1 must be at least 2 with train.on_bad_step=rollback, which goes to an older commit",
        ),
        ({"train.spike_sigmas": "0"}, "train.spike_sigmas=0 must be more than 0"),
        ({"train.audit_every": "9"}, "train.audit_every=9 needs others who can compute the same"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_name_value_and_remedy(settings: dict[str, str], message: str) -> None:
    assert message in refusal(**{name.replace(".", "__"): value for name, value in settings.items()})


def test_a_default_never_contradicts_a_setting() -> None:
    short = load(train__steps="14", model__max_seq_len="64")
    assert (short.optimizer.warmup_steps, short.train.seq_len) == (2, 64)
    assert load(train__steps="1").optimizer.warmup_steps == 0
    usual = load(train__global_batch="8")
    assert (usual.optimizer.warmup_steps, usual.train.seq_len) == (20, 512)
    stated = load(train__steps="14", optimizer__warmup_steps="14", optimizer__lr="1e-4", train__seq_len="100")
    assert (stated.optimizer.warmup_steps, stated.train.seq_len) == (14, 100)


def test_what_the_router_learns_from_is_enough() -> None:
    switch = {"model__preset": "demo-dense", "model__moe__n_experts": "8", "model__moe__expert_width": "16"}
    for enough in ({"normalise_gates": "false"}, {"balance_loss": "0.01"}, {"top_k": "2"}, {"n_experts": "1"}):
        assert load(**switch | {f"model__moe__{name}": value for name, value in enough.items()}).model.moe


@pytest.mark.parametrize(
    ("slots", "found"),
    [
        (9, "dp_replicate=2 dp_shard=2 tp=2 ep=2"),
        (7, "dp_replicate=2 dp_shard=1 tp=2 ep=2"),  # three data-parallel ranks do not divide 8 sequences
        (3, "dp_replicate=1 dp_shard=1 tp=2 ep=2"),
        (1, "dp_replicate=1 dp_shard=1 tp=1 ep=1"),
    ],
)
def test_fewer_slots_keep_what_they_can_of_a_layout(slots: int, found: str) -> None:
    wish = {"layout__tp": "2", "layout__ep": "2", "layout__dp_replicate": "2", "cluster__launcher": "ray"}
    settings = load(**wish, cluster__workers="1:8", train__global_batch="8", train__seq_len="64")
    layout = settings.arrange(slots)
    assert layout is not None
    assert str(layout) == found
    assert settings.layout_on(layout.world_size) == layout


def test_exact_mode_takes_powers_of_two_and_the_degrees_that_were_asked_for() -> None:
    wish = {"train__exact": "true", "train__global_batch": "16", "train__micro_batch": "2", "layout__ep": "2"}
    settings = load(**wish, cluster__workers="2:12", cluster__launcher="ray")
    found = [settings.arrange(slots) for slots in range(1, 13)]
    assert [layout and (layout.dp, layout.ep) for layout in found] == [
        None,
        *[(2, 2)] * 2,
        *[(4, 2)] * 4,
        *[(8, 2)] * 5,
    ]
    assert "cluster.workers=1:8: no layout of 1 workers suits" in refusal(
        **wish, cluster__workers="1:8", cluster__launcher="ray"
    )


def test_a_routing_group_may_be_all_of_a_ranks_sequences() -> None:
    assert load(train__global_batch="6", train__micro_batch="8", model__moe__group_size="6").train.micro_batch == 8


ON_4 = {"cluster__launcher": "ray", "cluster__workers": "4"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout__tp": "3"}, "layout.dp_replicate=1 * tp=3 = 3 must divide the 4 workers; try degrees from [1, 2, 4]"),
        ({"layout__dp_shard": "2"}, "= 2 must equal the 4 workers; leave dp_shard out or ask for 2 workers"),
        ({"layout__ep": "3"}, "layout.ep=3 must divide n_experts=16 and dp_shard * tp = 4; try [1, 2, 4]"),
        ({"layout__ep": "8"}, "layout.ep=8 must divide n_experts=16 and dp_shard * tp = 4; try [1, 2, 4]"),
        ({"layout__ep": "2", "model__preset": "demo-dense"}, "layout.ep=2 needs experts, but model.moe is none"),
        (
            {"layout__ep": "4", "model__moe__n_experts": "24", "model__moe__n_groups": "6"},
            "layout.ep=4 must divide model.moe.n_groups=6 or be a multiple of it: a group of experts lies on whole "
            "ranks; try [1, 2]",
        ),
        ({"layout__ep": "4", "layout__ep_nodes": "3"}, "layout.ep_nodes=3 must divide layout.ep=4"),
        ({"layout__ep": "4", "layout__ep_nodes": "0"}, "layout.ep_nodes=0"),
        ({"layout__ep": "4", "layout__ep_nodes": "2", "layout__dispatcher": "deepep"}, "deepep finds nodes by itself"),
        ({"layout__ep": "4", "layout__wire": "float32", "layout__dispatcher": "deepep"}, "deepep's kernels take bf16"),
        ({"layout__dispatcher": "mpi"}, "layout.dispatcher=mpi"),
        ({"layout__placement": "balanced"}, "layout.placement=balanced places experts on the ranks that share them"),
        (
            {"layout__tp": "4", "model__attention__n_heads": "2"},
            "layout.tp=4 must divide attention.n_heads=2; try [1, 2]",
        ),
        ({"layout__tp": "0"}, "layout.tp=0 must be at least 1"),
        ({"train__global_batch": "30"}, "train.global_batch=30 must be a multiple of the 4 data-parallel ranks"),
        ({"train__global_batch": "30"}, "; try 32"),
        ({"train__global_batch": "1"}, "; try 4"),
        (
            {"train__exact": "true", "train__global_batch": "24"},
            "train.exact=true needs train.global_batch=24 to be train.micro_batch=8 times a power of two; try "
            "train.global_batch=32",
        ),
        (
            {"train__exact": "true", "train__global_batch": "16"},
            "train.exact=true needs a power of two of data-parallel ranks, with a micro-batch for each: layout "
            "dp_replicate=1 dp_shard=4 tp=1 ep=1 has 4; try one of [1, 2]",
        ),
        (
            {"train__audit_every": "9", "layout__ep": "4"},
            "who can compute the same: layout dp_replicate=1 dp_shard=4 tp=1 ep=4 has no "
            "second group of data-parallel ranks; take twice the workers, smaller degrees, or 0",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(settings: dict[str, str], message: str) -> None:
    assert message in refusal(**ON_4, **settings)


def test_several_mistakes_are_told_in_one_line() -> None:
    message = refusal(train__steps="many", optimizer__lr="0")
    assert "train.steps=many" in message
    assert "optimizer.lr=0" in message


def test_dp_shard_is_what_is_left_of_the_world() -> None:
    assert str(load(**ON_4, layout__tp="2").resolved_layout) == "dp_replicate=1 dp_shard=2 tp=2 ep=1"
    assert str(load(**ON_4, layout__dp_replicate="2").resolved_layout) == "dp_replicate=2 dp_shard=2 tp=1 ep=1"


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--recipe dem is not known; did you mean demo\?$"):
        load("dem")
    with pytest.raises(ValueError, match=r"nowhere\.toml does not exist"):
        load(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    for text, message in (
        ("[train]\nsteps = \n", r"broken\.toml is not TOML: .*line 2"),
        ("steps = 3\n", "steps is not a setting"),
        ("[train]\nstep = 3\n", r"train\.step is not a setting; did you mean train\.steps"),
        ("[train.steps]\nx = 3\n", r"train\.steps"),
    ):
        broken.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load(broken)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model__preset": "minimind-3-moe", "optimizer__lr": "3e-7", "optimizer__eps": "1e-12"},
        {"checkpoint__keep_every": "50", "layout__dp_shard": "1", "model__attention__qk_norm": "none"},
        {"run__dir": 'a "quoted" C:\\folder\twith é and 🐟\nlines'},
        {"model__moe": "none"},
    ],
    ids=["defaults", "small numbers", "optional ones", "a strange name", "dense"],
)
def test_a_config_written_as_toml_is_read_as_the_same(tmp_path: Path, settings: dict[str, str]) -> None:
    config = load(**settings)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(str(path), {}) == config


def test_none_unsets_what_a_recipe_sets(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[checkpoint]\nkeep_every = 10\n")
    assert load(recipe).checkpoint.keep_every == 10
    assert load(recipe, checkpoint__keep_every="none").checkpoint.keep_every is None


def test_arguments_with_dashes_and_equal_signs() -> None:
    arguments = ["--train.seq-len", "64", "--optimizer.lr=1e-3", "--recipe=r.toml", "--run.dir", "a=b"]
    expected = {"train.seq_len": "64", "optimizer.lr": "1e-3", "run.dir": "a=b"}
    assert parse_settings(arguments) == ("r.toml", expected)
    assert parse_settings([]) == (None, {})
    assert parse_settings(["--train.steps", "1", "--train.steps", "2"])[1] == {"train.steps": "2"}


def test_arguments_that_are_no_settings() -> None:
    with pytest.raises(ValueError, match=r"^DATA was not expected; settings are written --section\.key value$"):
        parse_settings(["--train.steps", "3", "DATA"])
    with pytest.raises(ValueError, match=r"^--train\.steps needs a value$"):
        parse_settings(["--train.steps"])


def test_a_forgotten_value_does_not_swallow_the_next_setting() -> None:
    with pytest.raises(ValueError, match=r"^--train\.steps needs a value$"):
        parse_settings(["--train.steps", "--run.dir", "r"])
    assert parse_settings(["--optimizer.lr", "-1"])[1] == {"optimizer.lr": "-1"}


def test_paths_are_those_of_the_folder_that_the_command_was_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on another node starts elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = load(data__path="some/../data", run__dir="~/run")
    assert (config.data.path, config.run.dir) == (f"{tmp_path}/data", "/home/me/run")
    assert load(data__path="s3://bucket/data", run__dir="/there").data.path == "s3://bucket/data"
    written = tmp_path / "config.toml"
    written.write_text(to_toml(config))
    monkeypatch.chdir("/")
    assert load_config(str(written), {}) == config


def test_only_a_dense_layer_asks_tensor_parallel_ranks_to_share_its_width() -> None:
    shared = {**ON_4, "layout__tp": "2", "model__ffn__width": "767"}
    assert "layout.tp=2 must divide ffn.width=767" in refusal(**shared, model__moe__n_dense_layers="1")
    assert load(**shared, model__moe__n_dense_layers="0").resolved_layout.tp == 2


def test_a_rank_of_torchrun_is_no_driver_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may name ray; each rank would take the run's folder for itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "by hand")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(cluster__launcher="ray").startswith("cluster.launcher=ray, but torchrun has started this process")
