"""The arguments of a run of milliseconds a step that still has everything: experts, groups, a dense layer."""

from pathlib import Path

TINY: dict[str, object] = {
    "model.preset": "demo-moe",
    "model.vocab_size": 400,
    "model.n_layers": 2,
    "model.d_model": 32,
    "model.attention.n_heads": 4,
    "model.attention.n_kv_heads": 2,
    "model.attention.head_dim": 8,
    "model.ffn.width": 48,
    "model.moe.n_experts": 8,
    "model.moe.expert_width": 16,
    "model.moe.top_k": 2,
    "train.dtype": "float32",
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.seq_len": 64,
    "optimizer.warmup_steps": 2,
    "cluster.launcher": "local",
}


def tiny(data: Path, run: Path, **changes: object) -> list[str]:
    """The arguments of `moray pretrain`; `train__steps=3` sets train.steps and wins over what stands above."""
    return _words(TINY, data, run, changes)


def tiny_from(source: Path, data: Path, run: Path, **changes: object) -> list[str]:
    """The same for a run that starts from the weights in `source`, whose architecture it takes."""
    without_model = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    return _words({**without_model, "model.from": source}, data, run, changes)


def tiny_rl(source: Path, data: Path, run: Path, **changes: object) -> list[str]:
    """The arguments of `moray align` for a run that learns from answers of its own, of at most 8 tokens."""
    settings: dict[str, object] = {
        "rl__rewards": "exact=1",
        "rl__max_new_tokens": 8,
        "rl__group_size": 4,
        "rl__groups_per_batch": 2,
        "rl__validation_prompts": 16,
        "optimizer__lr": 0.003,
        "train__steps": 6,
        "train__eval_every": 0,
    }
    return ["align", *tiny_from(source, data, run, **(settings | changes))]


def _words(base: dict[str, object], data: Path, run: Path, changes: dict[str, object]) -> list[str]:
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    found = {**base, "data.path": data, "run.dir": run, **changed}
    return [word for name, value in found.items() for word in (f"--{name}", str(value))]
