"""The reward model's loss, its gradient and metrics against TRL's, on the same scores."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from pairs import answers, packed
from torch import Tensor, nn

from moray.model import Decoder
from moray.model.alignment.reward_model import RewardModel

RewardTrainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer


class Scores(nn.Module):
    """In place of a decoder: any numbers, where a model's would be."""

    def __init__(self) -> None:
        super().__init__()
        shape, draw = packed(answers()).tokens_BT.shape, torch.Generator().manual_seed(0)
        self.scores_BT = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=draw))

    def values(self, *inputs: object) -> Tensor:
        return self.scores_BT


@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("margins_P", [None, torch.linspace(-1, 2, 7, dtype=torch.float64)], ids=["plain", "margins"])
def test_trl_computes_the_same(centring: float, margins_P: Tensor | None) -> None:
    scores, pairs, objective = Scores(), packed(answers(), margins_P), RewardModel(centring)
    decoder: Decoder = scores  # type: ignore[assignment]
    found = {name: x / 7 for name, x in zip(objective.names, objective.sums(decoder, pairs), strict=True)}
    (found["loss"] + found["centring"]).backward()

    theirs_BT = scores.scores_BT.detach().clone().requires_grad_()
    by_side = theirs_BT.flatten()[pairs.ends_P2.t().flatten()][:, None]  # all chosen ones, then all rejected ones
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margins_P is None else {"margin": margins_P}
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=by_side), inputs)
    loss.backward()
    assert loss.item() == pytest.approx((found["loss"] + found["centring"]).item(), rel=1e-12)
    torch.testing.assert_close(scores.scores_BT.grad, theirs_BT.grad, rtol=1e-12, atol=1e-14)
    for name in ("accuracy", "margin"):
        assert trainer._metrics["eval"][name] == pytest.approx([found[name].item()], rel=1e-6)  # theirs is of fp32
