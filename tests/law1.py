"""What a model computes on one process, and what it computes spread over ranks: the two sides of law 1.

The truth is a plain Decoder in this process, with torch's clip_grad_norm_ and torch's AdamW; where nothing is drawn,
its loss is checked against torch's cross_entropy of its logits.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer
from moray.model import Decoder, Losses, ModelConfig, Randomness, initialise
from moray.model import lora as adapters
from moray.model.lora import LoRA
from moray.model.moe import experts
from moray.model.moe.balance import updated_bias
from moray.model.moe.grouped import grouped_linear, grouped_mm_linear
from moray.model.moe.layer import MoE
from moray.model.objective import MicroBatch
from moray.model.recompute import Recompute
from moray.model.sharded import local
from moray.parallel.compiled import compile_layers
from moray.parallel.exact import GradientTree
from moray.parallel.gradients import accumulate_gradients, clip_gradients, update_routing_bias
from moray.parallel.held import held_chunk
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction, Stage
from moray.parallel.shard import build_decoder, initialise_shards, load_shards

STEPS, BATCH, TOKENS, SEED = 3, 8, 16, 3
MAX_NORM = 0.5
CPU = torch.device("cpu")
IDLE_EXPERT = 1
OPTIMIZER = OptimizerSection(lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
# A wide initialisation, so that routing and attention are far from uniform.
NARROW: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "vocab_size": 64,
    "attention": HEADS,
    "ffn": {"width": 48},
    "init": {"std": 0.2},
}


def global_batch(step: int) -> dict[str, Tensor]:
    """Packed documents of uneven length, with very different numbers of targets on the lanes, and padding.

    All begin with the same token twice: equal hidden states, whose gates are equal but for rounding.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(64, (BATCH, TOKENS), generator=generator)
    targets = torch.randint(64, (BATCH, TOKENS), generator=generator)
    documents, positions = torch.zeros_like(tokens), torch.arange(TOKENS).repeat(BATCH, 1)
    for lane in range(BATCH):
        edge = 2 + lane
        tokens[lane, :2] = tokens[lane, edge : edge + 2] = 1
        documents[lane, edge:] = 1
        positions[lane, edge:] = torch.arange(TOKENS - edge)
        targets[lane, : lane * 2] = -100
    documents[0, -3:], targets[0, -3:] = -1, -100
    return {"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions, "documents_BT": documents}


def starve(decoder: torch.nn.Module) -> None:
    """One expert that no token ever chooses."""
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.router.bias_E[IDLE_EXPERT] = -1e3


def group_size(config: ModelConfig) -> int:
    return config.moe.group_size if config.moe else 1


def randomness(step: int, lanes: Sequence[int], device: torch.device = CPU) -> Randomness:
    return Randomness(SEED, step, step * BATCH + torch.tensor(lanes, device=device))


def check_by_logits(decoder: Decoder, inputs: dict[str, Tensor], targets_BT: Tensor, found: Losses) -> None:
    """The chunked loss against torch's, on the logits of a pass of its own (which must leave no count behind)."""
    counted = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    with torch.no_grad():
        logits = decoder(**inputs).flatten(0, 1)
        valid = targets_BT.flatten() != -100
        expected = torch.nn.functional.cross_entropy(logits[valid], targets_BT.flatten()[valid], reduction="sum")
        torch.testing.assert_close(found.cross_entropy, expected)
        z = decoder.config.z_loss * logits[valid].logsumexp(-1).square().sum()
        torch.testing.assert_close(found.z, z)
        for name, buffer in decoder.named_buffers():
            buffer.copy_(counted[name])


def plain_adamw(decoder: Decoder) -> torch.optim.Optimizer:
    decays = {name: p.ndim > 1 and not name.endswith(("bias_EF", "bias_ED")) for name, p in decoder.named_parameters()}
    matrices, vectors = ([p for n, p in decoder.named_parameters() if decays[n] == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def truth(
    config: ModelConfig, dtype: torch.dtype, optimizer_of: Callable[[Decoder], torch.optim.Optimizer] = plain_adamw
) -> dict[str, Any]:
    decoder = Decoder(config).to(dtype)
    initialise(decoder, SEED)
    starve(decoder)
    optimizer = optimizer_of(decoder)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        inputs = {name: batch[name] for name in ("tokens_BT", "positions_BT", "documents_BT")}
        found = decoder.loss(**inputs, targets_BT=batch["targets_BT"], randomness=randomness(step, range(BATCH)))
        count = (batch["targets_BT"] != -100).sum()
        if config.moe is None or not config.moe.is_random:
            check_by_logits(decoder, inputs, batch["targets_BT"], found)
        loss = (found.cross_entropy + found.z) / count + found.auxiliary * group_size(config) / BATCH
        losses.append(found.cross_entropy.item() / count.item())
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in decoder.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), MAX_NORM).item())
        optimizer.step()
        for module in decoder.modules():
            if isinstance(module, MoE):
                assert module.tokens_E[IDLE_EXPERT] == 0
                if module.moe.second_expert == "always":
                    assert module.tokens_E.sum() == (BATCH * TOKENS - 3) * module.moe.top_k
                bias = updated_bias(module.router.bias_E, module.tokens_E, module.moe)
                module.router.bias_E.copy_(bias)
                module.tokens_E.zero_()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": state(decoder)}


