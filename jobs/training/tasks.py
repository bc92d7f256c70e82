"""Task files that a model is asked while it is trained: what `moray evaluate` says of it, among a step's numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moray import UserError
from moray.data.tokenizer import load_tokenizer
from moray.jobs.config.run import RunConfig
from moray.jobs.evaluation.evaluate import Asked, evaluate_tasks, read_tasks, template_of
from moray.jobs.evaluation.ranks import Ranks
from moray.jobs.evaluation.scoring import Model
from moray.jobs.training.begin import Training
from moray.parallel.gradients import forget_counts


def ask_tasks(training: Training) -> dict[str, float]:
    """`eval/FILE/METRIC` of each task file; nothing, and an event, where one cannot be asked. Collective."""
    config, layout = training.config, training.layout
    tokenizer = load_tokenizer(Path(config.run.dir) / "tokenizer")
    ranks = Ranks(layout.dp_rank(training.context.rank), layout.dp, layout.tp, training.pulse.again)
    model = Model(
        training.decoder.eval(),
        replace(tokenizer, prompt_start=tokenizer.document_start),  # as documents began
        config.train.micro_batch * config.train.seq_len,
        ranks,
        template_of(Path(config.run.dir) / "tokenizer"),
    )
    asked = asked_of(config)
    try:
        found = {
            f"eval/{name}/{metric}": value.value
            for name, metrics in zip(names_of(asked.tasks), evaluate_tasks(model, asked), strict=True)
            for metric, value in metrics.items()
        }
    except UserError as error:  # of the files: all ranks meet it, before a pass; hours of training are not to end by it
        training.note("tasks_failed", step=training.step, error=str(error))
        return {}
    finally:
        forget_counts(training.decoder)  # what travelled here is no step's
    return found


def check_tasks(config: RunConfig) -> None:
    """Raises UserError for task files that are none, before anything starts."""
    asked = asked_of(config)
    if asked.tasks:
        names_of(asked.tasks)
        list(read_tasks(asked))


def asked_of(config: RunConfig) -> Asked:
    return Asked(tuple(map(Path, config.eval.tasks)), limit=config.eval.limit)


def names_of(paths: Sequence[Path]) -> list[str]:
    """The files' names without what follows the first dot. Raises UserError where two are alike."""
    names = [path.name.partition(".")[0] for path in paths]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"eval.tasks has two files named {twice[0]}, whose numbers would be one curve; rename one")
    return names
