"""`moray finetune`."""

from inspect import cleandoc

from rich.console import Console

from moray import UserError


def finetune(arguments: list[str]) -> int:
    """Tune a model on dialogues: `--model.from DIR --data.path DATA --run.dir RUN [--setting value …]`.

    `--model.from` is the run or Hugging Face folder whose weights it starts with; `moray prepare --kind chat` makes the
    data. All settings are those of `moray pretrain`, but that these hold where nothing else is said:
    train.epochs 3 (or give train.steps), optimizer.lr 2e-5, optimizer.weight_decay 0. The loss is the mean over the
    tokens of answers, and of the ends of their turns, in the global batch.
    """
    from moray.jobs.config.run import RunConfig
    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.config.starting import config_of

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(finetune.__doc__ or ""), Console())
        return 0
    config = config_of("finetune", arguments)
    if not config.weights_from:
        raise UserError("model.from is missing: the run or Hugging Face folder that shall be tuned")
    from moray.jobs.training.drive import drive

    return drive(config)
