"""Saving and loading across layouts, with FSDP2 over expert and tensor parallelism as the trainer uses it.

Every global tensor is a closed form, so that what a layout writes or reads is compared with what it should be.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from listing import names_in
from pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moray.parallel.checkpoint.checkpointer import Checkpointer, CommitError
from moray.parallel.checkpoint.commits import list_commits, read_tensors, verify

# (dp_replicate, dp_shard, tp, ep) by world size.
Layout = tuple[int, int, int, int]
EXPERTS = 8


def full_state() -> dict[str, Tensor]:
    """Global tensors: every dtype and shape that a training state holds, each element telling where it belongs."""
    return {
        "experts.weight_EDF": torch.arange(EXPERTS * 3 * 4, dtype=torch.float32).reshape(EXPERTS, 3, 4),
        "column.weight": 1000 + torch.arange(16 * 3, dtype=torch.float32).reshape(16, 3),
        "row.weight": 2000 + torch.arange(5 * 4, dtype=torch.float32).reshape(5, 4),
        "norm.weight": (3000 + torch.arange(7)).to(torch.float64),
        "norm.exp_avg": torch.arange(7).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scale": torch.tensor(0.1, dtype=torch.float64),
        "step": torch.tensor(2**40 + 7),
        "mask": torch.tensor([True, False, True]),
        "routing_bias": torch.linspace(-1, 1, EXPERTS, dtype=torch.float64),
    }


class Net(nn.Module):
    """Parameters as the trainer shards them: experts over ep and efsdp, column and row over tp and dp_shard."""

    def __init__(self, full: dict[str, Tensor], layout: Layout) -> None:
        super().__init__()
        dp_replicate, dp_shard, tp, ep = layout
        dense = init_device_mesh("cpu", (dp_replicate, dp_shard, tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        shape = (dp_replicate, dp_shard * tp // ep, ep)
        sparse = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "efsdp", "ep"))
        self.experts = _holder(distribute_tensor(full["experts.weight_EDF"], sparse["ep"], [Shard(0)]))
        self.column = _holder(distribute_tensor(full["column.weight"], dense["tp"], [Shard(0)]))
        self.row = _holder(distribute_tensor(full["row.weight"], dense["tp"], [Shard(1)]))
        self.norm = _holder(distribute_tensor(full["norm.weight"], dense["tp"], [Replicate()]))
        self.exp_avg = distribute_tensor(full["norm.exp_avg"], dense, [Replicate(), Shard(0), Replicate()])
        self.empty = distribute_tensor(full["empty"], dense, [Replicate(), Shard(0), Shard(1)])
        self.scale = distribute_tensor(full["scale"], dense, [Replicate()] * 3)
        self.plain = {name: full[name].clone() for name in ("step", "mask", "routing_bias")}
        fully_shard(self.experts, mesh=sparse["dp_replicate", "efsdp"])
        fully_shard([self.column, self.row, self.norm], mesh=dense["dp_replicate", "dp_shard"])

    def state(self) -> dict[str, Tensor]:
        """Under the names of full_state()."""
        return {
            "experts.weight_EDF": self.experts.weight,
            "column.weight": self.column.weight,
            "row.weight": self.row.weight,
            "norm.weight": self.norm.weight,
            "norm.exp_avg": self.exp_avg,
            "empty": self.empty,
            "scale": self.scale,
            **self.plain,
        }


def _holder(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def save_under(layout: Layout, folder: Path, changes: int = 0) -> list[tuple[str, dict[str, Any]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    checkpointer = Checkpointer(folder, keep=2, keep_every=None, on_event=lambda *event: events.append(event))
    state = Net(full_state(), layout).state()
    if layout[1] * layout[2] // layout[3] > 1 and layout[3] > 1:
        assert any(isinstance(p, _StridedShard) for p in state["experts.weight_EDF"].placements)  # type: ignore[attr-defined]
    checkpointer.save(100 + changes, state, {"position": 6400})
    checkpointer.finish()
    return events


def load_under(layout: Layout, folder: Path) -> int:
    """Loads into zeros and compares each rank's shards with those that torch cuts from the closed forms."""
    full = full_state()
    truth = Net(full, layout).state()
    state = Net({name: torch.zeros_like(tensor) for name, tensor in full.items()}, layout).state()
    checkpointer = Checkpointer(folder, keep=2, keep_every=None, on_event=lambda name, fields: None)
    commit = checkpointer.load(state)
    assert commit
    for name in full:
        mine, expected = local(state[name]), local(truth[name])
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected), name
    return commit.manifest.metadata["position"]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


SAVERS: list[Layout] = [(1, 4, 1, 2), (2, 2, 1, 2), (1, 2, 2, 2), (1, 2, 2, 4), (1, 4, 1, 1), (4, 1, 1, 1)]
LOADERS: list[Layout] = [(1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 2, 2), (1, 8, 1, 2), (1, 4, 2, 4), (1, 3, 1, 1)]


