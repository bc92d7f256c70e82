"""`moray align`."""

from inspect import cleandoc

from rich.console import Console

from moray import UserError


def align(arguments: list[str]) -> int:
    """Align a model with preferences: `--method dpo --model.from DIR --data.path PAIRS --run.dir RUN [--setting …]`.

    `--method` is dpo or ipo. `--model.from` is the tuned run or Hugging Face folder that it starts with, and the
    reference where `--align.reference` names no other; `moray prepare --kind preference` makes the data, of which a
    lane of the global batch holds as many pairs as fit. All settings are those of `moray pretrain`, but that these hold
    where nothing else is said: train.epochs 1 (or give train.steps), optimizer.lr 1e-6, optimizer.weight_decay 0.
    Nothing balances the experts of a model meanwhile.
    """
    from moray.jobs.config.run import RunConfig
    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.config.starting import config_of

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(align.__doc__ or ""), Console())
        return 0
    config = config_of("align", arguments)
    if not config.weights_from:
        raise UserError("model.from is missing: the run or Hugging Face folder that shall be aligned")
    from moray.jobs.training.drive import drive

    return drive(config)
