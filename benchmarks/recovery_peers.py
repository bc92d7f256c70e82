"""What a killed worker costs elsewhere: torchrun --max-restarts and Ray Train, each with torch's own checkpoint.

    python benchmarks/recovery_peers.py --out DIR [--kills 5] [--peers torchrun ray-train]

The same model, layout and batch as benchmarks/recovery.py has, on 4 workers of this machine, saved by
torch.distributed.checkpoint every 4 steps. A rank is killed by SIGKILL, and what is measured is the time until all
ranks begin to compute again. Ray Train needs `pip install "ray[train]"`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from demo_model import WORKERS, DemoModel

SAVE_EVERY, STEPS_BETWEEN = 4, 6


def train(folder: Path) -> None:
    """What every rank runs: goes on from the newest save, and tells of each step in a file of its own."""
    rank, step = dist.get_rank(), 0
    model = DemoModel()
    newest = folder / "newest"
    if newest.exists():
        step = int(newest.read_text())
        dcp.load(model.state, checkpoint_id=folder / f"save-{step}")
    else:
        model.initialise()
    while True:
        tell(folder, rank, step, "computing")
        model.step(step)
        step += 1
        if step % SAVE_EVERY == 0:
            dcp.save(model.state, checkpoint_id=folder / f"save-{step}")
            if rank == 0:
                newest.with_suffix(".new").write_text(str(step))
                newest.with_suffix(".new").replace(newest)
        tell(folder, rank, step, "stepped")


def tell(folder: Path, rank: int, step: int, what: str) -> None:
    line = {"rank": rank, "pid": os.getpid(), "step": step, "what": what, "time": time.monotonic()}
    with open(folder / f"rank-{rank}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def told(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for path in folder.glob("rank-*.jsonl"):
        lines += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return lines


def join_torchrun() -> None:
    """As init_process_group("gloo") does, but with keys of its own a try.

    torchrun's store outlives a restart: as of torch 2.13 gloo then finds the addresses of the dead, and fails again.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    ours = dist.PrefixStore(f"try-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=ours, rank=rank, world_size=world_size)


def of_ray_train(settings: dict[str, Any]) -> None:
    train(Path(settings["folder"]))


def start_torchrun(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
    command += ["--max-restarts", "100", "--standalone", __file__, "--worker", str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def start_ray_train(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--ray-train", str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"})


def drive_ray_train(folder: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        of_ray_train,
        train_loop_config={"folder": str(folder)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=100)),
    ).fit()


def measure(folder: Path, kills: int) -> list[float]:
    """Seconds from each SIGKILL until all ranks, in new processes, compute again."""
    return [cost_of_a_kill(folder, victim % WORKERS) for victim in range(kills)]


def cost_of_a_kill(folder: Path, victim: int) -> float:
    began = time.monotonic()

    def steps() -> int:
        return sum(line["what"] == "stepped" and line["time"] > began for line in told(folder)) // WORKERS

    wait_for(lambda: steps() >= STEPS_BETWEEN)
    pids = {line["rank"]: line["pid"] for line in told(folder)}  # the last one of each
    killed = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)

    def first_of_the_new() -> dict[int, float]:
        new = [line for line in told(folder) if line["time"] > killed and line["pid"] not in pids.values()]
        return {line["rank"]: line["time"] for line in reversed(new)}

    wait_for(lambda: len(first_of_the_new()) == WORKERS)
    seconds = max(first_of_the_new().values()) - killed
    print(f"{seconds:.2f} s", file=sys.stderr)
    return seconds


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("nothing was told for five minutes")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=["torchrun", "ray-train"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ray-train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        join_torchrun()
        train(options.worker)
    elif options.ray_train:
        drive_ray_train(options.ray_train)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    print("| system | median s | least | most |\n|---|---|---|---|")
    for peer in options.peers:
        folder = options.out / f"{peer}-{int(time.time())}"
        folder.mkdir(parents=True)
        process = {"torchrun": start_torchrun, "ray-train": start_ray_train}[peer](folder)
        try:
            found = measure(folder, options.kills)
            print(f"| {peer} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |", flush=True)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
