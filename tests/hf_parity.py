"""Compares a family with transformers, from files: what each test of tests/model/hf does with its tiny random models.

    CASES = [Case("llama", "Llama", {"hidden_size": 64, …}), …]
    pair = fixture(CASES)

    @pytest.mark.parametrize("check", CHECKS)
    def test_parity(pair, check):
        check(pair)

Where MORAY_PARITY_RECORDS names a folder, every check adds a line of JSON to `transformers-VERSION.jsonl` in it:
{"family", "case", "check", "difference", "tolerance", "reason", "transformers"}.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moray.model import Decoder, KVCache
from moray.model.hf import HFWeights, load_pretrained, save_pretrained

TOLERANCE = 1e-5
VOCABULARY, BATCH, TOKENS, PROMPT = 96, 3, 24, 14


@dataclass(frozen=True)
class Case:
    """One tiny model of a family.

    prefix: of transformers' classes; config_class: where it has none. settings: of its config, beside a vocabulary of
    96. tolerance, reason: per check, where fp32 cannot hold 1e-5, and why. std: of its weights.
    """

    family: str
    prefix: str
    settings: dict[str, Any]
    note: str = ""
    std: float = 0.15
    tolerance: dict[str, tuple[float, str]] = field(default_factory=dict)
    config_class: type[transformers.PretrainedConfig] | None = None

    def __str__(self) -> str:
        return f"{self.family} {self.note}".strip()


class Pair:
    """A model of transformers with every weight random, its folder, and the decoder that we load from it."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.case, self.folder = case, folder
        config_class = case.config_class or getattr(transformers, f"{case.prefix}Config")
        self.config = config_class(
            vocab_size=VOCABULARY, **{"eos_token_id": None, "bos_token_id": None, "pad_token_id": None} | case.settings
        )
        self.theirs = transformers.AutoModelForCausalLM.from_config(self.config, attn_implementation="eager").eval()
        randomise(self.theirs, case.std)
        self.theirs.save_pretrained(folder / "theirs")
        self.ours = load_pretrained(folder / "theirs")
        self.tokens_BT = torch.randint(VOCABULARY, (BATCH, TOKENS))
        self.trained = self.ours

    def compare(self, check: str, ours: Tensor, theirs: Tensor, scale: float | None = None) -> None:
        """Asserts that the largest difference is within the tolerance, relative to the largest of their values."""
        assert ours.shape == theirs.shape
        difference = ((ours - theirs).abs().max() / (scale or theirs.abs().max())).item()
        tolerance, reason = self.case.tolerance.get(check, (TOLERANCE, ""))
        record(self.case, check, difference, tolerance, reason)
        assert difference <= tolerance, f"{self.case}: {check} differ by {difference:.1e} of their scale"


def fixture(cases: list[Case]) -> Any:
    """A pytest fixture that gives each case's Pair, made once a module."""

    @pytest.fixture(scope="module", params=cases, ids=str)
    def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
        return Pair(request.param, tmp_path_factory.mktemp("hf"))

    return pair


