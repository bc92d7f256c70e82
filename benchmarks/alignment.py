"""What alignment is worth: small models that are tuned to add, before and after `moray align`, on sums they never saw.

    python benchmarks/alignment.py FOLDER [--only dense moe dpo] [--seeds 0 1 2] [--method grpo] [--pairs FILE …]
        [--into docs/alignment.md --picture docs/alignment.png]

Prompts are sums of two numbers of two digits, written as dialogues; one of eight is held out. A model is tuned on
the others until six of ten are right, and then learns by rewards (exact=1) from answers of its own to the same ones.
The control is the same run with rewards shuffled among the answers to a prompt, so that they say nothing. dpo prefers
right sums to wrong ones. --pairs: real pairs, on whose chosen answers a model is tuned before it learns to prefer them.

FOLDER keeps runs and `results.json`: the same command goes on where it was stopped, and a part that is there is not
done again.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_table import replaced
from rich.console import Console

from moray.data.chat.jinja_template import CHAT_TEMPLATE
from moray.data.dataset import Dataset
from moray.data.prompts import evaluation_prompts
from moray.data.reading.account import Account
from moray.data.reading.documents import read_documents
from moray.data.reading.rules import Rules
from moray.data.tokenizer import MIN_VOCAB_SIZE
from moray.jobs.alignment import rl_step
from moray.jobs.alignment.scores import Scores
from moray.jobs.config.alignment import REINFORCEMENT
from moray.jobs.config.starting import config_of
from moray.jobs.datasets.config import PrepareConfig
from moray.jobs.datasets.prepare import prepare
from moray.jobs.evaluation.greedy import continue_greedily
from moray.jobs.evaluation.scoring import Model
from moray.jobs.generation.generate import load
from moray.jobs.models.weights import open_whole
from moray.jobs.training.drive import drive
from moray.jobs.training.metrics import read_metrics
from moray.parallel.checkpoint.commits import list_commits

QUIET = Console(quiet=True)
N_HELD_OUT = 1000
GOOD_ENOUGH = 0.6
LONGEST = 5  # tokens of an answer
# A sum and its answer are 9 or 10 tokens in it, where ChatML would put as many around them.
TEMPLATE = (
    "{% for each in messages %}{% if each.role == 'user' %}{{ each.content }}{% else %}"
    "{% generation %}{{ each.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
)
DENSE = {
    "model.preset": "demo-dense",
    "model.n_layers": 3,
    "model.d_model": 96,
    "model.max_seq_len": 64,
    "model.attention.head_dim": 24,
    "model.ffn.width": 224,
}
MOE = {
    "model.moe.n_experts": 8,
    "model.moe.top_k": 2,
    "model.moe.expert_width": 96,
    "model.moe.n_groups": 1,
    "model.moe.top_k_groups": 1,
}
PARTS = ("rollout", "reward", "update")
MODELS: dict[str, dict[str, Any]] = {"dense": DENSE, "moe": {**DENSE, "model.preset": "demo-moe", **MOE}}
EVERY = {
    "train.dtype": "float32",
    "train.seq_len": 12,
    "train.micro_batch": 256,
    "train.eval_every": 0,
    "optimizer.warmup_steps": 10,
    "checkpoint.every": 10_000,
    "checkpoint.keep": 100,
    "cluster.launcher": "local",
    "run.trackers": "none",
}
ONE_STEP = {"train.steps": 1, "train.global_batch": 1, "optimizer.warmup_steps": 0}
TUNED = {"train.steps": 600, "train.global_batch": 128, "optimizer.lr": 3e-3, "checkpoint.every": 50}
REINFORCED = {
    "train.steps": 150,
    "train.global_batch": 32,
    "optimizer.lr": 1.5e-4,
    "rl.rewards": "exact=1",
    "rl.group_size": 8,
    "rl.groups_per_batch": 32,
    "rl.max_new_tokens": LONGEST,
    "checkpoint.every": 25,
}
LONG = {
    "model.max_seq_len": 1024,
    "train.seq_len": 1024,
    "train.micro_batch": 2,
    "train.global_batch": 8,
    "optimizer.warmup_steps": 5,
}
PREFERRED = {"train.steps": 400, "train.global_batch": 64, "optimizer.lr": 5e-4, "train.eval_every": 50}


def run(verb: str, folder: Path, settings: dict[str, Any]) -> Path:
    """The run in the folder, done, or what is left of it."""
    words = [f"--{name}={value}" for name, value in ({**EVERY, "run.dir": folder} | settings).items()]
    assert drive(config_of(verb, words), QUIET) == 0
    return folder


def lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(source: Path, out: Path, **settings: Any) -> None:
    prepare(PrepareConfig(sources=(source,), out=out, overwrite=True, **settings), QUIET)


def sums(folder: Path) -> dict[str, Path]:
    """Datasets of each kind, of the same sums, of which the same ones are held out."""
    found = {kind: folder / kind for kind in ("text", "chat", "prompts", "preference")}
    if not all(path.exists() for path in found.values()):
        corpus = lines(folder / "text.jsonl", [{"text": f"{n}{n + 1}+={n}"} for n in range(200)])
        prepared(corpus, found["text"], vocab_size=MIN_VOCAB_SIZE, validation=0.2)
        (found["text"] / CHAT_TEMPLATE).write_text(TEMPLATE)
        draw, chat, prompts, pairs = random.Random(0), [], [], []
        for asked, right in ((f"{a}+{b}=", a + b) for a in range(10, 100) for b in range(10, 100)):
            wrong = right + draw.choice((-10, -2, -1, 1, 2, 10))
            said = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(right)}]
            chat.append({"messages": said})
            prompts.append({"prompt": asked, "reference": str(right)})
            pairs.append({"prompt": asked, "chosen": str(right), "rejected": str(wrong)})
        for kind, records in (("chat", chat), ("prompts", prompts), ("preference", pairs)):
            source = lines(folder / f"{kind}.jsonl", records)
            prepared(source, found[kind], tokenizer=found["text"], validation=1 / 8, kind=kind)
    return found


def accuracy(weights: Path, prompts: Path) -> float:
    """The share of held-out sums that are right, greedily."""
    decoder, tokenizer = load(open_whole(weights, print))
    asked = evaluation_prompts(Dataset.open(prompts), EVERY["train.seq_len"], N_HELD_OUT)
    assert len(asked) == N_HELD_OUT
    answers = continue_greedily(Model(decoder, tokenizer, 16384), [each.tokens for each in asked], LONGEST)
    return sum(tokenizer.decode(a) == each.reference for a, each in zip(answers, asked, strict=True)) / N_HELD_OUT


def tuned(model: str, seed: int, data: dict[str, Path], folder: Path) -> Path:
    """The first commit of a tuning that adds, more often than not: seeds take longer or shorter to find out how."""
    settings = MODELS[model] | {"data.path": data["text"], "train.seed": seed}
    first = run("pretrain", folder / f"{model}-{seed}-first", settings | ONE_STEP)
    begin = {"model.from": first, "data.path": data["chat"], "train.seed": seed}
    done = run("finetune", folder / f"{model}-{seed}-tuned", TUNED | begin)
    commits = [commit.path for commit in list_commits(done / "checkpoints")]
    return next((path for path in commits if accuracy(path, data["prompts"]) >= GOOD_ENOUGH), commits[-1])


@contextmanager
def shuffled_rewards(seed: int) -> Iterator[None]:
    """What answers are worth is dealt out anew among those to the same prompt, by (seed, step)."""
    scored = rl_step._scored

    def shuffled(training: Any, *rest: Any) -> Scores:
        scores = scored(training, *rest)
        rewards_PG = scores.totals_S.reshape(-1, training.config.rl.group_size)
        draw = np.random.default_rng([seed, training.step])
        return replace(scores, totals_S=draw.permuted(rewards_PG, axis=1).reshape(-1))

    rl_step._scored = shuffled
    try:
        yield
    finally:
        rl_step._scored = scored


def reinforced(
    model: str, seed: int, method: str, shuffled: bool, data: dict[str, Path], folder: Path
) -> dict[str, Any]:
    """Accuracy by step, mean rewards, and where the time went."""
    base, name = tuned(model, seed, data, folder), f"{model}-{seed}-{method}{'-shuffled' * shuffled}"
    settings = REINFORCED | {"model.from": base, "data.path": data["prompts"], "train.seed": seed, "method": method}
    with shuffled_rewards(seed) if shuffled else nullcontext():
        done = run("align", folder / name, settings)
    curve = {commit.step: accuracy(commit.path, data["prompts"]) for commit in list_commits(done / "checkpoints")}
    rows = read_metrics(done)
    whole = math.fsum(row["seconds"] for row in rows)
    return {
        "accuracy": {0: accuracy(base, data["prompts"]), **curve},
        "reward": [row["reward"] for row in rows],
        "shares": {part: math.fsum(row[f"{part}_seconds"] for row in rows) / whole for part in PARTS},
        "seconds_a_step": whole / len(rows),
        "dlogp_max": max(row.get("rollout_dlogp_max", 0.0) for row in rows),
    }


def preferred(seed: int, data: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Accuracy on held-out pairs by step, and greedily on held-out sums, before and after."""
    base = tuned("dense", seed, data, folder)
    settings = PREFERRED | {"method": "dpo", "model.from": base, "data.path": data["preference"], "train.seed": seed}
    done = run("align", folder / f"dpo-{seed}", settings)
    return {**of_pairs(done), "greedy": [accuracy(path, data["prompts"]) for path in (base, done)]}


