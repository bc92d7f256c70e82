"""A family: what a Hugging Face model_type says in config.json and how it names its weights. Data, not code."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moray import UserError
from moray.model.config.architecture import ModelConfig
from moray.model.config.parts import merge
from moray.model.hf.fields import Fields, refused
from moray.model.hf.places import Table

CLASSIFIER = "ForSequenceClassification"
"""How transformers' names of classes with a head of a few numbers end."""


class Rule(NamedTuple):
    """Some fields of config.json and what they are in a ModelConfig, both ways.

    read: their fields -> ours, nested. write: a config -> their fields. Both raise ValueError naming what they cannot
    express.
    """

    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One model_type of transformers.

    rules: together they map all of config.json. table: where our weights lie in theirs. ignored: a pattern of names in
    their files that compute nothing (buffers) or nothing of ours (layer {n_layers}, which predicts further tokens).
    marker: a field of config.json that tells this format from another of the same model_type. prefix: what files of the
    model without its head leave out of all names (GPT-2's on the hub). in_transformers: False where only the authors'
    own code reads such folders. has_classifier: whether it has a class of these layers that scores texts.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    table: Callable[[ModelConfig], Table]
    ignored: str = r".*\.rotary_emb\.inv_freq"
    marker: str = ""
    prefix: str = "model."
    in_transformers: bool = True
    has_classifier: bool = True

    @property
    def classifier(self) -> str:
        """The class of a decoder with a scalar head."""
        return re.sub("(ForCausalLM|LMHeadModel)$", CLASSIFIER, self.architecture)

    def read(self, values: Mapping[str, Any]) -> ModelConfig:
        """The architecture that config.json describes.

        Raises UserError naming every field that would change the mathematics and has no place in a ModelConfig, or
        what makes no sense in one.
        """
        fields = Fields(values)
        ours = _read_head(fields)
        for rule in self.rules:
            ours = merge(ours, rule.read(fields))
        fields.finish()
        try:
            return ModelConfig.of(ours)
        except UserError as error:
            raise UserError(f"config.json: {error}") from None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json as both 4.57 and 5.x of transformers read it."""
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        if config.head == "scalar":
            theirs |= {"architectures": [self.classifier], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        for rule in self.rules:
            theirs |= rule.write(config)
        return theirs

    def ignores(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor of this name in a file of theirs may be left unread."""
        return re.fullmatch(self.ignored.replace("{n_layers}", str(config.n_layers)), name) is not None


def _read_head(fields: Fields) -> dict[str, Any]:
    """What only the architecture's name says. Raises UserError for a classifier of several labels."""
    stated, labels = fields.take("num_labels", None), fields.take("id2label", None)
    if CLASSIFIER not in str(fields.take("architectures", None)):
        return {}
    n_labels = len(labels) if isinstance(labels, dict) else stated or 2  # theirs where the file is silent
    if n_labels != 1:
        raise refused("num_labels", n_labels, "a scalar head gives one number")
    return {"head": "scalar"}