def record(case: Case, check: str, difference: float, tolerance: float, reason: str) -> None:
    folder = os.environ.get("MORAY_PARITY_RECORDS")
    if not folder:
        return
    line = {
        "family": case.family,
        "case": str(case),
        "check": check,
        "difference": difference,
        "tolerance": tolerance,
        "reason": reason,
        "transformers": transformers.__version__,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"transformers-{transformers.__version__}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


@torch.no_grad()
def randomise(model: torch.nn.Module, std: float) -> None:
    """Norm weights away from 1, biases away from 0, matrices large enough for softmaxes to choose."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, std)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        else:
            parameter.normal_(1.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # Never below 0: 4.57 gives the experts of other groups a score of 0 and could choose them.
            buffer.uniform_(0.0, 0.2)


def _losses(pair: Pair) -> tuple[Tensor, Tensor]:
    """Our loss and theirs, auxiliary loss included: theirs is of the whole batch, or with seq_aux of each sequence."""
    labels_BT = pair.tokens_BT.clone()
    labels_BT[0, :7] = -100
    targets_BT = torch.cat((labels_BT[:, 1:], torch.full((BATCH, 1), -100)), 1)
    config, group_size = pair.ours.config, 1 if getattr(pair.config, "seq_aux", False) else BATCH
    pair.trained = Decoder(config.but(moe={"group_size": group_size}) if config.moe else config)
    pair.trained.load_state_dict(pair.ours.state_dict())
    losses = pair.trained.train().loss(pair.tokens_BT, targets_BT)
    ours = losses.cross_entropy / (targets_BT != -100).sum() + losses.auxiliary * group_size / BATCH
    pair.theirs.train().zero_grad()
    options = {"output_router_logits": True} if hasattr(pair.config, "router_aux_loss_coef") else {}
    theirs = pair.theirs(pair.tokens_BT, labels=labels_BT, **options).loss
    pair.theirs.eval()
    return ours, theirs


def check_logits(pair: Pair) -> None:
    with torch.no_grad():
        pair.compare("logits", pair.ours(pair.tokens_BT), pair.theirs(pair.tokens_BT).logits)


def check_loss(pair: Pair) -> None:
    ours, theirs = _losses(pair)
    pair.compare("loss", ours.detach(), theirs.detach())


def check_gradients(pair: Pair) -> None:
    """Of every parameter, relative to its largest gradient (or to 1 % of the model's, if that is more)."""
    ours, theirs = _losses(pair)
    ours.backward()
    theirs.backward()
    # Written as weights, their gradients come back through the same places: in memory 5.x fuses experts.
    gradients = copy.deepcopy(pair.theirs)
    for target, source in zip(gradients.parameters(), pair.theirs.parameters(), strict=True):
        target.data = torch.zeros_like(source) if source.grad is None else source.grad
    gradients.save_pretrained(pair.folder / "gradients")
    weights = HFWeights(pair.folder / "gradients", pair.ours.config)
    expected = {name: weights.read(name) for name, _ in pair.trained.named_parameters()}
    least = 0.01 * max(float(g.abs().max()) for g in expected.values())
    relative = []
    for name, parameter in pair.trained.named_parameters():
        assert parameter.grad is not None, name
        scale = max(float(expected[name].abs().max()), least)
        relative.append((parameter.grad - expected[name]).abs().max() / scale)
    pair.compare("gradients", torch.stack(relative), torch.zeros(len(relative)), scale=1.0)


def _decode(pair: Pair, pads_B: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of greedy decoding, ours token by token with our cache and those of their `generate` with theirs.

    Rows of the prompt begin with padding of these lengths. Asserts that the chosen tokens are the same.
    """
    prompt_BT = pair.tokens_BT[:, :PROMPT]
    real_BT = torch.arange(PROMPT)[None] >= pads_B[:, None]
    generated = pair.theirs.generate(
        prompt_BT,
        attention_mask=real_BT.long(),
        max_new_tokens=TOKENS - PROMPT,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    cache = KVCache(pair.ours.config, BATCH, TOKENS, pair.ours.embedding.weight)
    documents_BT = torch.where(real_BT, 0, -1) if pads_B.any() else None
    new_BT, logits, chosen = prompt_BT, [], []
    with torch.no_grad():
        for _ in range(TOKENS - PROMPT):
            logits.append(pair.ours(new_BT, documents_BT=documents_BT, cache=cache)[:, -1])
            new_BT, documents_BT = logits[-1].argmax(-1, keepdim=True), None
            chosen.append(new_BT)
    assert torch.equal(torch.cat(chosen, 1), generated.sequences[:, PROMPT:])
    return torch.stack(logits), torch.stack(generated.logits)


def check_decoding(pair: Pair) -> None:
    pair.compare("decoding", *_decode(pair, torch.zeros(BATCH, dtype=torch.int64)))


def check_padding(pair: Pair) -> None:
    """Rows that begin with padding of different lengths, in one pass and in decoding."""
    pads_B = torch.tensor([0, 5, 9])
    real_BT = torch.arange(TOKENS)[None] >= pads_B[:, None]
    positions_BT = (torch.arange(TOKENS)[None] - pads_B[:, None]).clamp(min=0)
    with torch.no_grad():
        theirs = pair.theirs(pair.tokens_BT, attention_mask=real_BT.long(), position_ids=positions_BT).logits
        ours = pair.ours(pair.tokens_BT, positions_BT, torch.where(real_BT, 0, -1))
    pair.compare("padding", ours[real_BT], theirs[real_BT])
    pair.compare("padding", *_decode(pair, pads_B))


def check_export(pair: Pair) -> None:
    """What we write, transformers loads whole and computes the same with."""
    save_pretrained(pair.ours, pair.folder / "ours")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        pair.folder / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        pair.compare("export", loaded(pair.tokens_BT).logits, pair.theirs(pair.tokens_BT).logits)


CHECKS: list[Callable[[Pair], None]] = [
    check_logits,
    check_loss,
    check_gradients,
    check_decoding,
    check_padding,
    check_export,
]