def preferred_for_real(file: Path, folder: Path) -> dict[str, Any]:
    """Of a model that learns the chosen answers, and then which of two it was."""
    folder.mkdir(exist_ok=True)
    read = read_documents([file], Account(Rules(kind="preference")))
    whole = [example["turns"] + example["chosen"] for example in (json.loads(each.text) for each in read)]
    texts = [{"text": "\n".join(text for _, text in turns)} for turns in whole]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in whole]
    text, chat, pairs = (folder / name for name in ("text", "chat", "pairs"))
    if not pairs.exists():
        prepared(lines(folder / "text.jsonl", texts), text, vocab_size=2048, validation=0.2)
        prepared(lines(folder / "chat.jsonl", chats), chat, tokenizer=text, validation=0.2, kind="chat")
        prepared(file, pairs, tokenizer=text, validation=0.2, kind="preference")
    first = run("pretrain", folder / "first", DENSE | LONG | ONE_STEP | {"data.path": text})
    begin = {"model.from": first, "data.path": chat, "train.epochs": 4, "optimizer.lr": 2e-3}
    base = run("finetune", folder / "tuned", LONG | begin)
    begin = {"method": "dpo", "model.from": base, "data.path": pairs, "train.epochs": 2, "optimizer.lr": 1e-4}
    return of_pairs(run("align", folder / "dpo", LONG | begin | {"train.eval_every": 10}))


