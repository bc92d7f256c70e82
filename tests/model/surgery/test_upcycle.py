"""An upcycled model computes what the dense one did; experts are copies or slices plus noise, routers pick copies."""

import pytest
import torch
from torch import Tensor

from moray.model import Decoder, ModelConfig
from moray.model.surgery.upcycle import Upcycled, Upcycling, upcycled_config
from moray.model.tensors import tensor_shapes, whole

FFNS = {
    "swiglu": {},
    "geglu with biases": {"activation": "gelu", "bias": True},
    "relu": {"activation": "relu", "gated": False},
    "squared relu with biases": {"activation": "relu2", "gated": False, "bias": True},
    "tanh gelu": {"activation": "gelu_tanh", "gated": False, "bias": True},
}
OPTIONS = {
    "copies": Upcycling(4, 2),
    "one copy a token": Upcycling(4, 1),
    "slices": Upcycling(16, 8, granularity=4),
    "a slice of each copy shared": Upcycling(6, 3, shared=1, granularity=4),
    "half of each copy shared": Upcycling(4, 2, shared=1, granularity=2),
    "three slices shared": Upcycling(3, 2, shared=3, granularity=4),
    "a whole copy shared": Upcycling(4, 2, shared=1),
    "two whole copies shared": Upcycling(4, 2, shared=2),
    "slices and a whole copy shared": Upcycling(4, 2, shared=2, granularity=2),
}


def dense_config(**ffn: object) -> ModelConfig:
    return ModelConfig.preset(
        "demo-dense",
        n_layers=2,
        d_model=32,
        vocab_size=64,
        max_seq_len=64,
        attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        ffn={"width": 64, **ffn},
    )


def random_decoder(config: ModelConfig) -> Decoder:
    """In fp64, every weight and bias drawn."""
    decoder, generator = Decoder(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * 0.3 + (parameter.ndim == 1))
    return decoder.eval()


def upcycled(dense: Decoder, options: Upcycling) -> Decoder:
    state = dense.state_dict()
    source = Upcycled(dense.config, lambda name, box: state[name][box], options)
    decoder = Decoder(source.config).double().eval()
    tensors = {name: source.read(name, whole(shape)) for name, shape in tensor_shapes(source.config).items()}
    if source.config.tied_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    decoder.load_state_dict(tensors)
    return decoder


def experts_of(decoder: Decoder, name: str, layer: int = 0) -> Tensor:
    return decoder.state_dict()[f"blocks.{layer}.ffn.experts.{name}"]


@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_noise_it_computes_what_the_dense_model_did(ffn: dict[str, object], options: Upcycling) -> None:
    dense = random_decoder(dense_config(**ffn))
    moe = upcycled(dense, options)
    tokens_BT = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = dense(tokens_BT)
        torch.testing.assert_close(moe(tokens_BT), truth, rtol=1e-9, atol=1e-9)
    assert truth.std() > 0.5, "or anything would be close"
    assert moe.config.n_moe_layers == 2, "every layer has experts"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_router_picks_whole_copies(options: Upcycling) -> None:
    """Rows are equal within a copy and differ between copies: a token's K experts are K / r whole copies."""
    moe = upcycled(random_decoder(dense_config()), options)
    slices = options.routed_slices
    weight_ED = moe.state_dict()["blocks.0.ffn.router.linear.weight"]
    assert len(weight_ED.unique(dim=0)) == options.experts // slices
    chosen: list[Tensor] = []
    for block in moe.blocks:
        block.ffn.router.register_forward_hook(lambda module, inputs, routing: chosen.append(routing.chosen_BTK))
    with torch.no_grad():
        moe(torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(2)))
    assert len(chosen) == 2
    for chosen_BTK in chosen:
        copies_BTK = (chosen_BTK // slices).sort(-1).values.unflatten(-1, (-1, slices))
        assert (copies_BTK == copies_BTK[..., :1]).all()
        assert len(chosen_BTK.unique()) > options.top_k or options.top_k == options.experts, "tokens differ in choice"


def test_every_expert_is_its_slice_of_the_network() -> None:
    dense = random_decoder(dense_config(bias=True))
    moe = upcycled(dense, Upcycling(6, 3, shared=1, granularity=4))
    state, ffn = dense.state_dict(), "blocks.1.ffn."
    for expert in range(6):
        start = 16 * (1 + expert % 3)
        hidden = slice(start, start + 16)
        for projection in ("gate", "up"):
            assert torch.equal(
                experts_of(moe, f"{projection}_EFD", 1)[expert], state[f"{ffn}{projection}.weight"][hidden]
            )
            assert torch.equal(
                experts_of(moe, f"{projection}_bias_EF", 1)[expert], state[f"{ffn}{projection}.bias"][hidden]
            )
        # Gates of a copy's three experts are a third of what they are for a copy in one piece.
        assert torch.equal(experts_of(moe, "down_EDF", 1)[expert], 3 * state[f"{ffn}down.weight"][:, hidden])
        assert torch.equal(experts_of(moe, "down_bias_ED", 1)[expert], 3 * state[f"{ffn}down.bias"] / 4)


def test_noise_has_the_deviation_asked_for_relative_to_the_matrix_and_is_every_experts_own() -> None:
    dense = random_decoder(dense_config(bias=True))
    moe = upcycled(dense, Upcycling(4, 2, shared=1, noise=0.25))
    for projection, name in (("gate", "gate_EFD"), ("up", "up_EFD"), ("down", "down_EDF")):
        # Half of the output comes from the shared copy.
        matrix = dense.state_dict()[f"blocks.0.ffn.{projection}.weight"] * (0.5 if projection == "down" else 1)
        noise_Exx = experts_of(moe, name) - matrix
        for noise in noise_Exx:
            # 2048 draws: five standard errors of a deviation are 8 percent, of a mean 11.
            assert noise.std() / matrix.std() == pytest.approx(0.25, rel=0.08)
            assert abs(noise.mean() / matrix.std()) < 0.25 * 0.11
        correlation = torch.corrcoef(noise_Exx.flatten(1)) - torch.eye(4)
        assert correlation.abs().max() < 0.12
    assert torch.equal(experts_of(moe, "up_bias_EF")[3], dense.state_dict()["blocks.0.ffn.up.bias"])
    shared = moe.state_dict()["blocks.0.ffn.shared.up.weight"]
    assert torch.equal(shared, dense.state_dict()["blocks.0.ffn.up.weight"]), "shared experts are left as they were"


def test_noise_and_routers_are_a_function_of_the_seed() -> None:
    dense = random_decoder(dense_config())
    states = [upcycled(dense, Upcycling(4, 2, noise=0.1, seed=seed)).state_dict() for seed in (0, 0, 1)]
    for name in ("blocks.0.ffn.router.linear.weight", "blocks.1.ffn.experts.up_EFD"):
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])
        other_layer = (
            name.replace("blocks.0", "blocks.x").replace("blocks.1", "blocks.0").replace("blocks.x", "blocks.1")
        )
        assert not torch.equal(states[0][name], states[0][other_layer])


