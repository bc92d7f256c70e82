"""Law 1 for whole steps of reinforcement learning: prompts to updates on every layout are those of one process."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from architectures import EP, FSDP, MODELS, TP, TP_EP, TP_FSDP
from law1 import full
from pool import Pool
from torch import Tensor

from moray.data.prompts import Prompt, PromptBatch
from moray.jobs.alignment.answers import of_all_ranks
from moray.jobs.alignment.frozen import Frozen
from moray.jobs.alignment.judge import Judge
from moray.jobs.alignment.objectives import objective_of
from moray.jobs.alignment.reinforcement import Reinforcement
from moray.jobs.alignment.rl_step import learn_from
from moray.jobs.config.run import RunConfig
from moray.jobs.training.optimizer import build_optimizer
from moray.model import Decoder, initialise
from moray.model.accounting.work import Work
from moray.parallel.control_plane import ControlPlane
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.rollout import Answer, Sampling, rollout
from moray.parallel.shard import build_decoder, load_shards

VOCABULARY, PROMPTS, GROUP, NEW, SEQ_LEN, STEPS = 24, 8, 4, 9, 32, 2
STOPS = (2, 3, 4)
"""Several, so that answers are of 1 to 9 tokens."""
REWARD = """
def first(sample):
    return float(sample.tokens[0] % 2)  # alike in some groups, which teach nothing
def length(sample):
    return len(sample.tokens) / 10
def early(sample):
    return sum(sample.tokens) * (int(sample.key.split()[1]) < 4) / 100
"""


class Numbers:
    """A tokenizer whose texts are its ids."""

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def config_of(name: str, folder: Path, **changes: Any) -> RunConfig:
    rl = {
        "rewards": "mine:first=1,mine:length=0.02",
        "folder": str(folder),
        "group_size": GROUP,
        "groups_per_batch": 2,
        "max_new_tokens": NEW,
        "temperature": 0.8,
        "kl_coefficient": 0.1,
        "epochs": 2,
        "minibatches": 2,
        "clip_high": 0.3,
        **changes,
    }
    train = {"objective": "grpo", "global_batch": PROMPTS, "micro_batch": 1, "seq_len": SEQ_LEN, "steps": 10}
    return RunConfig.model_validate(
        {
            "model": MODELS[name].but(vocab_size=VOCABULARY, init={"std": 0.4}).model_dump(),
            "weights_from": str(folder),
            "data": {"path": str(folder)},
            "run": {"dir": str(folder)},
            "train": train,
            "rl": rl,
            "optimizer": {"lr": 1e-2, "warmup_steps": 0, "min_lr_ratio": 1, "weight_decay": 0},
        }
    )


def prompts_of(step: int, lanes: range | list[int]) -> list[Prompt]:
    draw = np.random.default_rng(step)
    every = [draw.integers(5, VOCABULARY, int(draw.integers(1, 20))) for _ in range(PROMPTS)]
    return [Prompt(step * PROMPTS + lane, f"prompt {lane}", every[lane], None) for lane in lanes]


def steps(name: str, layout: Layout, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of a run, by what the trainer gives them; in fp64, which it does not."""
    config, is_spread = config_of(name, folder, **changes), dist.is_initialized()
    meshes = layout.meshes("cpu") if is_spread else None
    decoders = []
    for seed in (3, 4):
        whole = Decoder(config.learnt).double()
        initialise(whole, seed)
        if meshes:
            weights, fp64 = whole.state_dict(), {"dtype": torch.float64, "compute_dtype": torch.float64}
            whole = build_decoder(config.learnt, meshes, **fp64, frozen=seed == 4)
            load_shards(whole, lambda tensor, box, weights=weights: weights[tensor][box])
        decoders.append(whole.requires_grad_(seed == 3))
    frozen = {"reference": Frozen("align.reference", folder, decoders[1].eval())}
    rank = dist.get_rank() if is_spread else 0
    sampling = Sampling(config.rl.temperature, NEW, STOPS, GROUP, config.rl.groups_per_batch)
    judge = Judge(config.rl.parsed, str(folder), 20.0)
    rl = Reinforcement(Numbers(), sampling, judge, ControlPlane())  # type: ignore[arg-type]
    training: Any = SimpleNamespace(
        config=config,
        decoder=decoders[0],
        optimizer=build_optimizer(decoders[0], config.optimizer, copy=meshes.copy if meshes else None),
        reduction=Reduction(decoders[0], meshes, 3) if meshes else None,
        objective=objective_of(config, frozen),
        frozen=frozen,
        critic=None,
        layout=layout,
        context=SimpleNamespace(rank=rank, device=torch.device("cpu"), generation=1),
        pulse=SimpleNamespace(again=lambda: None),
        work=Work.of(config.model, None),
        step=0,
        position=0,
    )

    def note_applied(loss: float, norm: float, position: int) -> None:
        training.step, training.position = training.step + 1, position

    training.note_applied = note_applied
    lanes = layout.lanes(layout.dp_rank(rank), PROMPTS, None)
    rows = []
    with judge:
        for step in range(STEPS):
            row = learn_from(training, rl, PromptBatch(prompts_of(step, lanes), step * PROMPTS, step))
            rows.append({name: value for name, value in row.items() if name in NUMBERS})
    return {"rows": rows, "weights": {name: full(weight.detach()) for name, weight in decoders[0].named_parameters()}}


