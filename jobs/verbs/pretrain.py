"""`moray pretrain`."""

from inspect import cleandoc

from rich.console import Console


def pretrain(arguments: list[str]) -> int:
    """Train a model, or resume its run: `--data.path DIR --run.dir RUN [--setting value …]`.

    `--model.preset` (`moray inspect NAME` shows one) is where the architecture's fields start from.
    `--model.from DIR` takes them, and the first weights, from a Hugging Face folder or another run instead.
    `--recipe NAME|FILE.toml` takes settings from TOML with the tables below.

    The command line wins over the recipe, the recipe over the preset; in brackets is what holds where none speaks.
    """
    from moray.jobs.config.run import RunConfig
    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.config.starting import config_of

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(pretrain.__doc__ or ""), Console())
        return 0
    config = config_of("pretrain", arguments)
    from moray.jobs.training.drive import drive

    return drive(config)