def test_any_part_of_a_tensor_is_that_part_of_the_whole() -> None:
    dense = random_decoder(dense_config(bias=True))
    state = dense.state_dict()
    source = Upcycled(dense.config, lambda name, box: state[name][box], Upcycling(6, 3, 1, noise=0.1, granularity=4))
    for name, shape in tensor_shapes(source.config).items():
        box = tuple(slice(size // 3, max(size - 1, 1)) for size in shape)
        assert torch.equal(source.read(name, box), source.read(name, whole(shape))[box]), name


def test_bf16_weights_are_read_as_fp32() -> None:
    dense = random_decoder(dense_config()).to(torch.bfloat16)
    state = dense.state_dict()
    source = Upcycled(dense.config, lambda name, box: state[name][box], Upcycling(4, 2))
    for name, shape in tensor_shapes(source.config).items():
        assert source.read(name, whole(shape)).dtype == torch.float32, name


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (ModelConfig.preset("demo-moe"), Upcycling(4, 2), "has 16 experts already; only a dense one"),
        (dense_config(conv_width=3), Upcycling(4, 2), r"model\.ffn\.conv_width=3: experts have nothing between"),
        (dense_config(adapter_rank=4), Upcycling(4, 2), r"model\.ffn\.adapter_rank=4"),
        (
            dense_config(),
            Upcycling(9, 3, granularity=3),
            r"granularity=3 must cut model\.ffn\.width=64 .* \[1, 2, 4, 8\]",
        ),
        (dense_config(width=60), Upcycling(4, 2), r"granularity=1 must cut model\.ffn\.width=60 .* can't be upcycled"),
        (dense_config(), Upcycling(8, 3, granularity=4), r"top_k=3 must be a multiple of 4, .* try 4"),
        (dense_config(), Upcycling(6, 4, granularity=4), r"experts=6 must be a multiple of 4, .* try 8"),
        (
            dense_config(),
            Upcycling(8, 4, 1, granularity=4),
            r"experts=8 must be a multiple of 3, .* shared=1; try 9",
        ),
        (
            dense_config(),
            Upcycling(8, 4, 3, granularity=2),
            r"shared=3 must be less than granularity=2 .* multiple of it",
        ),
        (dense_config(), Upcycling(4, 8), "top_k=8 must be at most experts=4"),
        (dense_config(), Upcycling(4, 0), "top_k=0 must be at least 1"),
        (dense_config(), Upcycling(4, 2, granularity=0), "granularity=0 must be at least 1"),
        (dense_config(), Upcycling(4, 2, noise=-0.1), r"noise=-0\.1 must be 0 or more"),
        (dense_config(), Upcycling(4, 2, noise=float("nan")), "noise=nan must be 0 or more"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(config: ModelConfig, options: Upcycling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycled_config(config, options)
