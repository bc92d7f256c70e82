"""Layout: how many ranks share the work in which way, and the device meshes that follow from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.device_mesh import DeviceMesh

from moray import UserError
from moray.model import ModelConfig
from moray.parallel.dispatch.kinds import Kind


@dataclass(frozen=True)
class Meshes:
    """Views of the same ranks. dense: (dp_replicate, dp_shard, tp); sparse: (dp_replicate, efsdp, ep); flat:
    (dp_replicate, dp_shard_tp), None without tensor parallelism.

    hops: the groups that tokens travel through to their experts: all of `ep`, or between nodes and then within one.
    Experts live on the sparse mesh, weights that tensor parallelism does not split on the flat one, all others on the
    dense one. Tensor- and expert-parallel peers are neighbours in rank, so that they share a node.
    """

    dense: DeviceMesh
    sparse: DeviceMesh
    flat: DeviceMesh | None
    layout: "Layout"
    hops: tuple[dist.ProcessGroup, ...]

    @property
    def tp(self) -> DeviceMesh:
        return self.dense["tp"]

    @property
    def ep(self) -> DeviceMesh:
        return self.sparse["ep"]

    @property
    def copy(self) -> dist.ProcessGroup:
        """The ranks that together hold the model once."""
        return (self.flat["dp_shard_tp"] if self.flat else self.dense["dp_shard"]).get_group()


class Layout(BaseModel):
    """Degrees of parallelism; dp_replicate * dp_shard * tp is the world size, and ep splits dp_shard * tp."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dp_replicate: int = 1
    """Copies of the model (HSDP's outer degree)."""
    dp_shard: int | None = None
    """Ranks that share one copy's weights (FSDP); by default what the other degrees leave of the world size."""
    tp: int = 1
    """Ranks that share each matrix product and each sequence's tokens (tensor and sequence parallel)."""
    ep: int = 1
    """Ranks that share each MoE layer's experts, to which tokens travel."""
    ep_nodes: int = Field(1, ge=1)
    """Nodes over which these ranks are spread, as many on each: a token travels once to each node, and goes on from
    there. 1: straight to each rank."""
    dispatcher: Kind = "alltoall"
    """How tokens travel. alltoall: once to each rank that has experts of theirs. allgather: to all ranks, which wait
    for no sizes: for small groups. deepep: by DeepEP's kernels, on GPUs that have the package."""
    placement: Literal["fixed", "balanced"] = "fixed"
    """Which rank has which experts. fixed: runs of neighbours, or what the commit says that a run goes on from.
    balanced: planned anew from their loads every checkpoint.every steps, and moved where that evens out the ranks."""
    wire: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype in which sums over a rank's experts travel; they are formed in float32 either way. auto: bfloat16 on GPUs
    whose products are, else float32."""

    def resolve(self, world_size: int) -> Self:
        """With dp_shard filled in. Raises UserError when the degrees do not multiply to the world size."""
        for name in ("dp_replicate", "dp_shard", "tp", "ep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"layout.{name}={getattr(self, name)} must be at least 1")
        others = self.dp_replicate * self.tp
        if self.dp_shard is None and world_size % others:
            raise UserError(
                f"layout.dp_replicate={self.dp_replicate} * tp={self.tp} = {others} must divide "
                f"the {world_size} workers; try degrees from {_divisors(world_size)}"
            )
        dp_shard = self.dp_shard if self.dp_shard is not None else world_size // others
        if others * dp_shard != world_size:
            raise UserError(
                f"layout.dp_replicate={self.dp_replicate} * dp_shard={dp_shard} * tp={self.tp} = {others * dp_shard} "
                f"must equal the {world_size} workers; leave dp_shard out or ask for {others * dp_shard} workers"
            )
        return self.model_copy(update={"dp_shard": dp_shard})

    def fit(self, slots: int, suits: Callable[["Layout"], bool]) -> "Layout | None":
        """The best resolved layout on at most so many ranks that `suits`; None: there is none.

        This one's tp and ep are kept if they can be, else made smaller, tp last, for memory may need it; then the more
        ranks, the better. Copies become fewer where their number does not fit.
        """
        for tp, ep in sorted(((tp, ep) for tp in _divisors(self.tp) for ep in _divisors(self.ep)), reverse=True):
            nodes = math.gcd(self.ep_nodes, ep)
            for world_size in range(slots // tp * tp, 0, -tp):
                dp = world_size // tp
                copies = math.gcd(self.dp_replicate, dp)
                degrees = {"dp_replicate": copies, "dp_shard": dp // copies, "tp": tp, "ep": ep, "ep_nodes": nodes}
                placement = self.placement if ep > 1 else "fixed"
                layout = self.model_copy(update=degrees | {"placement": placement})
                if suits(layout):
                    return layout
        return None

    @property
    def shard(self) -> int:
        """dp_shard of a resolved layout."""
        if self.dp_shard is None:
            raise UserError("layout.dp_shard is not resolved yet: call resolve(world_size)")
        return self.dp_shard

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those that read different sequences."""
        return self.dp_replicate * self.shard

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @property
    def span(self) -> int:
        """Data-parallel ranks, neighbours, whose results depend on each other: they share experts."""
        return math.lcm(self.tp, self.ep) // self.tp

    def dp_rank(self, rank: int) -> int:
        return rank // self.tp

    def lanes(self, dp_rank: int, global_batch: int, run: int | None = None) -> list[int]:
        """The lanes of a global batch that a data-parallel rank computes: as many as any other does.

        A copy of the model has neighbouring ones, of which each of its ranks has a run of neighbours; where `run` says
        how long, they have runs of that many in turn.
        """
        copy, rank = divmod(dp_rank, self.shard)
        of_copy = global_batch // self.dp_replicate
        run = run or of_copy // self.shard
        starts = range(copy * of_copy + rank * run, (copy + 1) * of_copy, self.shard * run)
        return [lane for start in starts for lane in range(start, start + run)]

    def validate_for(self, model: ModelConfig, seq_len: int) -> None:
        """Raises UserError naming the degree to change when this (resolved) layout cannot run the model."""
        peers = self.shard * self.tp
        if self.ep > 1 and not model.n_experts:
            raise UserError(f"layout.ep={self.ep} needs experts, but model.moe is none; use ep=1")
        if model.n_experts and (model.n_experts % self.ep or peers % self.ep):
            fits = [d for d in _divisors(peers) if model.n_experts % d == 0]
            raise UserError(
                f"layout.ep={self.ep} must divide n_experts={model.n_experts} and dp_shard * tp = {peers}; try {fits}"
            )
        if model.moe and self.ep > 1 and model.moe.n_groups % self.ep and self.ep % model.moe.n_groups:
            raise UserError(
                f"layout.ep={self.ep} must divide model.moe.n_groups={model.moe.n_groups} or be a multiple of it: "
                f"a group of experts lies on whole ranks; try {_beside(model.moe.n_groups, peers, model.n_experts)}"
            )
        if self.placement == "balanced" and self.ep == 1:
            raise UserError(
                "layout.placement=balanced places experts on the ranks that share them, and with layout.ep=1 none do; "
                "use ep > 1, or placement=fixed"
            )
        if self.dispatcher == "deepep" and self.ep_nodes > 1:
            raise UserError(f"layout.ep_nodes={self.ep_nodes}: deepep finds nodes by itself; leave ep_nodes out")
        if self.dispatcher == "deepep" and self.wire == "float32":
            raise UserError("layout.wire=float32: deepep's kernels take bf16 alone; use wire=auto, or alltoall")
        if self.ep % self.ep_nodes:
            raise UserError(
                f"layout.ep_nodes={self.ep_nodes} must divide layout.ep={self.ep}: each node has as many of its ranks"
            )
        heads = model.attention
        split = {"attention.n_heads": heads.n_heads, "vocab_size": model.vocab_size}
        split["train.seq_len"] = seq_len
        if model.position.kind == "learned":
            split["max_seq_len"] = model.max_seq_len
        if model.n_moe_layers < model.n_layers:
            split["ffn.width"] = model.ffn.width
        if model.moe and model.moe.n_shared:
            split["moe.n_shared * expert_width"] = model.moe.n_shared * model.moe.expert_width
        for name, value in split.items():
            if value % self.tp:
                fits = [d for d in _divisors(self.world_size) if all(v % d == 0 for v in split.values())]
                raise UserError(f"layout.tp={self.tp} must divide {name}={value}; try {fits}")

    def wire_dtype(self, device_type: str, compute_dtype: torch.dtype) -> torch.dtype:
        """In which sums travel. Raises UserError where that would cost an fp32 model its digits."""
        if self.wire == "bfloat16" and compute_dtype != torch.bfloat16:
            raise UserError(
                f"layout.wire=bfloat16 would round what products in {str(compute_dtype)[6:]} have made; "
                "use train.dtype=bfloat16 with it, or layout.wire=float32"
            )
        is_bf16 = self.wire == "bfloat16" or (self.wire == "auto" and device_type == "cuda")
        return compute_dtype if is_bf16 else torch.promote_types(compute_dtype, torch.float32)

    def meshes(self, device_type: str) -> Meshes:
        """Collective: every rank of the world must call it."""
        if dist.get_world_size() != self.world_size:
            raise UserError(f"{self} needs {self.world_size} ranks; the process group has {dist.get_world_size()}")
        build = _MeshBuilder(device_type)
        dense = (self.dp_replicate, self.shard, self.tp)
        sparse = (self.dp_replicate, self.shard * self.tp // self.ep, self.ep)
        flat = (self.dp_replicate, self.shard * self.tp)
        return Meshes(
            build.mesh(dense, ("dp_replicate", "dp_shard", "tp")),
            build.mesh(sparse, ("dp_replicate", "efsdp", "ep")),
            build.mesh(flat, ("dp_replicate", "dp_shard_tp")) if self.tp > 1 else None,
            self,
            tuple(build.group(cuts) for cuts in hops(self.world_size, self.ep, self.ep_nodes)),
        )

    def __str__(self) -> str:
        degrees = f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp} ep={self.ep}"
        others = {name: getattr(self, name) for name in ("ep_nodes", "dispatcher", "placement", "wire")}
        chosen = [f" {name}={x}" for name, x in others.items() if x != type(self).model_fields[name].default]
        return degrees + "".join(chosen)


