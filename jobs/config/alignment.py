"""The settings of `moray align`, and what each objective learns from."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from moray.data.index import Kind
from moray.jobs.config.sections import AnyPath, Section

PREFERENCES = ("dpo", "ipo", "reward")
ALIGNMENT = (*PREFERENCES, "distill")
"""The objectives of `moray align`."""
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "pretrain": ("text",),
    "sft": ("chat",),
    **dict.fromkeys(PREFERENCES, ("preference",)),
    "distill": ("text", "chat"),
}
"""What data an objective learns from."""
VERB_OF: Mapping[Kind, str] = {"text": "pretrain", "chat": "finetune", "preference": "align"}
"""Which verb learns from a kind of data."""


class AlignSection(Section):
    """What `moray align` learns by: train.objective names the method."""

    reference: AnyPath = ""
    """DPO and IPO: the model that the policy is compared with, a run, a commit or a Hugging Face folder of the same
    vocabulary; where it is not set, that of model.from. It stays as it is, which every start checks by its digest."""
    beta: float = Field(0.1, gt=0)
    """DPO and IPO: how closely the policy is held to the reference; the higher, the closer."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """DPO: the share of pairs that are taken to be labelled the wrong way round (conservative DPO)."""
    length_normalised: bool = False
    """IPO: log-probabilities are means over an answer's tokens (as TRL has it), not sums (the equation)."""
    margin: float = Field(0.0, ge=0)
    """Reward models: how far the score of a chosen answer shall lie above the rejected one's."""
    centring: float = Field(0.0, ge=0)
    """Reward models: factor of the squared sum of a pair's scores, which keeps them around 0; 0.01 is usual."""
    teacher: AnyPath = ""
    """Distillation: the model whose probabilities are learnt, a run, a commit or a Hugging Face folder of the same
    vocabulary and any architecture. It stays as it is, which every start checks by its digest."""
    direction: Literal["forward", "reverse"] = "forward"
    """Distillation: KL(teacher | student), which covers all that the teacher finds likely, or KL(student | teacher)."""
    temperature: float = Field(1.0, gt=0)
    """Distillation: both models' logits are divided by it, and the loss is multiplied with its square."""
    mix: float = Field(0.0, ge=0, le=1)
    """Distillation: the share of the plain cross-entropy in the loss."""
