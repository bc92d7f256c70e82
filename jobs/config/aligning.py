"""What of a run's settings does not go together where it learns from preferences, teachers or answers of its own."""

from typing import TYPE_CHECKING

from moray import UserError
from moray.jobs.config.alignment import LEARNT_BY, RL_METHODS, RLSection
from moray.parallel.layout import Layout

if TYPE_CHECKING:
    from moray.jobs.config.run import RunConfig


def check_alignment(config: "RunConfig") -> None:
    """Raises UserError naming what does not go together: a policy must be the same function where it learns as where it
    is compared.
    """
    if (config.model.head == "scalar") != (config.train.objective == "reward"):
        raise UserError(
            f"model.head={config.model.head} with train.objective={config.train.objective}: a scalar head scores "
            "answers, which `moray align --method reward` teaches it; everything else needs a vocabulary's"
        )
    if not config.is_alignment:
        for name in ("align", "rl"):
            if getattr(config, name).model_dump(exclude_defaults=True):
                raise UserError(f"{name}.… settings are of `moray align`; train.objective={config.train.objective}")
        return
    for name, value in config.align.model_dump(exclude_defaults=True).items():
        if config.train.objective not in LEARNT_BY[name]:
            raise UserError(
                f"align.{name}={value} is of train.objective={' or '.join(LEARNT_BY[name])}, and means nothing "
                f"with {config.train.objective}; leave it out"
            )
    if not config.weights_from:
        raise UserError(
            f"model.from is missing: train.objective={config.train.objective} starts with a model that was trained"
        )
    if config.train.objective == "distill" and not config.align.teacher:
        raise UserError("align.teacher is missing: the model that train.objective=distill learns from")
    if config.eval.tasks and config.train.objective == "reward":
        raise UserError("eval.tasks are asked of models that predict tokens, and train.objective=reward makes none")
    if config.model.moe and config.train.objective != "distill":
        config.model.moe.check_same_function(
            f"with train.objective={config.train.objective} it must give an answer the same probability each time"
        )
    if config.is_reinforcement:
        _check_reinforcement(config)


def _check_reinforcement(config: "RunConfig") -> None:
    train, rl = config.train, config.rl
    if not rl.rewards:
        raise UserError("rl.rewards is missing: what judges the answers, as in rl.rewards=gsm8k=1")
    for method, names in RL_METHODS.items():
        for name in names if method != train.objective else ():
            value, default = getattr(rl, name), RLSection.model_fields[name].default
            if value != default:
                raise UserError(
                    f"rl.{name}={value} is of --method {method}, and says nothing to train.objective="
                    f"{train.objective}; leave it out"
                )
    if train.objective == "grpo" and rl.group_size < 2:
        raise UserError(f"rl.group_size={rl.group_size}: answers are compared with others; it must be at least 2")
    if rl.max_new_tokens >= train.seq_len:
        raise UserError(
            f"rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in train.seq_len={train.seq_len}"
        )
    if train.global_batch % rl.minibatches:
        raise UserError(
            f"rl.minibatches={rl.minibatches} must divide the train.global_batch={train.global_batch} prompts of a step"
        )
    if rl.kl_estimator == "k1" and not rl.kl_correction:
        raise UserError("rl.kl_estimator=k1 with rl.kl_correction=false has no gradient; take k2 or k3, or true")
    for name, needed in (("exact", False), ("audit_every", 0), ("on_bad_step", "stop"), ("spike_sigmas", None)):
        if (value := getattr(train, name)) != needed:
            raise UserError(
                f"train.{name}={value} must be {str(needed).lower()} with train.objective={train.objective}, whose "
                "steps are updates on rows that the model wrote itself"
            )


def check_rollouts(config: "RunConfig", layout: Layout) -> None:
    """Raises UserError where a layout would change the shape of the batches by which answers are written."""
    prompts, batch = config.train.global_batch // layout.dp, config.rl.groups_per_batch
    if prompts % batch:
        fits = [size for size in range(1, prompts + 1) if prompts % size == 0]
        raise UserError(
            f"rl.groups_per_batch={batch} must divide the {prompts} prompts of each data-parallel rank "
            f"(train.global_batch={config.train.global_batch}, layout {layout}); try one of {fits}"
        )
    if batch * config.rl.group_size % layout.tp:
        raise UserError(
            f"rl.groups_per_batch={batch} times rl.group_size={config.rl.group_size} must be a multiple of "
            f"layout.tp={layout.tp}: the answers are what tensor parallelism cuts, when each gets one token"
        )
