"""`moray finetune`."""

from moray.jobs.verbs.train import train


def finetune(arguments: list[str]) -> int:
    """Tune a model on dialogues: `--model.from DIR --data.path DATA --run.dir RUN [--setting value …]`.

    `--model.from` is the run or Hugging Face folder whose weights it starts with; `moray prepare --kind chat` makes the
    data. All settings are those of `moray pretrain`, but that these hold where nothing else is said:
    train.epochs 3 (or give train.steps), optimizer.lr 2e-5, optimizer.weight_decay 0. The loss is the mean over the
    tokens of answers, and of the ends of their turns, in the global batch.
    """
    return train(finetune, arguments, "tuned")
