"""A model that exists: a Hugging Face folder, a run (its newest commit) or one commit of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moray import UserError
from moray.jobs.models.base import Base, check_same, identify
from moray.model import Decoder, ModelConfig
from moray.model.hf import HFWeights, read_config
from moray.model.hf.choice import essence
from moray.model.init import with_initial
from moray.model.lora import LoRA, Merged, adapter_shapes
from moray.model.tensors import Read, tensor_shapes
from moray.parallel.checkpoint.commits import MANIFEST, Commit, commit_paths, list_commits, read_commit, verify
from moray.parallel.checkpoint.weights import CommitWeights
from moray.parallel.control_plane import ControlPlane
from moray.parallel.shard import load_shards

STRETCHES = ("max_seq_len", "position.theta", "position.scaling")
"""What may change, beside what training alone reads, when a model goes on from another's weights: longer contexts."""
HEAD = "head.weight"


@dataclass(frozen=True)
class Weights:
    """config, any part of any tensor of it, and the folder that holds its tokenizer, if it has one.

    path: the folder that they lie in. is_commit: whether it was trained, or made, here: no Hugging Face folder.
    """

    path: Path
    config: ModelConfig
    read: Read
    tokenizer: Path
    is_commit: bool


def locate(folder: Path) -> Path:
    """The Hugging Face folder or the commit that `folder` stands for: itself, or a run's newest commit.

    Raises UserError where there is neither.
    """
    if (folder / "config.json").is_file() or (folder / MANIFEST).is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run: there is no such folder")
    if not (commits := list_commits(folder / "checkpoints")):
        raise UserError(
            f"{folder} holds no commit yet, nor a Hugging Face config.json; `moray pretrain --run.dir {folder} …` "
            "makes commits"
        )
    return commits[-1].path


def config_of(path: Path) -> ModelConfig:
    """The architecture of what `locate` found."""
    if (path / MANIFEST).is_file():
        return ModelConfig.of(read_commit(path).manifest.metadata["config"]["model"])
    return read_config(path)


def tokenizer_of(path: Path) -> Path:
    """The folder of the tokenizer that belongs to what `locate` found."""
    return path.parents[1] / "tokenizer" if (path / MANIFEST).is_file() else path


def open_weights(path: Path, open_base: "Callable[[Path], Weights] | None" = None) -> Weights:
    """The weights of what `locate` found; a routing bias that a family does not have is zero, and adapters are merged
    with the base that they were trained beside, which `open_base` opens.

    Raises UserError for weights that do not fit the config. A commit's digests are not checked.
    """
    config = config_of(path)
    if not (path / MANIFEST).is_file():
        return Weights(path, config, HFWeights(path, config).read, path, is_commit=False)
    commit = read_commit(path)
    read, adapted = CommitWeights(commit).read, adapted_in(commit)
    if adapted:
        lora, base = adapted
        check_same(
            identify(Path(base.path), base), base, "model.from", f"what the adapters of {path} were trained beside"
        )
        opened = (open_base or open_weights)(Path(base.path))
        read = Merged(opened.read, read, adapter_shapes(config, lora), lora.scale).read
    return Weights(path, config, read, tokenizer_of(path), is_commit=True)


def adapted_in(commit: Commit) -> tuple[LoRA, Base] | None:
    """The adapters that a commit holds in place of weights, and what they belong to."""
    if (found := commit.manifest.metadata.get("lora")) is None:
        return None
    return LoRA(found["rank"], found["alpha"], tuple(found["targets"])), Base.of(found["base"])


def open_whole(folder: Path, on_refused: Callable[[str], None]) -> Weights:
    """The weights of a Hugging Face folder, or of a run's newest commit of which every byte is as it was written.

    Says of each damaged commit that it passes over what is wrong with it. Raises UserError where none is whole.
    """
    if (folder / "config.json").is_file():
        return open_weights(folder)
    paths = [folder] if (folder / MANIFEST).is_file() else commit_paths(folder / "checkpoints")
    for path in reversed(paths):
        try:
            problems = verify(read_commit(path))
        except UserError as error:
            problems = [str(error)]
        if not problems:
            return open_weights(path, lambda base: open_whole(base, on_refused))
        on_refused(f"refused the damaged commit {path.name}: {'; '.join(problems)}")
    if paths:
        raise UserError(f"{folder} holds no whole commit; `moray checkpoints {folder} --verify` says more")
    return open_weights(locate(folder))


def fill_shards(decoder: Decoder, path: Path, seed: int = 0) -> None:
    """Fills this rank's part of every weight from what `locate` found; ranks share the checking of a commit's digests.

    A scalar head that takes the place of a vocabulary's is what `seed` begins it with.
    Collective. Raises UserError, on all ranks, for a damaged commit.
    """
    below: Path | None = path
    while below and (below / MANIFEST).is_file():
        _check_together(commit := read_commit(below))
        below = Path(adapted[1].path) if (adapted := adapted_in(commit)) else None
    weights = open_weights(path)
    is_new = decoder.config.head == "scalar" != weights.config.head
    load_shards(decoder, with_initial(weights.read, decoder.config, HEAD, seed) if is_new else weights.read)


def _check_together(commit: Commit) -> None:
    ranks = ControlPlane()
    found = ranks.gather(verify(commit, ranks.rank, ranks.world_size))
    if problems := [problem for of_rank in found for problem in of_rank]:
        raise UserError(f"model.from={commit.path} is damaged: {'; '.join(problems)}")


def check_changes(source: ModelConfig, changed: ModelConfig) -> None:
    """Raises UserError naming every setting in which a model must not differ from the one whose weights it takes.

    A scalar head may take the place of a vocabulary's, and begins anew.
    """
    if changed.head == "scalar":
        source = source.but(head="scalar")
    before, after = essence(source), essence(changed)
    free = [] if source.position.kind == "learned" else list(STRETCHES)
    differing = [
        f"model.{name}={after.get(name)} (there: {before.get(name)})"
        for name in {**after, **before}
        if after.get(name) != before.get(name) and not any(f"{name}.".startswith(f"{prefix}.") for prefix in free)
    ]
    if not differing:
        there, here = tensor_shapes(source), tensor_shapes(changed)
        differing = [f"{name} (only on one side)" for name in sorted(there.keys() ^ here.keys())]
    if differing:
        raise UserError(
            f"model.from's weights are of another model: {', '.join(differing)}; what training alone reads may "
            "change (losses, capacity, init)" + (f", and {', '.join(STRETCHES)}" if free else "")
        )
