"""`moray pretrain`."""

from inspect import cleandoc

from rich.console import Console


def pretrain(arguments: list[str]) -> int:
    """Train or resume: `[--recipe NAME|FILE.toml] --data.path DIR --run.dir RUN [--section.key value …]`.

    `--model.preset` (`moray inspect NAME` shows one) is where the architecture's fields start from.
    `--model.from DIR` takes them, and the first weights, from a Hugging Face folder or another run instead.
    The command line wins over the recipe, the recipe over the preset. A recipe is TOML with the tables below;
    in brackets is what holds where none of them speaks.
    """
    from moray.jobs.config.arguments import parse_settings
    from moray.jobs.config.run import RunConfig, load_config
    from moray.jobs.config.settings_help import show_settings

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(pretrain.__doc__ or ""), Console())
        return 0
    recipe, overrides = parse_settings(arguments)
    config = load_config(recipe, overrides)
    from moray.jobs.training.pretrain import pretrain as run

    return run(config)