@pytest.mark.parametrize("saver", SAVERS)
def test_any_layout_reads_what_any_layout_wrote(pool: Pool, tmp_path: Path, saver: Layout) -> None:
    (event, fields), *others = pool.run(save_under, 4, saver, tmp_path)[0]
    assert (event, fields["step"], others) == ("commit", 100, [])
    (commit,) = list_commits(tmp_path)
    assert verify(commit) == []
    assert fields["bytes"] == sum(path.stat().st_size for path in commit.path.iterdir())
    read = dict(read_tensors(commit))
    truth = full_state()
    assert read.keys() == truth.keys()
    for name, tensor in truth.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    for loader in [LOADERS[SAVERS.index(saver)], LOADERS[0]]:
        world_size = loader[0] * loader[1] * loader[2]
        assert pool.run(load_under, world_size, loader, tmp_path) == [6400] * world_size


def test_eight_ranks_write_more_shards_than_rows_and_one_reads_them(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_under, 8, (1, 8, 1, 4), tmp_path)
    assert pool.run(load_under, 1, (1, 1, 1, 1), tmp_path) == [6400]


def test_every_element_is_stored_once(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_under, 4, (2, 2, 1, 2), tmp_path)
    (commit,) = list_commits(tmp_path)
    for name, tensor in full_state().items():
        chunks = commit.manifest.tensors[name].grid.chunks
        assert sum(torch.Size(sizes).numel() for _, sizes in chunks) == tensor.numel()
    # Replicated work is shared out: no rank writes everything, none nothing.
    assert len(commit.manifest.files) == 4


def expert_rows(folder: Path) -> list[float]:
    """The first value of each expert this rank holds."""
    experts = Net(full_state(), (1, 4, 1, 2)).state()["experts.weight_EDF"]
    checkpointer = Checkpointer(folder, keep=1, keep_every=None, on_event=lambda name, fields: None)
    checkpointer.save(1, {"experts": experts}, {})
    checkpointer.finish()
    assert isinstance(experts, DTensor)
    return [float(expert[0, 0]) for expert in experts.to_local()]


def test_strided_shards_are_recorded_where_they_belong(pool: Pool, tmp_path: Path) -> None:
    held = pool.run(expert_rows, 4, tmp_path)
    # Ranks are (efsdp, ep): expert parallelism cuts 8 experts into 0-3 and 4-7 first, FSDP halves each of them.
    assert held == [[0.0, 12.0], [48.0, 60.0], [24.0, 36.0], [72.0, 84.0]]
    (commit,) = list_commits(tmp_path)
    stored = commit.manifest.tensors["experts"]
    offset_of_file = {file: offsets for file, (offsets, _) in zip(stored.files, stored.grid.chunks, strict=True)}
    assert [offset_of_file[f"rank-{rank:05d}.safetensors"][0] for rank in range(4)] == [0, 4, 2, 6]


def uneven_strided(folder: Path) -> str:
    """9 rows over tp=2 are 5 and 4; FSDP over 4 then leaves the last row on a rank that torch believes empty."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    split = torch.arange(9.0).chunk(2)[mesh.get_local_rank("tp")]
    mine = (*split.chunk(4), *[torch.zeros(0)] * 4)[mesh.get_local_rank("dp")]
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    state = {"w": DTensor.from_local(mine, mesh, placements, run_check=False, shape=torch.Size([9]), stride=(1,))}
    checkpointer = Checkpointer(folder, keep=1, keep_every=None, on_event=lambda name, fields: None)
    with pytest.raises(CommitError) as failure:
        checkpointer.save(1, state, {})
    return str(failure.value)


def test_a_shard_that_is_not_what_its_placements_say_is_refused(pool: Pool, tmp_path: Path) -> None:
    message = r"rank \d: UserError: tensor 'w' of shape \(9,\) holds a shard of shape .* choose degrees that divide"
    assert all(re.search(message, text) for text in pool.run(uneven_strided, 8, tmp_path))
    assert names_in(tmp_path) == []


def save_then_change(folder: Path) -> None:
    """256 MB is still being written when the values change."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = torch.arange(2**25, dtype=torch.float32) + dist.get_rank()
    state = {"w": DTensor.from_local(mine, mesh, [Shard(0)]), "step": torch.tensor(1)}
    checkpointer = Checkpointer(folder, keep=1, keep_every=None, on_event=lambda name, fields: None)
    metadata = {"position": 1}
    checkpointer.save(1, state, metadata)
    for tensor in state.values():
        tensor.fill_(-1)
    metadata["position"] = -1
    checkpointer.finish()


