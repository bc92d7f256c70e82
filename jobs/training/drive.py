"""A run from the driver's side: checks what can be wrong, then launches the workers and shows how they get on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from moray import UserError
from moray.cluster.events import read_events
from moray.cluster.exit_codes import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SUPERSEDED
from moray.cluster.group import Hooks
from moray.cluster.launch import launch
from moray.cluster.launchers import own_rank
from moray.cluster.worker import WorkerError
from moray.data.blocks import CACHE_BYTES
from moray.data.chat.jinja_template import CHAT_TEMPLATE
from moray.data.prompts import Prompts
from moray.data.rows import DialogueRows, rows_of
from moray.data.sources import Sources
from moray.data.tokenizer import same_vocabulary, tokenizer_in
from moray.jobs.alignment.critic import critic_model
from moray.jobs.alignment.judge import check_rewards
from moray.jobs.config.alignment import KINDS, VERB_OF
from moray.jobs.config.load import flatten
from moray.jobs.config.run import RunConfig
from moray.jobs.models.base import check_there
from moray.jobs.models.weights import config_of, tokenizer_of
from moray.jobs.runs.folder import claimed
from moray.jobs.runs.ledger import ledger_problems
from moray.jobs.runs.reporter import Reporter
from moray.jobs.runs.trackers import check_trackers
from moray.jobs.runs.tracking import tracked
from moray.jobs.runs.watcher import Listener, Watcher
from moray.jobs.training.begin import checkpoints_of
from moray.jobs.training.choices import as_recorded
from moray.jobs.training.tasks import check_tasks
from moray.jobs.training.trainer import train
from moray.model.config.moe import MoEConfig
from moray.parallel.checkpoint.generations import SupersededError, check_newest, take_generation

MOST_EPOCHS = 4
"""Of a source, beyond which a start warns. Source: "Scaling Data-Constrained Language Models", 2023, section 5."""


def drive(config: RunConfig, console: Console | None = None, listener: Listener | None = None) -> int:
    """Runs to the last step, or until asked to stop; returns the exit code.

    Raises UserError for a user's mistake, WorkerError of one line where the workers failed for good.
    """
    rank = own_rank(config.cluster.launcher)
    is_first = not rank
    console = console or Console(stderr=True, quiet=not is_first)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    config = as_recorded(config, checkpoints_of(config))
    sources = check(config, tell)
    if is_first:
        sources.verify()
    with claimed(config, sources, tell) if is_first else nullcontext(True) as has_steps:
        # The other ranks wait for this one, to find out the same.
        if not has_steps and rank is None:
            return EXIT_DONE
        for problem in ledger_problems(Path(config.run.dir)) if is_first else []:
            tell(f"run.dir={config.run.dir}: {problem}; this changes nothing in what the run computes")
        try:
            listener = listener or Listener()
            with Reporter(config, listener) if is_first else nullcontext(listener) as listener:
                code = _launch(config, console, listener, config.run.trackers if is_first else ())
        except SupersededError as error:
            tell(f"{error}; this one has written nothing since, and ends")
            return EXIT_SUPERSEDED
    if code == EXIT_INTERRUPTED:
        tell("stopped on request; what was done is committed, and the same command resumes")
    return code


def check(config: RunConfig, tell: Callable[[str], None]) -> Sources:
    """The data, and all that can be checked without workers and without the run's folder. Raises UserError."""
    sources = Sources.open(config.data.folders)
    check_kind(sources, config, tell)
    if config.adapters:
        check_there(Path(config.weights_from))
    models = {"model.from": config.weights_from} if config.weights_from else {}
    beside = [*config.frozen.values(), *([config.critic] if config.rl.critic and config.critic else [])]
    for setting, folder in {**models, **dict(beside)}.items():
        check_tokenizer(Path(folder), sources.first.folder, config.model.vocab_size, tell, setting)
    for setting, folder in beside:
        check_beside(config, Path(folder), setting)
    critic_model(config)
    sources.check_vocabulary(config.model.vocab_size)
    if config.is_reinforcement:
        check_rewards(config.rl.parsed, config.rl.folder)
    check_trackers(config.run.trackers)
    check_tasks(config)
    return sources


def check_kind(sources: Sources, config: RunConfig, tell: Callable[[str], None]) -> None:
    """Raises UserError where a run's objective has other data. Says how full rows of dialogues are, and how often each
    source of a mixture will have been seen.
    """
    dataset = sources.first
    wanted = KINDS[config.train.objective]
    if dataset.kind not in wanted:
        verb = VERB_OF.get(dataset.kind)
        which = f"`moray {verb}` learns from" if verb else "no verb learns from yet"
        raise UserError(
            f"{dataset.called}={dataset.folder} is of kind {dataset.kind}, which {which}; train.objective="
            f"{config.train.objective} wants kind {' or '.join(wanted)}"
        )
    for other in sources.datasets.values():
        if dataset.kind != "text" and other.file(CHAT_TEMPLATE) != dataset.file(CHAT_TEMPLATE):
            raise UserError(
                f"{dataset.called}={dataset.folder} and {other.called}={other.folder} write dialogues by different "
                "templates; prepare one of them with `--tokenizer` and the folder of the other"
            )
    sequences: dict[str, int] = {}
    for name, dataset in sources.datasets.items():
        for split in dataset.splits:
            if config.is_reinforcement:
                prompts = Prompts(dataset, split, config.most_prompt_tokens, CACHE_BYTES)
                n, left_out = int(prompts.counts.sum()), prompts.n_left_out
                tell(f"{name} {split}: {n:,} prompts; {left_out:,} left out, which leave no room for an answer".strip())
                sequences |= {name: n} if split == "train" else {}
                continue
            rows = rows_of(dataset, split, config.train.seq_len, CACHE_BYTES, config.data.long_dialogues)
            if isinstance(rows, DialogueRows):
                tell(f"{name} {split}: {rows.fill}".strip())
            if split == "train":
                sequences[name] = int(rows.counts.sum())
    if config.mixture:
        drawn = config.mixture.drawn(config.train.steps * config.train.global_batch)
        for line in epochs(sequences, drawn.tolist()):
            tell(line)
    if dataset.kind != "text" and config.learnt.moe and not config.adapters:  # which freeze routers
        tell(balance_kept(config.learnt.moe))