def of_pairs(done: Path) -> dict[str, Any]:
    rows = read_metrics(done)
    held_out = {row["step"]: row["validation_accuracy"] for row in rows if "validation_accuracy" in row}
    last = [row for row in rows if "validation_margin" in row][-1]
    return {"first_loss": rows[0]["loss"], "accuracy": held_out, "margin": last["validation_margin"]}


class Results:
    """What parts have found, by their names, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, find: Callable[[], dict[str, Any]]) -> None:
        if name in self.found:
            return
        started = time.monotonic()
        # Steps are names in JSON: what was just found is read as what was there.
        self.found[name] = json.loads(json.dumps(find())) | {"seconds": time.monotonic() - started}
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self._path)
        print(told(name, self.found[name]), flush=True)


def ends(found: dict[str, Any]) -> tuple[float, float]:
    curve = list(found["accuracy"].values())
    return curve[0], curve[-1]


def told(name: str, found: dict[str, Any]) -> str:
    first, last = ends(found)
    if "shares" not in found:
        greedy = "{:.3f} | {:.3f}".format(*found["greedy"]) if "greedy" in found else "- | -"
        return f"| {name} | {found['first_loss']:.10f} | {last:.3f} | {found['margin']:.3f} | {greedy} |"
    shares = " | ".join(f"{found['shares'][part]:.0%}" for part in PARTS)
    return f"| {name} | {first:.3f} | {last:.3f} | {last - first:+.3f} | {found['seconds_a_step']:.2f} | {shares} |"


def table(found: dict[str, Any]) -> list[str]:
    parts = [[name for name in found if ("shares" in found[name]) == is_rl] for is_rl in (True, False)]
    rl, dpo = ([told(name, found[name]) for name in sorted(names)] for names in parts)
    return [
        "| model, seed, method | before | after | | seconds a step | rollouts | rewards | updates |",
        "|---|---|---|---|---|---|---|---|",
        *rl,
        "",
        "| pairs, seed | first loss | accuracy | margin | sums right before | after |",
        "|---|---|---|---|---|---|",
        *dpo,
    ]


def picture(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, model in zip(panels, MODELS, strict=True):
        labels = set()
        for name in (name for name in found if name.startswith(model)):
            label = name.split(maxsplit=2)[2]
            curve = found[name]["accuracy"]
            style = {"color": "tab:grey", "linestyle": "--"} if "shuffled" in label else {"color": "tab:blue"}
            axes.plot([*map(int, curve)], [*curve.values()], label=None if label in labels else label, **style)
            labels.add(label)
        axes.set_title(model)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if labels:
            axes.legend()
    panels[0].set_ylabel(f"share of {N_HELD_OUT:,} held-out sums that are right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=(*MODELS, "dpo", "none"), default=(*MODELS, "dpo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--method", choices=REINFORCEMENT, default="grpo")
    parser.add_argument("--pairs", type=Path, nargs="+", default=())
    parser.add_argument("--into", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    data, results = sums(folder), Results(folder / "results.json")
    for seed in options.seeds:
        for model in (model for model in MODELS if model in options.only):
            for how in ("", ", shuffled"):
                find = partial(reinforced, model, seed, options.method, bool(how), data, folder)
                results.add(f"{model} {seed} {options.method}{how}", find)
        if "dpo" in options.only:
            results.add(f"sums {seed}", partial(preferred, seed, data, folder))
    for file in options.pairs:
        results.add(file.name, partial(preferred_for_real, file.absolute(), folder / file.name.partition(".")[0]))
    found = table(results.found)
    print("\n".join(["", *found]))
    if options.into:
        options.into.write_text(replaced(options.into.read_text(), "alignment table", "\n".join(found)))
    if options.picture:
        picture(results.found, options.picture)


if __name__ == "__main__":
    main()
