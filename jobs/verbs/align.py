"""`moray align`."""

from moray.jobs.verbs.train import train


def align(arguments: list[str]) -> int:
    """Align a model: `--method METHOD --model.from DIR --data.path DATA --run.dir RUN [--setting …]`.

    METHOD is dpo, ipo, reward, distill, grpo or ppo, `--model.from` the tuned run or Hugging Face folder that it
    starts with. dpo and ipo learn what people prefer, over a reference: that model, or `--align.reference`; reward
    makes a model with a scalar head that scores answers. `moray prepare --kind preference` makes their data, of which a
    lane of the global batch holds as many pairs as fit; nothing balances a model's experts meanwhile. distill learns
    the probabilities of `--align.teacher`, on text or dialogues. grpo learns from answers that the model writes itself
    to prompts (`--kind prompts`), by what `--rl.rewards` say of them; so does ppo, beside a critic that learns to
    foresee it (`--rl.critic`).

    All settings are those of `moray pretrain`, but that these hold where nothing else is said: train.epochs 1 (or give
    train.steps), optimizer.weight_decay 0, optimizer.lr 1e-6 (reward 1e-5, distill 2e-5).
    """
    return train(align, arguments)
