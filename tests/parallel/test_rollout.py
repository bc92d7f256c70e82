"""Answers for RL: what is drawn, from what distribution, and that it is no function of ranks, batches or padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from architectures import MODELS, PIECES
from law1 import SEED, full
from pool import Pool
from torch.distributed.tensor import DTensor

from moray.model import Decoder, ModelConfig, Randomness, initialise
from moray.model.moe.layer import MoE
from moray.model.randomness import gumbel
from moray.parallel.compiled import compile_layers
from moray.parallel.generation import write_greedily
from moray.parallel.layout import Layout
from moray.parallel.reduction import Stage
from moray.parallel.rollout import Answer, Sampling, check_rollable, rollout
from moray.parallel.shard import build_decoder, initialise_shards

DRAW = {"seed": 11, "step": 5}
STOP = 5
PROMPTS = [np.array([1, 2, 3]), np.arange(10, 18), np.array([4]), np.array([7, 7, 9, 60, 2])]
SAMPLING = Sampling(1.0, 8, (STOP, 6), group_size=2, groups_per_batch=2)
WARM, COOL = SAMPLING, Sampling(0.6, 8, (STOP, 6), group_size=2, groups_per_batch=2)
SPREAD = {
    "dense": MODELS["dense"],
    "experts": MODELS["moe-deepseek"],
    **{name: PIECES[name][0] for name in PIECES if name.startswith(("latent attention", "GPT", "sliding", "conv"))},
}
LAYOUTS = [
    Layout(dp_shard=2),
    Layout(dp_shard=4),
    Layout(dp_replicate=2, dp_shard=1),
    Layout(dp_replicate=2, dp_shard=2),
    Layout(dp_shard=1, tp=2),
    Layout(dp_shard=1, tp=4),
    Layout(dp_shard=2, tp=2),
    Layout(dp_shard=2, ep=2),
    Layout(dp_shard=4, ep=4),
    Layout(dp_shard=1, tp=2, ep=2),
    Layout(dp_shard=2, tp=2, ep=4, ep_nodes=2),
]


def alone(config: ModelConfig) -> Decoder:
    decoder = Decoder(config).double().eval()
    initialise(decoder, SEED)
    return decoder


@torch.no_grad()
def plainly(decoder: Decoder, sampling: Sampling, prompts: Sequence[np.ndarray] = PROMPTS) -> list[list[Answer]]:
    """A sample at a time, all logits anew for every token, without cache or padding."""

    def answer(prompt: np.ndarray, sample: int) -> Answer:
        tokens, logp = prompt.tolist(), []
        draws = Randomness(**DRAW, sequences_B=torch.tensor([sample]))
        for place in range(sampling.max_new_tokens):
            scaled_V = decoder(torch.tensor([tokens]))[0, -1] / sampling.temperature
            noise_V = gumbel(draws.keys("rollout", torch.tensor([[place]])), "token", len(scaled_V))[0, 0]
            tokens.append(int((scaled_V + noise_V).argmax()))
            logp.append(scaled_V.log_softmax(-1)[tokens[-1]].item())
            if tokens[-1] in sampling.stop_ids:
                break
        return Answer(np.array(tokens[len(prompt) :]), np.array(logp), tokens[-1] in sampling.stop_ids)

    size = sampling.group_size
    return [[answer(prompt, i * size + g) for g in range(size)] for i, prompt in enumerate(prompts)]


def check(found: list[list[Answer]], expected: list[list[Answer]]) -> None:
    for answers, truths in zip(found, expected, strict=True):
        for answer, truth in zip(answers, truths, strict=True):
            assert answer.tokens.tolist() == truth.tokens.tolist()
            np.testing.assert_allclose(answer.logp, truth.logp, rtol=0, atol=1e-10)
            assert answer.has_ended == truth.has_ended


def spread(
    configs: dict[str, ModelConfig], layout: Layout, samplings: list[Sampling], prompts: list[np.ndarray], ranks: int
) -> dict[str, list[dict[int, list[Answer]]]]:
    """What this rank answers, by prompt; `ranks` of them share the prompts, those behind have none."""
    meshes, found = layout.meshes("cpu"), {}
    own, share = layout.dp_rank(dist.get_rank()), len(prompts) // ranks
    ids = range(own * share, (own + 1) * share) if own < ranks else range(0)
    for name, config in configs.items():
        decoder = build_decoder(config, meshes, dtype=torch.float64, compute_dtype=torch.float64)
        initialise_shards(decoder, SEED)
        asked = [prompts[i] for i in ids]
        answers = [rollout(decoder, asked, ids, sampling, **DRAW) for sampling in samplings]
        found[name] = [dict(zip(ids, of_all, strict=True)) for of_all in answers]
    return found


def together(found: list[dict[str, Any]], name: str, index: int, prompts: int) -> list[list[list[Answer]]]:
    """Of all ranks that have each prompt."""
    return [[of[name][index][i] for of in found if i in of[name][index]] for i in range(prompts)]


TRUTHS: dict[tuple[str, float], list[list[Answer]]] = {}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_answers_as_one_process(pool: Pool, layout: Layout) -> None:
    """R1-V 67, TRL 5030 and 2824: on any ranks, a prompt has its own samples, and another prompt other ones."""
    fits = {name: config for name, config in SPREAD.items() if config.n_experts or layout.ep == 1}
    if layout.world_size == 4:
        fits = {name: fits[name] for name in ("dense", "experts", "latent attention") if name in fits}
    found = pool.run(spread, layout.world_size, fits, layout, [WARM, COOL], PROMPTS, layout.dp)
    for name, config in fits.items():
        for index, sampling in enumerate([WARM, COOL]):
            key = name, sampling.temperature
            if key not in TRUTHS:
                TRUTHS[key] = plainly(alone(config), sampling)
            for copies, expected in zip(together(found, name, index, len(PROMPTS)), TRUTHS[key], strict=True):
                assert len(copies) == layout.tp
                for answers in copies:
                    check([answers], [expected])


def bits(config: ModelConfig, layout: Layout) -> dict[int, list[tuple[bytes, bytes]]]:
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.float32)
    initialise_shards(decoder, SEED)
    ids = layout.lanes(layout.dp_rank(dist.get_rank()), 4)
    answers = rollout(decoder, [PROMPTS[i] for i in ids], ids, Sampling(1.0, 8, (), 2, 1), **DRAW)
    return {i: [(a.tokens.tobytes(), a.logp.tobytes()) for a in group] for i, group in zip(ids, answers, strict=True)}


@pytest.mark.parametrize("name", ["dense", "moe-deepseek"])
def test_data_parallel_ranks_of_whole_batches_have_the_bits_of_one(pool: Pool, name: str) -> None:
    found = [pool.run(bits, n, MODELS[name], Layout(dp_shard=n)) for n in (1, 2, 4)]
    expected = found[0][0]
    for ranks in found:
        assert {i: group for of_rank in ranks for i, group in of_rank.items()} == expected


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_shard=2, ep=2)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_whose_answers_are_uneven_wait_for_each_other(pool: Pool, layout: Layout, ranks: int) -> None:
    """DeepSpeed 8262, transformers 30228: answers of 1 and 40 tokens; and a rank that has no prompt at all."""
    prompts, config = PROMPTS[:2], MODELS["moe-deepseek"].but(max_seq_len=64)
    long = Sampling(1.0, 40, (), group_size=1, groups_per_batch=1)
    first = plainly(alone(config), long, prompts)[0][0].tokens[0]
    sampling = Sampling(1.0, 40, (int(first),), group_size=1, groups_per_batch=1)
    expected = plainly(alone(config), sampling, prompts)
    assert [len(answers[0].tokens) for answers in expected] == [1, 40]
    found = pool.run(spread, 2, {"one": config}, layout, [sampling], prompts, ranks)
    check([copies[0] for copies in together(found, "one", 0, 2)], expected)


@pytest.mark.parametrize("sampling", [WARM, COOL], ids=["1", "0.6"])
@pytest.mark.parametrize("name", [*MODELS, *(n for n, (c, _) in PIECES.items() if not (c.moe and "gated" not in n))])
def test_log_probabilities_are_those_of_a_packed_pass(name: str, sampling: Sampling) -> None:
    """trlX 508, OpenRLHF 217, TRL 6800, 3029 and 4159: padding before prompts shifts no position, and temperature
    counts on both sides.
    """
    config = MODELS[name] if name in MODELS else PIECES[name][0]
    decoder = alone(config.but(max_seq_len=32))
    for prompt, answers in zip(PROMPTS, rollout(decoder, PROMPTS, range(4), sampling, **DRAW), strict=True):
        texts = [torch.tensor([*prompt, *answer.tokens]) for answer in answers]
        tokens = torch.cat(texts)[None]
        documents = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])[None]
        positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
        logits = decoder(tokens, positions, documents)[0] / sampling.temperature
        for answer, text, logits_TV in zip(answers, texts, logits.split([*map(len, texts)]), strict=True):
            logp = logits_TV[:-1].log_softmax(-1).gather(1, text[1:, None])[len(prompt) - 1 :, 0]
            np.testing.assert_allclose(answer.logp, logp.detach().numpy(), rtol=0, atol=1e-10)


def test_tokens_come_as_often_as_softmax_says() -> None:
    """Chi-squared, at the 0.1% level, of the first token and of the second behind the likeliest first."""
    decoder = alone(MODELS["dense"].but(vocab_size=8))
    prompt, n, quantile_7 = np.array([1, 2, 3]), 20_000, 24.32
    (answers,) = rollout(decoder, [prompt], [0], Sampling(0.7, 2, (), n, 1), **DRAW)
    drawn = np.stack([answer.tokens for answer in answers])
    best = np.bincount(drawn[:, 0]).argmax()
    for before, counts in (
        (prompt, np.bincount(drawn[:, 0], minlength=8)),
        ([*prompt, best], np.bincount(drawn[drawn[:, 0] == best, 1], minlength=8)),
    ):
        p = (decoder(torch.tensor([[*before]]))[0, -1] / 0.7).softmax(-1).detach().numpy()
        assert (p * counts.sum()).min() > 5
        assert ((counts - p * counts.sum()) ** 2 / (p * counts.sum())).sum() < quantile_7


def test_samples_differ_and_batches_do_not_matter() -> None:
    """TRL 2824, ms-swift 3450: no two samples are drawn alike, nor one in two steps; a batch split changes none."""
    decoder = alone(MODELS["moe-deepseek"])
    answers = {
        (step, size, seed): rollout(decoder, PROMPTS, range(4), Sampling(1.0, 6, (), 4, size), seed=seed, step=step)
        for step, size, seed in ((0, 1, 0), (0, 4, 0), (1, 4, 0), (0, 4, 1))
    }
    check(answers[0, 1, 0], answers[0, 4, 0])
    texts = [tuple(a.tokens) for key in ((0, 4, 0), (1, 4, 0), (0, 4, 1)) for group in answers[key] for a in group]
    assert len(set(texts)) == len(texts)


def test_the_coldest_answers_are_the_likeliest() -> None:
    decoder = alone(MODELS["moe-deepseek"])
    found = rollout(decoder, PROMPTS, range(4), Sampling(1e-4, 8, (STOP,), 1, 4), **DRAW)
    assert [answers[0].tokens.tolist() for answers in found] == write_greedily(decoder, PROMPTS, 8, [STOP])


def gathers_of(config: ModelConfig, stage: Stage) -> tuple[list[int], list[bool], bool, bool]:
    """How often weights travel in a forward pass, in a rollout, and in a forward pass behind it."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    counted, gather = [], groups.foreach_all_gather

    def counting(*given: Any, **named: Any) -> Any:
        counted[-1] += 1
        return gather(*given, **named)

    groups.foreach_all_gather = counting
    fp64, meshes = torch.float64, Layout(dp_shard=2).meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=fp64, compute_dtype=fp64, stage=stage)
    initialise_shards(decoder, SEED)
    tokens, losses = torch.arange(16).view(1, 16), []
    for is_rollout in (False, True, False):
        counted.append(0)
        if is_rollout:
            rollout(decoder, PROMPTS[:1], [dist.get_rank()], SAMPLING, **DRAW)
            is_spread = all(isinstance(weight, DTensor) for weight in decoder.parameters())
        else:
            loss = decoder.loss(tokens, tokens).cross_entropy
            loss.backward()
            losses.append([full(weight.grad) for weight in decoder.parameters()])
            decoder.zero_grad()
    return counted, [torch.equal(a, b) for a, b in zip(*losses, strict=True)], is_spread, decoder.training


