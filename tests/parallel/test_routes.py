"""Experts that the tokens of answers chose, compared with training's choices, and replayed there."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import MODELS
from law1 import SEED, full
from pool import Pool

from moray.model import Decoder, ModelConfig, initialise
from moray.model.context import Routes
from moray.parallel.layout import Layout
from moray.parallel.rollout import Answer, Sampling, rollout
from moray.parallel.shard import build_decoder, initialise_shards

DRAW = {"seed": 11, "step": 5}
PROMPTS = [np.array([1, 2, 3]), np.arange(10, 18)]
SAMPLING = Sampling(1.0, 8, (), group_size=2, groups_per_batch=2)


def routed(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Of answers to two prompts, what a training pass over them chooses: by itself, and with the routes replayed."""
    decoder = build_decoder(config, layout.meshes("cpu"), dtype=torch.float64, compute_dtype=torch.float64)
    initialise_shards(decoder, SEED)
    answers = rollout(decoder, PROMPTS, [0, 1], SAMPLING, **DRAW, records_routes=True)
    found = replayed(decoder, answers, layout.dp)
    return {"routes": [answer.routes for group in answers for answer in group], **found}


def replayed(decoder: Decoder, answers: list[list[Answer]], copies: int = 1) -> dict[str, Any]:
    """copies: data-parallel ranks, each of which has the same answers here."""
    texts = [torch.tensor([*p, *a.tokens[:-1]]) for p, group in zip(PROMPTS, answers, strict=True) for a in group]
    rows, width = len(texts), 16
    tokens, documents = torch.zeros(rows, width, dtype=torch.int64), torch.full((rows, width), -1)
    recorded = torch.full((rows, width, *answers[0][0].routes.shape[1:]), -1)
    for row, (text, answer) in enumerate(zip(texts, [a for group in answers for a in group], strict=True)):
        tokens[row, : len(text)], documents[row, : len(text)] = text, 0
        recorded[row, : len(text)] = torch.from_numpy(answer.routes).long()
    other = recorded.clone()
    other[recorded >= 0] = (recorded[recorded >= 0] + 1) % decoder.config.n_experts
    found = {}
    for name, routes in {
        "free": Routes.of(recorded, decoder.config, is_replayed=False),
        "same": Routes.of(recorded, decoder.config, is_replayed=True),
        "other": Routes.of(other, decoder.config, is_replayed=True),
        "apart": Routes.of(other, decoder.config, is_replayed=False),
    }.items():
        decoder.zero_grad()
        loss = decoder.loss(tokens, torch.where(documents < 0, -100, tokens), None, documents, routes=routes)
        loss.cross_entropy.backward()
        gradients = {n: full(w.grad) / copies for n, w in decoder.named_parameters() if ".router." in n}
        found[name] = (loss.cross_entropy.item(), [int(n) for n in routes.flips()], gradients)
    return found


@pytest.mark.parametrize("layout", [Layout(dp_shard=1, tp=2), Layout(dp_shard=2, ep=2)], ids=str)
def test_routes_of_answers_are_those_of_training_and_can_be_replayed(pool: Pool, layout: Layout) -> None:
    """Megatron-LM 4168, verl 6280. Where all is exact nothing flips; experts that are told are taken, and the router
    learns from them: as one process has it, in which padding chooses by itself.
    """
    config = MODELS["moe-deepseek"]
    whole = Decoder(config).double()
    initialise(whole, SEED)
    answers = rollout(whole, PROMPTS, [0, 1], SAMPLING, **DRAW, records_routes=True)
    expected = replayed(whole, answers)
    known = sum(len(answer.tokens) + len(PROMPTS[i]) - 1 for i in (0, 1) for answer in answers[i]) * config.n_moe_layers
    assert [expected[name][1] for name in ("free", "same", "other")] == [[0, known]] * 3
    assert expected["apart"][1][0] > known / 2
    assert expected["free"][0] == expected["same"][0] != expected["other"][0]
    assert all(gradient.abs().max() > 0 for gradient in expected["other"][2].values())
    for found in pool.run(routed, 2, config, layout):
        for routes, answer in zip(found["routes"], [a for group in answers for a in group], strict=True):
            np.testing.assert_array_equal(np.sort(routes, -1), np.sort(answer.routes, -1))
        for name in ("free", "same", "other", "apart"):
            assert found[name][0] == pytest.approx(expected[name][0], rel=1e-10)
            assert found[name][1] == expected[name][1]
            for weight, gradient in expected[name][2].items():
                torch.testing.assert_close(found[name][2][weight], gradient, rtol=1e-10, atol=1e-10)