def state(decoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor.detach()) for name, tensor in decoder.state_dict().items()}


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).to("cpu", copy=True)


def spread(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    stage: Stage = 3,
    recompute: Recompute = "none",
    backend: str | None = None,
    lora: LoRA | None = None,
    *,
    exact: bool = False,
    settings: OptimizerSection = OPTIMIZER,
) -> dict[str, Any] | None:
    """The same steps on this rank's share of the lanes, in two uneven micro-batches. Results are on the CPU.

    exact: in micro-batches of one routing group each, added up along the tree of all lanes.

    backend: torch.compile's, for layers that are compiled. lora: adapters, filled as `drawn_adapter` says.

    In fp32 the experts use the grouped kernel that GPUs use, in fp64, which it lacks, the loop over experts.
    """
    for module in (experts, adapters):
        module.grouped_linear = grouped_mm_linear if dtype == torch.float32 else grouped_linear
    meshes, least = layout.meshes(device.type), group_size(config)
    compute_dtype = compute_dtype or dtype
    decoder = build_decoder(
        config, meshes, dtype=dtype, compute_dtype=compute_dtype, stage=stage, recompute=recompute, lora=lora
    )
    if backend:
        compile_layers(decoder, device.type, compute_dtype, backend=backend)
    if lora:
        fill_adapted(decoder, config)
    else:
        initialise_shards(decoder, SEED)
    starve(decoder)
    optimizer = build_optimizer(decoder, settings, fused=not exact, copy=meshes.copy, dtype=compute_dtype)
    reduction = GradientTree(decoder, meshes) if exact else Reduction(decoder, meshes, stage)
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), BATCH, least if exact else None)
    edges = [*range(0, len(lanes), least)] if exact else [0, least]
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        cuts = [cut for a, b in pairwise([*edges, len(lanes)]) if (cut := lanes[a:b])]
        micro_batches = [
            MicroBatch.of(*(x[cut] for x in batch.values()), device, randomness(step, cut, device)) for cut in cuts
        ]
        optimizer.zero_grad()
        losses.append(accumulate_gradients(decoder, micro_batches, reduction).loss)
        gradients = gradients or {name: full(p.grad) for name, p in decoder.named_parameters() if p.requires_grad}
        norms.append(clip_gradients(decoder.parameters(), MAX_NORM, exact=exact))
        optimizer.step()
        update_routing_bias(decoder)
    weights = state(decoder)
    if dist.get_rank():
        return None
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def fill_adapted(decoder: Decoder, config: ModelConfig) -> None:
    """The base is what `truth` has; of the adapters, B is not 0 either, or A would have no gradient."""
    base = Decoder(config)
    initialise(base, SEED)
    load_shards(decoder, lambda name, box: base.state_dict()[name][box])
    for name, weight in decoder.named_parameters():
        if weight.requires_grad:
            held = zip(*held_chunk(weight), strict=True)
            values = drawn_adapter(name, weight.shape)[tuple(slice(start, start + size) for start, size in held)]
            local(weight.detach()).copy_(values)


def drawn_adapter(name: str, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) / 4


def check(found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> None:
    """Both sides are equal, to 1e-10 in fp64 and 1e-4 in fp32."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert expected["norms"][0] > MAX_NORM, "clipping must bite"
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance, abs=0)
    for key in ("gradients", "weights"):
        assert found[key].keys() == expected[key].keys()
        for weight, value in expected[key].items():
            torch.testing.assert_close(
                found[key][weight], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=weight: f"{n}: {m}"
            )
