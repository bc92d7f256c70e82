"""Expert parallelism beside sharding alone, at equal work: step time, what is waited for, and what travels.

    python benchmarks/dispatch.py [--workers 2] [--rounds 3] [--steps 6] [--preset demo-moe] [--traffic]

Routers' choices are drawn: evenly, or with the first rank's experts three times as often as the others, and then again
with experts placed by that (layout.placement). All cases take turns, each time in processes of their own; a step is
that of `workers.py`, stage 1, one thread a worker, and takes as long as its slowest rank's; ratios to sharding are
medians over the rounds. `waited` is the share of a step in which a
rank does nothing but wait for tokens to arrive or to come home: for the wire, and for ranks with more to do.

--traffic: rows that travel to other ranks, a token and layer, forward, and bytes, both ways and passes: measured;
counted by hand from the choices (a token once to each other rank that has an expert of it, or with two levels to each
other node); and once for each expert, as it was.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from workers import moray_step, on_ranks, parser_of

from moray.cluster.host_memory import keep_freed_memory
from moray.model import ModelConfig
from moray.model.decoder import Decoder
from moray.model.moe.router import Router, Routing
from moray.parallel.dispatch.wire import Pending, Wire
from moray.parallel.gradients import ExpertLoad
from moray.parallel.layout import Layout
from moray.parallel.placement import adopt, moe_layers, planned

WARM = 2
ROUTERS = {"even": (1.0, False), "skewed": (3.0, False), "skewed, placed": (3.0, True)}
"""How often the first rank's experts are chosen, over the others; and whether experts are placed by that."""


def layouts(workers: int) -> dict[str, Layout]:
    found = {
        f"dp_shard={workers}": Layout(dp_shard=workers),
        f"ep={workers}": Layout(dp_shard=workers, ep=workers),
        f"ep={workers}, allgather": Layout(dp_shard=workers, ep=workers, dispatcher="allgather"),
    }
    if workers > 2:
        found[f"ep={workers}, as on 2 nodes"] = Layout(dp_shard=workers, ep=workers, ep_nodes=2)
    return found


class Drawn:
    """Routers whose choices are drawn, with these odds, from a generator that all layouts begin alike."""

    def __init__(self, odds_E: Tensor, decoder: Decoder) -> None:
        self.odds_E, self.generator = odds_E, torch.Generator().manual_seed(dist.get_rank())
        self.chosen: list[Tensor] = []
        for module in decoder.modules():
            if isinstance(module, Router):
                module.forward = partial(self._route, module.forward)  # type: ignore[method-assign]

    def _route(self, route: Callable[..., Routing], *inputs: Any) -> Routing:
        routing = route(*inputs)
        b, t, k = routing.chosen_BTK.shape
        drawn_NK = torch.multinomial(self.odds_E.expand(b * t, -1), k, generator=self.generator)
        chosen_BTK = drawn_NK.view(b, t, k)
        self.chosen.append(drawn_NK)
        return routing._replace(chosen_BTK=chosen_BTK, gates_BTK=routing.scores_BTE.gather(-1, chosen_BTK))


def place(decoder: Decoder, odds_E: Tensor, ranks: int) -> None:
    """As if experts had been moved: their weights are random anyway."""
    slots = planned(odds_E.tolist(), list(range(len(odds_E))), ranks, groups=1)
    adopt(decoder, dict.fromkeys(moe_layers(decoder), slots))


class Waits:
    """Seconds in which this rank has waited for what travels to experts and back."""

    def __init__(self) -> None:
        self.seconds = 0.0
        Wire.all_to_all = self._timed(Wire.all_to_all)  # type: ignore[method-assign]
        Wire.all_gather = self._timed(Wire.all_gather)  # type: ignore[method-assign]

    def _timed(self, exchange: Callable[..., Pending]) -> Callable[..., Pending]:
        def begin(*arguments: Any) -> Pending:
            land = exchange(*arguments)

            def timed() -> Tensor:
                began = time.perf_counter()
                found = land()
                self.seconds += time.perf_counter() - began
                return found

            return timed

        return begin