def epochs(sequences: Mapping[str, int], drawn: Sequence[int]) -> Iterator[str]:
    """What a run takes of each source: those it has, and those that are drawn from it in the end."""
    total = sum(drawn)
    for (name, has), taken in zip(sequences.items(), drawn, strict=True):
        yield f"{name} {taken / total:.1%}: {taken:,} sequences, {taken / has:.1f} epochs of {has:,}"
    for (name, has), taken in zip(sequences.items(), drawn, strict=True):
        if taken > MOST_EPOCHS * has:
            yield (
                f"warning: {name} is seen {taken / has:.1f} times; beyond about {MOST_EPOCHS} epochs, repeated data "
                "teach less and less (Muennighoff et al., 2023): give it less weight, or the run fewer steps"
            )


def balance_kept(moe: MoEConfig) -> str:
    """What of a router's balance goes on while a model is tuned."""
    balancing = (name for name in MoEConfig.model_fields if name.endswith(("_loss", "_update_rate")))
    names = [name for name in balancing if getattr(moe, name)]
    kept = ", ".join(f"model.moe.{name}={getattr(moe, name)}" for name in names)
    return f"routers are balanced as before: {kept}; 0 turns one off" if kept else "nothing balances the routers"


def check_beside(config: RunConfig, folder: Path, setting: str) -> None:
    """Raises UserError where a model beside the one that learns is not there, knows other tokens or shorter texts,
    cannot be spread in the same way, or has a head that makes no sense there: a critic may begin as either.
    """
    check_there(folder, setting)
    theirs, ours, seq_len = config_of(folder), config.model, config.train.seq_len
    scores = setting.startswith("rl.rewards")
    if scores != (theirs.head == "scalar") and setting != "rl.critic":
        needed = "a reward model, as `moray align --method reward` makes them" if scores else "a model of tokens"
        raise UserError(f"{setting}: {folder} has model.head={theirs.head}; it must be {needed}")
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(
            f"{setting}={folder} has a vocabulary of {theirs.vocab_size} tokens, but model.vocab_size="
            f"{ours.vocab_size}: both must give probabilities to the same tokens"
        )
    if theirs.max_seq_len < seq_len:
        raise UserError(f"{setting}={folder} has max_seq_len={theirs.max_seq_len}, less than train.seq_len={seq_len}")
    if not config.cluster.is_elastic:
        try:
            config.resolved_layout.validate_for(theirs, seq_len)
        except UserError as error:
            raise UserError(
                f"{setting}={folder} cannot be spread as the model that learns beside it: {error}"
            ) from None


def check_tokenizer(
    source: Path, data: str, vocab_size: int, tell: Callable[[str], None], setting: str = "model.from"
) -> None:
    """Raises UserError if the data's tokens mean others than those, below `vocab_size`, that the weights know.

    Says so where there is no tokenizer to tell. A source that is gone does not matter: the run has its own commits, or
    this is found out elsewhere.
    """
    tokenizer = tokenizer_of(source)
    if not source.exists():
        return
    if not (tokenizer / "tokenizer.json").is_file():
        tell(f"{source} has no tokenizer.json: nothing tells whether data.path has the tokens it was trained on")
        return
    with tokenizer_in(data) as folder:
        if not same_vocabulary(tokenizer, folder, vocab_size):
            raise UserError(
                f"data.path={data} has other tokens than {setting}={source} was trained on; "
                f"make the data with `moray prepare … --tokenizer {tokenizer}`"
            )


def _launch(config: RunConfig, console: Console, listener: Listener, trackers: Sequence[str]) -> int:
    events, generation = Path(config.run.dir) / "events.jsonl", None

    def take(previous: int | None) -> int:
        nonlocal generation
        at_least = 1 if previous else next_generation(events)
        generation = take_generation(checkpoints_of(config), previous, at_least)
        return generation

    settings = dict(flatten(config.model_dump()))
    with Watcher(config, console, listener) as watcher, tracked(Path(config.run.dir), trackers, settings):
        try:
            hooks = Hooks(watcher.on_event, watcher.on_status, take, partial(check_newest, checkpoints_of(config)))
            code = launch(train, config, config.cluster.launcher, config.group, hooks)
        except WorkerError as error:
            summary, _, trace = str(error).partition("\n")
            raise WorkerError(f"{summary}; the traceback is in {events}" if trace else summary) from error
    if code == EXIT_SUPERSEDED and generation is not None:
        check_newest(checkpoints_of(config), generation)  # says in words what rank 0 saw
    return code


def next_generation(events: Path) -> int:
    """One more than the highest in the log: a number names one attempt in the whole history of a run."""
    if not events.exists():
        return 1
    # What goes wrong before the first one has none.
    return 1 + max((event.get("generation") or 0 for event in read_events(events)), default=0)