class _MeshBuilder:
    """Builds meshes over the world whose dimensions share a process group where they have the same ranks.

    Every group is a thread that wakes again and again, and on GPUs a communicator with buffers of its own.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type, self._world, self._rank = device_type, dist.get_world_size(), dist.get_rank()
        self._groups = {tuple(range(self._world)): dist.group.WORLD}

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        ranks = torch.arange(self._world).view(shape)
        groups = [self.group(ranks.movedim(dim, -1).reshape(-1, size).tolist()) for dim, size in enumerate(shape)]
        return DeviceMesh.from_group(groups, self._device_type, ranks, mesh_dim_names=names)

    def group(self, cuts: list[list[int]]) -> dist.ProcessGroup:
        """This rank's, of those that the world is cut into."""
        for members in [[self._rank]] if len(cuts) == self._world else cuts:
            if tuple(members) not in self._groups:
                self._groups[tuple(members)] = dist.new_group(members, use_local_synchronization=len(members) == 1)
        own = next(group for members, group in self._groups.items() if self._rank in members and [*members] in cuts)
        assert own
        return own


def hops(world_size: int, ep: int, nodes: int) -> list[list[list[int]]]:
    """How the world is cut into groups of ranks, once for each hop that a token takes to its experts' rank: straight
    there; over several nodes first to the rank at the same place of their node, and then within it.
    Source: DeepSeek-V3, section 3.2.2.
    """
    firsts, within = range(0, world_size, ep), ep // nodes
    if nodes == 1 or within == 1:
        return [[list(range(first, first + ep)) for first in firsts]]
    between = [list(range(first + i, first + ep, within)) for first in firsts for i in range(within)]
    return [between, [list(range(first, first + within)) for first in range(0, world_size, within)]]


def _beside(groups: int, peers: int, experts: int) -> list[int]:
    """Degrees of expert parallelism that suit so many groups of experts."""
    return [d for d in _divisors(math.gcd(peers, experts)) if not (groups % d and d % groups)]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