NUMBERS = (
    *("loss", "reward", "reward/mine:first", "kl", "entropy", "ratio", "clipped_low", "clipped_high", "grad_norm"),
    *("dead_groups", "answer_tokens", "ended", "tokens", "updates"),
)
LAYOUTS = [
    ("dense", FSDP),
    ("dense", Layout(dp_shard=4)),
    ("dense", Layout(dp_replicate=2, dp_shard=2)),
    ("dense", TP),
    ("moe-deepseek", EP),
    ("moe-deepseek", TP_EP),
    ("moe-deepseek", TP_FSDP),
    ("moe-deepseek", Layout(dp_shard=4, ep=2)),
]
TRUTHS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_two_steps_on_a_layout_are_those_of_one_process(pool: Pool, name: str, layout: Layout, tmp_path: Path) -> None:
    """R1-V 67, TRL 5030 (groups across ranks), MiniMind 853, prime-rl 1957, verl 3994: four updates a step, of two
    minibatches; every answer, advantage and gradient is the same.
    """
    (tmp_path / "mine.py").write_text(REWARD)
    if name not in TRUTHS:
        TRUTHS[name] = steps(name, Layout(dp_shard=1), tmp_path)
    truth = TRUTHS[name]
    assert any(row["dead_groups"] for row in truth["rows"])
    assert truth["rows"][0]["updates"] == 4
    assert 0 < truth["rows"][-1]["ended"] < 1
    for found in pool.run(steps, layout.world_size, name, layout, tmp_path):
        for row, expected in zip(found["rows"], truth["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-10, abs=1e-12)
        for tensor, value in truth["weights"].items():
            torch.testing.assert_close(found["weights"][tensor], value, rtol=1e-10, atol=1e-10, msg=tensor)


def rewarded(answer: Answer) -> float:
    return float(answer.tokens[0] % 2) + 0.02 * len(answer.tokens) / 10


def logp_of(decoder: Decoder, prompt: Prompt, answer: Answer) -> Tensor:
    """Of each token of an answer, alone in a row without padding."""
    tokens = torch.from_numpy(np.concatenate((prompt.tokens, answer.tokens)))
    logp = (decoder(tokens[None])[0, :-1] / 0.8).log_softmax(-1)
    return logp.gather(1, tokens[1:, None])[len(prompt.tokens) - 1 :, 0]


@pytest.mark.parametrize("name", ["dense", "moe-deepseek"])
def test_two_steps_are_those_of_the_equations_written_out(name: str, tmp_path: Path) -> None:
    """A sample at a time, with torch's AdamW: nothing of packing, lessons, objective or accumulation. What is drawn has
    its own truth in test_rollout.py.
    """
    (tmp_path / "mine.py").write_text(REWARD)
    config, decoders = config_of(name, tmp_path), []
    for seed in (3, 4):
        decoders.append(Decoder(config.learnt).double())
        initialise(decoders[-1], seed)
    policy, reference = decoders
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    sampling, expected = Sampling(0.8, NEW, STOPS, GROUP, 2), []
    for step in range(STEPS):
        asked, samples, n_dead = prompts_of(step, range(PROMPTS)), [], 0
        ids = [prompt.position for prompt in asked]
        groups = rollout(policy, [prompt.tokens for prompt in asked], ids, sampling, seed=0, step=step)
        for prompt, group in zip(asked, groups, strict=True):
            rewards = np.array([rewarded(answer) for answer in group])
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            n_dead += int(np.ptp(rewards) == 0)
            for answer, advantage in zip(group, advantages * (np.ptp(rewards) > 0), strict=True):
                with torch.no_grad():
                    old, fixed = logp_of(policy, prompt, answer), logp_of(reference, prompt, answer)
                samples.append((prompt, answer, advantage, old, fixed))
        half, losses, kls, norms = len(samples) // 2, [], [], []
        for part in [samples[:half], samples[half:]] * 2:
            n_tokens, loss, kl = sum(len(answer.tokens) for _, answer, *_ in part), 0.0, 0.0
            for prompt, answer, advantage, old, fixed in part:
                logp = logp_of(policy, prompt, answer)
                ratio = (logp - old).exp()
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                term = ratio * ((fixed - logp).exp() - 1 - (fixed - logp))
                loss, kl = loss + (0.1 * term - surrogate).sum() / n_tokens, kl + term.sum().item() / n_tokens
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
            optimizer.step()
            losses.append(loss.item())
            kls.append(kl)
        means = {"loss": np.mean(losses), "kl": np.mean(kls), "grad_norm": np.mean(norms), "dead_groups": n_dead}
        expected.append(means | {"reward": np.mean([rewarded(answer) for _, answer, *_ in samples])})
    found = steps(name, Layout(dp_shard=1), tmp_path)
    for row, truth in zip(found["rows"], expected, strict=True):
        assert {key: row[key] for key in truth} == pytest.approx(truth, rel=1e-10)
    for tensor, weight in policy.named_parameters():
        torch.testing.assert_close(found["weights"][tensor], weight.detach(), rtol=1e-10, atol=1e-10, msg=tensor)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_minibatch_that_teaches_nothing_is_no_update(tmp_path: Path, epochs: int) -> None:
    """Momentum would go on moving the weights, as it does not behind a whole step of dead groups."""
    (tmp_path / "mine.py").write_text(REWARD)
    changes = {"rewards": "mine:early=1", "kl_coefficient": 0, "epochs": epochs}
    for row in steps("dense", Layout(dp_shard=1), tmp_path, **changes)["rows"]:
        assert row["updates"] == epochs
        assert row["dead_groups"] >= 4


def waited(seconds: float) -> tuple[list[Any], int]:
    """How often a rank told that it lives while it waited for the other one's answers."""
    told: list[int] = []

    def make() -> list[Any]:
        time.sleep(seconds * dist.get_rank())
        return []

    return of_all_ranks(ControlPlane(), make, lambda: told.append(1)), len(told)


def test_a_rank_that_waits_for_others_rewards_shows_that_it_lives(pool: Pool) -> None:
    (_, first), (_, second) = pool.run(waited, 2, 2.6)
    assert first >= 2
    assert second <= 1
