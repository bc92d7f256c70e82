"""Tuning on dialogues over several ranks equals one process: the loss, its gradient, and what is written meanwhile."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from architectures import MODELS
from dialogues import make_dialogues
from law1 import full
from pool import Pool

from moray.data.dataset import Dataset
from moray.data.stream import Stream
from moray.model import Decoder, ModelConfig
from moray.model.init import initialise
from moray.model.objective import MicroBatch
from moray.parallel.generation import write_greedily
from moray.parallel.gradients import accumulate_gradients
from moray.parallel.layout import Layout
from moray.parallel.reduction import Reduction
from moray.parallel.shard import build_decoder, initialise_shards

SEED, BATCH, SEQ_LEN, VOCAB = 0, 8, 64, 97
CPU = torch.device("cpu")
MODEL = MODELS["moe-deepseek"].but(vocab_size=VOCAB + 3)
LAYOUTS = [
    Layout(dp_shard=2),
    Layout(dp_shard=4),
    Layout(dp_replicate=2, dp_shard=2),
    Layout(dp_shard=2, ep=2),
    Layout(dp_shard=1, tp=2),
    Layout(dp_shard=2, tp=2, ep=4),
]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Answers of 1 to 30 tokens: a mean over ranks' means would be another number."""
    draw = np.random.default_rng(1)
    each = []
    for _ in range(60):
        asked, answered = int(draw.integers(1, 30)), int(draw.integers(1, 30))
        tokens = draw.integers(3, VOCAB, 1 + asked + answered).tolist()
        each.append((tokens, "." + "u" + "." * (asked - 1) + "t" * answered))
    return make_dialogues(tmp_path_factory.mktemp("dialogues") / "data", each, vocab_size=VOCAB)


def micro_batches(dataset: Dataset, lanes: Any, size: int) -> list[MicroBatch]:
    stream = Stream(dataset, "train", seq_len=SEQ_LEN, global_batch=BATCH, seed=SEED, lanes=lanes)
    batch = stream.batch(0)
    tensors = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
    return [MicroBatch.of(*parts, CPU) for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True)]


def tuned(dataset: Dataset, config: ModelConfig, layout: Layout) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss and gradients of a step, and what the model writes then."""
    meshes = layout.meshes("cpu")
    decoder = build_decoder(config, meshes, dtype=torch.float64, compute_dtype=torch.float64)
    initialise_shards(decoder, SEED)
    lanes = layout.lanes(layout.dp_rank(dist.get_rank()), BATCH, None)
    reduction = Reduction(decoder, meshes, 3)
    loss = accumulate_gradients(decoder, micro_batches(dataset, lanes, 1), reduction).loss
    gradients = {name: full(weight.grad) for name, weight in decoder.named_parameters()}
    return loss, gradients, write_greedily(decoder, PROMPTS, 7, [5], width=28)


PROMPTS = [np.array([1, 2, 3]), np.array([4]), np.arange(10, 30)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_equals_one_process(pool: Pool, dialogues: Dataset, layout: Layout) -> None:
    """Prime-rl 1957, TRL 3021: the mean over all answer tokens, whoever has them."""
    alone = Decoder(MODEL).double()
    initialise(alone, SEED)
    whole = micro_batches(dialogues, range(BATCH), BATCH)
    losses = accumulate_gradients(alone, whole)
    loss, gradients, written = pool.run(tuned, layout.world_size, dialogues, MODEL, layout)[0]
    assert loss == pytest.approx(losses.loss, rel=1e-10)
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-10, atol=1e-10)
    assert written == plainly(alone)


def plainly(decoder: Decoder) -> list[list[int]]:
    """A prompt at a time, all of its logits anew for every token."""
    decoder.eval()
    rows = []
    for prompt in PROMPTS:
        tokens, row = prompt.tolist(), list[int]()
        while len(row) < 7 and row[-1:] != [5]:
            row.append(int(decoder(torch.tensor([tokens + row]))[0, -1].argmax()))
        rows.append(row)
    return rows


def test_ranks_have_answers_of_other_lengths(dialogues: Dataset) -> None:
    """Or the test above would pass with means of means, too."""
    counts = [piece.n_targets for piece in micro_batches(dialogues, range(BATCH), 4)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("config", [MODELS["dense"], MODELS["dense"].but(position={"kind": "learned"}), MODEL])
def test_neighbours_of_a_row_do_not_see_each_other(dialogues: Dataset, config: ModelConfig) -> None:
    """TRL 1230, AReaL 1442, LlamaFactory 2289 and 7318: other tokens in a neighbour change nothing, in a dense model
    not a bit; and the row's loss is that of its dialogues alone, with learned positions, too.
    """
    decoder = Decoder(config.but(vocab_size=VOCAB + 3)).double().eval()
    initialise(decoder, SEED)
    (row,) = micro_batches(dialogues, [0], 1)
    stream = Stream(dialogues, "train", seq_len=SEQ_LEN, global_batch=BATCH, seed=SEED, lanes=[0])
    documents_T = stream.batch(0).documents_BT[0]
    assert int(documents_T.max()) >= 1, "a row of one dialogue shows nothing"
    with torch.no_grad():
        found = decoder(row.tokens_BT, row.positions_BT, row.documents)[0]
        changed_BT = torch.where(documents_T == 0, (row.tokens_BT + 7) % VOCAB, row.tokens_BT)
        other = decoder(changed_BT, row.positions_BT, row.documents)[0]
        # Experts compute other numbers of rows then, which may round otherwise.
        tolerance = 1e-12 if decoder.config.moe else 0
        mine = documents_T == 1
        torch.testing.assert_close(found[mine], other[mine], rtol=tolerance, atol=tolerance)
        packed = decoder.loss(row.tokens_BT, row.targets_BT, row.positions_BT, row.documents).cross_entropy
        alone = sum(
            decoder.loss(row.tokens_BT[:, documents_T == i], row.targets_BT[:, documents_T == i]).cross_entropy
            for i in range(int(documents_T.max()) + 1)
        )
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)


def test_what_was_asked_is_no_target(dialogues: Dataset) -> None:
    """OpenRLHF 294: where a prompt's own targets change, the loss does not."""
    for piece in micro_batches(dialogues, range(BATCH), BATCH):
        assert piece.n_targets == int((piece.targets_BT != -100).sum())
    stream = Stream(dialogues, "train", seq_len=SEQ_LEN, global_batch=BATCH, seed=SEED, lanes=range(BATCH))
    batch = stream.batch(0)
    trained = batch.targets_BT != -100
    following = torch.cat([batch.tokens_BT[:, 1:], torch.zeros(BATCH, 1, dtype=torch.int64)], 1)
    assert torch.equal(batch.targets_BT[trained], following[trained]), "a target is the token that follows"