def test_what_changes_after_save_is_not_committed(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_then_change, 2, tmp_path)
    (commit,) = list_commits(tmp_path)
    assert commit.manifest.metadata == {"position": 1}
    read = dict(read_tensors(commit))
    assert int(read["step"]) == 1
    for rank in range(2):
        assert torch.equal(read["w"].chunk(2)[rank], torch.arange(2**25, dtype=torch.float32) + rank)


def single(folder: Path, keep: int = 9) -> Checkpointer:
    return Checkpointer(folder, keep=keep, keep_every=None, on_event=lambda name, fields: None)


def test_nothing_to_load_is_none(tmp_path: Path) -> None:
    assert single(tmp_path / "new" / "folder").load({"w": torch.zeros(1)}) is None


def test_names_all_tensors_that_do_not_fit(tmp_path: Path) -> None:
    checkpointer = single(tmp_path)
    checkpointer.save(1, {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}, {})
    wanted = {"a": torch.zeros(3, 2), "b": torch.zeros(4), "x": torch.ones(1), "y": torch.ones(1)}
    with pytest.raises(ValueError, match=r"x is missing; y is missing; a has shape \(2, 3\), not \(3, 2\)"):
        checkpointer.load(wanted)


def test_reads_some_tensors_and_converts_them(tmp_path: Path) -> None:
    checkpointer = single(tmp_path)
    checkpointer.save(1, {"w": torch.tensor([1.0, 2.0]), "exp_avg": torch.zeros(2)}, {})
    weights = {"w": torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)}
    assert checkpointer.load(weights)
    assert weights["w"].tolist() == [1.0, 2.0]
    assert weights["w"].dtype == torch.bfloat16


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    checkpointer = single(tmp_path)
    checkpointer.save(1, {"t": base.t(), "every other": base[:, ::2], "expanded": torch.ones(1).expand(5)}, {})
    checkpointer.finish()
    read = dict(read_tensors(list_commits(tmp_path)[0]))
    assert read["t"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert read["every other"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert read["expanded"].tolist() == [1, 1, 1, 1, 1]


def test_a_whole_commit_of_the_same_step_stays(tmp_path: Path) -> None:
    checkpointer = single(tmp_path)
    for value in (1.0, 2.0):
        checkpointer.save(7, {"w": torch.tensor([value])}, {})
    checkpointer.finish()
    (commit,) = list_commits(tmp_path)
    assert dict(read_tensors(commit))["w"].tolist() == [1.0]


def test_a_damaged_commit_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpointer = single(tmp_path)
    checkpointer.save(7, {"w": torch.tensor([1.0])}, {})
    checkpointer.finish()
    shard = tmp_path / "step-000000007" / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    checkpointer.save(7, {"w": torch.tensor([2.0])}, {})
    checkpointer.finish()
    (commit,) = list_commits(tmp_path)
    assert verify(commit) == []
    assert dict(read_tensors(commit))["w"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), r"dtype torch\.complex128"),
        (3, r"'w' is not a tensor; put it into the"),
    ],
)
def test_what_no_retry_can_mend_is_raised_at_once(tmp_path: Path, value: Any, message: str) -> None:
    checkpointer = single(tmp_path)
    with pytest.raises(CommitError, match=f"step 1 was not committed: rank 0: .*{message}"):
        checkpointer.save(1, {"w": value}, {})
    assert names_in(tmp_path) == []


MEMORY_SCRIPT = """
import sys
from pathlib import Path
import torch
from moray.parallel.checkpoint.checkpointer import Checkpointer
def peak_kilobytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
folder, gap = Path(sys.argv[1]), Path(sys.argv[1] + "-out-of-reach")
def come_back(name, fields):
    if name == "commit_failed":
        gap.rename(folder)
checkpointer = Checkpointer(folder, keep=2, keep_every=None, on_event=come_back)
checkpointer.save(1, {"warm": torch.zeros(10)}, {})
# Large enough for malloc to give each back to the system once it is free.
state = {f"w{i}": torch.ones(2**26, dtype=torch.uint8) for i in range(4)}
before = peak_kilobytes()
checkpointer.save(2, state, {})
checkpointer.finish()
folder.rename(gap)
checkpointer.save(3, state, {})
checkpointer.save(4, state, {})
checkpointer.finish()
print(peak_kilobytes() - before)
"""


def test_one_copy_of_the_state_and_no_more_also_after_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "checkpoints")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kilobytes = int(output.split()[-1])
    assert 200 * 1024 < kilobytes < 300 * 1024  # the state is 256 MB


def test_settings_that_keep_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        single(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every=0 must be at least 1"):
        Checkpointer(tmp_path, keep=1, keep_every=0, on_event=lambda name, fields: None)


def test_metadata_must_be_json(tmp_path: Path) -> None:
    checkpointer = single(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, {"w": torch.zeros(1)}, {"path": tmp_path})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer.save(1, {"w": torch.zeros(1)}, {"loss": float("nan")})
    assert list_commits(tmp_path) == []
