"""The settings of `moray align`, and what each objective learns from."""

from collections.abc import Mapping

from pydantic import Field

from moray.data.index import Kind
from moray.jobs.config.sections import AnyPath, Section

ALIGNMENT = ("dpo", "ipo")
"""The objectives of `moray align`."""
KIND_OF: Mapping[str, Kind] = {"pretrain": "text", "sft": "chat", **dict.fromkeys(ALIGNMENT, "preference")}
"""What data an objective learns from."""
VERB_OF: Mapping[Kind, str] = {"text": "pretrain", "chat": "finetune", "preference": "align"}
"""Which verb learns from a kind of data."""
HAS_REFERENCE = ("dpo", "ipo")


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
