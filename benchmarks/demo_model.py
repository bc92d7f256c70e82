"""The demo's model, sharded over 4 ranks, and one training step of it: without a run around it."""

import torch
from torch import Tensor

from moray.jobs.config.sections import OptimizerSection
from moray.jobs.training.optimizer import build_optimizer, training_state
from moray.model import ModelConfig, Randomness
from moray.model.objective import MicroBatch
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards

WORKERS, LANES, SEQ_LEN = 4, 4, 256


class DemoModel:
    """This rank's part. Collective."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        meshes = Layout(dp_shard=WORKERS, ep=2).meshes("cpu")
        self._config = ModelConfig.preset("demo-moe")
        self._decoder = build_decoder(self._config, meshes, dtype=torch.float32, compute_dtype=torch.float32)
        self._reduction = Reduction(self._decoder, meshes, 3)
        self._optimizer = build_optimizer(self._decoder, OptimizerSection())
        self.state: dict[str, Tensor] = training_state(self._decoder, self._optimizer)

    def initialise(self) -> None:
        initialise_shards(self._decoder, 0)

    def step(self, number: int) -> None:
        """On LANES sequences a rank, of SEQ_LEN random tokens. Collective."""
        tokens_BT = torch.randint(self._config.vocab_size, (LANES, SEQ_LEN))
        positions_BT = torch.arange(SEQ_LEN).expand(LANES, SEQ_LEN)
        randomness = Randomness(0, number, torch.arange(LANES))
        documents_BT = torch.zeros_like(tokens_BT)
        batch = MicroBatch.of(tokens_BT, tokens_BT, positions_BT, documents_BT, torch.device("cpu"), randomness)
        accumulate_gradients(self._decoder, [batch], self._reduction)
        self._optimizer.step()
        self._optimizer.zero_grad()