@pytest.mark.parametrize(("stage", "groups"), [(1, 1), (3, 4)])
def test_weights_travel_once_a_rollout_and_are_spread_again_behind_it(pool: Pool, stage: Stage, groups: int) -> None:
    for (passed, rolled, again), are_equal, is_spread, is_training in pool.run(gathers_of, 2, MODELS["dense"], stage):
        assert rolled == groups
        assert passed == again >= rolled
        assert all(are_equal)
        assert is_spread
        assert is_training


def test_nothing_is_compiled_for_a_rollout() -> None:
    decoder, graphs = alone(MODELS["dense"]), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_layers(decoder, "cpu", torch.float64, backend=backend)
    check(rollout(decoder, PROMPTS, range(4), SAMPLING, **DRAW), plainly(alone(MODELS["dense"]), SAMPLING))
    assert not graphs


def test_on_token_is_called_for_each() -> None:
    called = []
    sampling = Sampling(1.0, 7, (), 1, 2)
    rollout(alone(MODELS["dense"]), PROMPTS, range(4), sampling, **DRAW, on_token=lambda: called.append(1))
    assert len(called) == 2 * 7


def test_weights_that_are_damaged_are_noticed() -> None:
    decoder = alone(MODELS["dense"])
    decoder.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits of an answer's token 0 are not finite"):
        rollout(decoder, PROMPTS, range(4), SAMPLING, **DRAW)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("noisy top-k", r"model.moe.noisy=True must be false: answers"),
        (
            "capacity by gate, expert biases, every second layer",
            r"model.moe.capacity_factor=1.0 must be none: answers",
        ),
    ],
)
def test_what_trains_another_function_is_refused(piece: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rollable(PIECES[piece][0])
    with pytest.raises(ValueError, match=message):
        rollout(Decoder(PIECES[piece][0]), [], [], SAMPLING, **DRAW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0 and finite"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{**vars(SAMPLING), **changes})


@pytest.mark.parametrize("length", [0, 25])
def test_prompts_without_room_for_an_answer_are_refused(length: int) -> None:
    decoder = alone(MODELS["dense"].but(max_seq_len=32))
    rollout(decoder, [np.ones(24)], [3], SAMPLING, **DRAW)
    with pytest.raises(ValueError, match=rf"prompt 3 has {length} tokens; .* it may have 1 to 24"):
        rollout(decoder, [np.ones(length)], [3], SAMPLING, **DRAW)


def test_prompts_of_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts have 1 different ids"):
        rollout(alone(MODELS["dense"]), PROMPTS[:2], [3, 3], SAMPLING, **DRAW)


def counted(config: ModelConfig) -> list[float]:
    decoder = build_decoder(
        config, Layout(dp_shard=2, ep=2).meshes("cpu"), dtype=torch.float64, compute_dtype=torch.float64
    )
    initialise_shards(decoder, SEED)
    layers, traffic = [module for module in decoder.modules() if isinstance(module, MoE)], []

    def note() -> None:
        traffic.append(sum(float(layer.dispatcher.traffic().sum()) for layer in layers))

    rollout(decoder, PROMPTS, range(4), SAMPLING, **DRAW, on_token=note)
    note()
    return [max(traffic), traffic[-1], *(float(layer.tokens_E.sum()) for layer in layers)]


def test_what_travels_for_answers_is_not_counted_as_a_step_s(pool: Pool) -> None:
    for most, *left in pool.run(counted, 2, MODELS["moe-deepseek"]):
        assert most > 0
        assert left == [0, 0, 0]


def refused(config: ModelConfig) -> str:
    decoder = build_decoder(
        config, Layout(dp_shard=1, tp=2).meshes("cpu"), dtype=torch.float64, compute_dtype=torch.float64
    )
    with pytest.raises(ValueError, match="must be a multiple of") as raised:
        rollout(decoder, PROMPTS, range(4), Sampling(1.0, 4, (), 3, 1), **DRAW)
    return str(raised.value)


def test_answers_that_tensor_parallelism_cannot_cut_are_refused(pool: Pool) -> None:
    found = pool.run(refused, 2, MODELS["dense"])[0]
    assert found.startswith("groups_per_batch=1 times group_size=3 must be a multiple of layout.tp=2")


def in_bf16(config: ModelConfig, layout: Layout) -> list[list[Answer]]:
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float32, compute_dtype=torch.bfloat16)
    initialise_shards(decoder, SEED)
    return rollout(decoder, PROMPTS[:2], [0, 1], SAMPLING, **DRAW)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_shard=1, tp=2)], ids=str)
def test_in_bf16_log_probabilities_are_those_of_fp64_but_for_rounding(pool: Pool, layout: Layout) -> None:
    config, distances = MODELS["dense"].but(init={"std": 0.05}), []
    for prompt, answers in zip(PROMPTS, pool.run(in_bf16, 2, config, layout)[0], strict=False):
        for answer in answers:
            assert answer.logp.dtype == np.float32
            tokens = torch.tensor([*prompt, *answer.tokens])
            logp = alone(config)(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[len(prompt) - 1 :, 0]
            distances += (logp.detach().numpy() - answer.logp).tolist()
    assert 0 < np.abs(distances).max() < 0.05


def test_a_dense_model_has_no_routes() -> None:
    answers = rollout(alone(MODELS["dense"]), PROMPTS, range(4), SAMPLING, **DRAW, records_routes=True)
    assert answers[0][0].routes is None
