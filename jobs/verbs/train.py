"""What the verbs that train have in common: settings out of their words, or what these can be; then the run."""

from collections.abc import Callable
from inspect import cleandoc

from rich.console import Console

from moray import UserError


def train(verb: Callable[[list[str]], int], arguments: list[str], must: str = "") -> int:
    """The exit code of a run. must: what shall become of the model of `model.from`, of a verb that needs one.

    Raises UserError, of one line, for what is wrong with the settings.
    """
    from moray.jobs.config.run import RunConfig
    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.config.starting import config_of

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(verb.__doc__ or ""), Console())
        return 0
    config = config_of(verb.__name__, arguments)
    if must and not config.weights_from:
        raise UserError(f"model.from is missing: the run or Hugging Face folder that shall be {must}")
    from moray.jobs.training.drive import drive

    return drive(config)