def by_hand(chosen: list[Tensor], held: int, layout: Layout) -> tuple[float, float, float]:
    """Of this rank's tokens: other ranks that have experts of one; how often it goes to another node, if there are two;
    its experts on other ranks. Means over all layers.
    """
    own, of_node = dist.get_rank(), max(layout.ep // 2, 1)
    tokens = [[expert // held for expert in experts] for chosen_NK in chosen for experts in chosen_NK.tolist()]
    ranks = sum(len(set(where) - {own}) for where in tokens)
    experts = sum(rank != own for where in tokens for rank in where)
    there = [[rank for rank in set(where) if rank // of_node != own // of_node] for where in tokens]
    between = sum(bool(others) if layout.ep_nodes > 1 else len(others) for others in there)
    return ranks / len(tokens), between / len(tokens), experts / len(tokens)


def work(
    rank: int, layout: Layout, router: str, options: argparse.Namespace, store: str, begin: Any, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    config = ModelConfig.preset(options.preset)
    assert config.moe
    dist.init_process_group("gloo", store=dist.FileStore(store, options.workers), rank=rank, world_size=options.workers)
    held, share = config.n_experts // options.workers, options.batch // options.workers
    odds_E = torch.ones(config.n_experts)
    odds_E[:held], is_placed = ROUTERS[router]
    drawn: list[Drawn] = []
    loads: list[ExpertLoad] = []

    def prepare(decoder: Decoder) -> None:
        drawn.append(Drawn(odds_E, decoder))
        if is_placed and layout.ep > 1:
            place(decoder, odds_E, options.workers)

    step = moray_step(
        config,
        layout,
        1,
        share,
        options.micro_batch,
        options.tokens,
        prepare=prepare,
        on_load=loads.append,
    )
    waits = Waits()
    for _ in range(WARM):
        step()
    begin.wait()
    if options.traffic:
        drawn[0].chosen.clear()
        step()
        load, tokens = loads[-1], options.workers * sum(len(chosen_NK) for chosen_NK in drawn[0].chosen)
        measured = load.rows_LP.sum().item() / tokens, load.bytes_LP.sum().item() / tokens
        pipe.send((*measured, *by_hand(drawn[0].chosen, held, layout)))
    else:
        waits.seconds, seconds = 0.0, []
        for _ in range(options.steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        pipe.send((statistics.median(seconds), waits.seconds / sum(seconds)))
    begin.wait()


def tell_traffic(options: argparse.Namespace) -> None:
    print(
        "| router | layout | rows a token | by hand: once a rank | between two nodes | once an expert | bytes a token |"
    )
    print("|---|---|---|---|---|---|---|")
    for router in ("even", "skewed"):
        for name, layout in layouts(options.workers).items():
            if layout.ep > 1:
                means = map(
                    statistics.mean, zip(*on_ranks(work, options.workers, layout, router, options), strict=True)
                )
                rows, sent, *counted = means
                by_hand = " | ".join(f"{count:.3f}" for count in counted)
                print(f"| {router} | {name} | {rows:.3f} | {by_hand} | {sent:,.0f} |", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--traffic", action="store_true")
    options = parser.parse_args()
    print(f"{options.workers} workers, torch {torch.__version__}")
    if options.traffic:
        tell_traffic(options)
        return
    cases = [(router, name) for router in ROUTERS for name in layouts(options.workers)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for router, name in cases:
            of_ranks = on_ranks(work, options.workers, layouts(options.workers)[name], router, options)
            seconds, waited = zip(*of_ranks, strict=True)
            found[router, name].append((max(seconds), statistics.mean(waited)))
    print("| router | layout | s a step | speed, of dp_shard | waited |\n|---|---|---|---|---|")
    for router, name in cases:
        ours, alone = found[router, name], found[router, next(iter(layouts(options.workers)))]
        ratio = statistics.median(theirs / own for (own, _), (theirs, _) in zip(ours, alone, strict=True))
        seconds, waited = (statistics.median(column) for column in zip(*ours, strict=True))
        print(f"| {router} | {name} | {seconds:.2f} | {ratio:.2f} | {waited:.0%} |")


if __name__ == "__main__":
    main()
