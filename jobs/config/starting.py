"""What settings are where neither command line nor recipe says, as far as a verb has others than all the rest."""

from collections.abc import Mapping

STARTS: Mapping[str, Mapping[str, object]] = {
    "pretrain": {},
    # The usual rates of supervised fine-tuning; TRL's, with a decay to a tenth.
    "finetune": {"train.objective": "sft", "train.epochs": 3.0, "optimizer.lr": 2e-5, "optimizer.weight_decay": 0.0},
}
"""By the verb's name. Without `train.epochs` where the number of steps is said."""
