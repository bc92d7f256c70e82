"""Events of a run in words: a line for each that a person watching wants to know of."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]
SHOWN = 200
"""Characters of an answer, and of what was asked."""


def describe(kind: str, fields: Fields) -> str | None:
    """None: nobody watching wants to know."""
    words = _WORDS.get(kind)
    return words(fields) if callable(words) else words and words.format_map(defaultdict(lambda: "?", fields))


def _fault(of: Fields) -> str:
    if of.get("rank") is not None:
        return f"fault: rank {of['rank']} (pid {of['pid']}): {of['reason']}"
    return f"fault: node {of['node']}: {of['reason']}" if of.get("node") else f"fault: {of['reason']}"


def _answered(of: Fields) -> str:
    asked, answered = (" ".join(str(of.get(name, "?")).split()) for name in ("prompt", "written"))
    return f"step {of.get('step')}: {asked[-SHOWN:]} -> {answered[:SHOWN]}"


def _resize(of: Fields) -> str:
    old, new = of.get("workers", (None, None))
    return f"{old} -> {new} workers, as {of.get('why')}: {of.get('to')}"


def _skip(of: Fields) -> str:
    back = f"back to step {of.get('step')}, and " if of["kind"] == "rollback" else ""
    at, (first, end) = of.get("bad_step", of.get("step")), of.get("positions", (0, 0))
    return f"step {at}: {of.get('why')}; {back}positions {first} to {end} are skipped"


def _straggler(of: Fields) -> str:
    slow = [f"rank {one['rank']} on {one['node']} ({one['own_seconds']:.3g} s)" for one in of.get("ranks", [])]
    if not slow:
        return "no worker is slower than the others any more"
    others = f"{of.get('median_seconds', 0):.3g} s of their own a step"
    return f"slower than the others, who take {others} and then wait: {', '.join(slow)}"


def _short_of_memory(of: Fields) -> str:
    needed, least, parts = of.get("needed", 0), of.get("least", 0), of.get("parts", {})
    largest = max(parts, key=lambda name: parts[name], default="weights")
    has = f"{of.get('ranks')} of them have less, {least / 2**30:.1f} GiB" if of.get("ranks") else "they have less"
    return (
        f"a worker needs about {needed / 2**30:.1f} GiB, of which {largest} {parts.get(largest, 0) / 2**30:.1f}, but "
        f"{has}: try {_REMEDIES.get(largest, 'more workers')}"
    )


_REMEDIES = {
    "activations": "train.recompute=full or a smaller train.micro_batch",
    "gathered": "train.zero_stage=3 or a larger layout.tp",
    "head": "a larger layout.tp",
}


def _lora(of: Fields) -> str:
    learn, base, targets = of.get("learn", 0), of.get("of", 0), ", ".join(of.get("targets", []))
    line = f"LoRA: {learn:,} parameters learn ({targets}), beside {base:,} that are frozen"
    off = ", ".join(f"model.moe.{name}={value}" for name, value in of.get("off", {}).items())
    return f"{line}; routers are frozen, so what balances experts is off: {off}" if off else line


_NO_GPU = "the cluster has no GPU now: the workers take CPUs; cluster.device=cuda would wait for GPUs"
_WORDS: dict[str, str | Callable[[Fields], str | None]] = {
    "answered": _answered,
    "begin": "computing in {dtype}",
    "commit_failed": "{error}; the next commit tries again",
    "commit_given_up": "removed the commits of steps {steps}: another attempt's, not of this history",
    "commit_refused": lambda of: f"refused the damaged commit of step {of.get('step')}: {'; '.join(of['problems'])}",
    "device": lambda of: _NO_GPU if of.get("device") == "cpu" else None,
    "fault": _fault,
    "leaving": "node {node} is leaving the cluster",
    "placed": lambda of: (
        f"experts of {of.get('layers')} of {of.get('of')} layers moved: the busiest device had "
        f"{of.get('before', 0):.2f} times the mean load, and would have had {of.get('after', 0):.2f}"
    ),
    "no_snapshots": (
        "recovery.snapshot_every={every} has no effect: nothing outlives the workers of cluster.launcher={launcher}, "
        "which recovers from commits alone"
    ),
    "lora": _lora,
    "node_kept": "node {node} is suspect: {why}; no other has room for its workers, so it stays",
    "node_set_aside": "node {node} is set aside: {why}; others take its place",
    "recovered": lambda of: f"recovered: generation {of.get('generation')} at work after {of.get('seconds', 0):.1f} s",
    "resize": _resize,
    "resume": lambda of: (
        f"resumed from the {'snapshot' if of.get('source') == 'memory' else 'commit'} of step {of.get('step')}"
    ),
    "rollback": lambda of: _skip(of | {"kind": "rollback"}),
    "skip": lambda of: _skip(of | {"kind": "skip"}),
    "stop": "stopping: the workers finish their step and commit",
    "short_of_memory": _short_of_memory,
    "straggler": _straggler,
    "tasks_failed": "step {step}: eval.tasks cannot be asked: {error}; the run goes on without",
    "tracker_failed": "{tracker} failed: {error}; the run goes on without it, and the next start sends what it lacks",
    "unprotected": (
        "the Ray at {address} asks for no token: whoever reaches it can run code as you; start it with "
        "RAY_AUTH_MODE=token"
    ),
    "wait": lambda of: f"waiting for {of.get('workers')} more slots, {of.get('patience_s', 0):g} s at most",
}
