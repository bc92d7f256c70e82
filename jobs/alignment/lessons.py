"""What policy and critic learn from some answers: this rank's rows of them, with all that is known of their tokens."""

# Shapes: S samples in R rows of T tokens, of which a micro-batch has B.

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moray.jobs.alignment.observed import Minibatch, Observed
from moray.jobs.alignment.worth import Worth
from moray.jobs.training.begin import Training
from moray.model.alignment.policy import Aggregation, PolicyBatch, aggregation
from moray.model.alignment.value import ValueBatch


class Lesson(NamedTuple):
    """An update's micro-batches; values: of the critic, where there is one."""

    policy: list[PolicyBatch]
    values: list[ValueBatch]


def lesson(
    training: Training, of: Minibatch, seen: Sequence[Observed], worth: Worth, lengths_S: Tensor, is_valid_S: Tensor
) -> Lesson:
    """Of a minibatch. worth, lengths_S (of answers), is_valid_S (bool): of all the step's samples."""
    rl, rows, critic = training.config.rl, of.rows, training.critic
    kind: Aggregation = "dapo" if rl.variant == "cispo" else rl.variant
    here = slice(of.samples.start, of.samples.stop)
    lengths_S, is_valid_S = lengths_S[here], is_valid_S[here]
    weight_S, _ = aggregation(kind, lengths_S, is_valid_S, rl.max_new_tokens)

    def placed(of_tokens_ST: Tensor) -> Tensor:
        each = zip(of_tokens_ST, lengths_S.tolist(), strict=True)
        return rows.placed([of_sample_T[:length].numpy() for of_sample_T, length in each])

    weights_RT = placed(weight_S[:, None].expand(-1, int(lengths_S.max())))
    advantages_RT = placed(worth.advantages_ST[here])
    returns_RT = None if worth.returns_ST is None else placed(worth.returns_ST[here])
    found = Lesson([], [])
    for one in seen:
        part, device = slice(one.piece.start, one.piece.stop), one.batch.tokens_BT.device
        samples, documents_BT = rows.samples_in(one.piece), rows.documents_RT[part]
        known: dict[str, Any] = {
            "weights_BT": weights_RT[part].to(device),
            "n_own_count": aggregation(kind, lengths_S[samples], is_valid_S[samples], rl.max_new_tokens)[1],
        }
        # A forward pass before the update, and one of each model that stays as it is, are a third of it each.
        asked = 1 + (1 + len(training.frozen)) / 3
        found.policy.append(
            PolicyBatch(
                **vars(one.batch) | {"flops": asked * training.work.flops(documents_BT)} | known,
                old_logp_BT=one.logp_BT,
                advantages_BT=advantages_RT[part].to(device),
                # With PPO it is in the advantages.
                reference_logp_BT=None if critic else one.reference_logp_BT,
                n_samples=len(samples),
                routes=one.routes if rl.replay_routing else None,
            )
        )
        if critic and one.values_BT is not None and returns_RT is not None:
            found.values.append(
                ValueBatch(
                    **vars(one.batch) | {"flops": (1 + 1 / 3) * critic.work.flops(documents_BT)} | known,
                    old_values_BT=one.values_BT,
                    returns_BT=returns_RT[part].to(device),
                )
            )
    return found
