"""`moray pretrain`."""

from moray.jobs.verbs.train import train


def pretrain(arguments: list[str]) -> int:
    """Train a model, or resume its run: `--data.path DIR --run.dir RUN [--setting value …]`.

    `--model.preset` (`moray inspect NAME` shows one) is where the architecture's fields start from.
    `--model.from DIR` takes them, and the first weights, from a Hugging Face folder or another run instead.
    `--recipe NAME|FILE.toml` takes settings from TOML with the tables below.

    The command line wins over the recipe, the recipe over the preset; in brackets is what holds where none speaks.
    """
    return train(pretrain, arguments)
