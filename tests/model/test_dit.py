from __future__ import annotations

import math
import re
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from diffmoe_dist.config import Config, ModelConfig, build_config
from diffmoe_dist.model.blocks import Attention, DiTBlock
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.embeddings import position_table, sinusoidal_embedding
from diffmoe_dist.model.mlp import Mlp
from diffmoe_dist.model.moe import Experts

SMALL = {"depth": 4, "hidden_size": 16, "num_heads": 2, "input_size": 8, "in_channels": 3, "num_classes": 10}
MOE = {"router": "global_pool", "num_experts": 4}

# What this project counts: all parameters and the frozen position table, in millions (DiffMoE Table 1, recounted).
TOTALS = {
    ("S", None): 32.96,
    ("B", None): 130.51,
    ("L", None): 458.10,
    ("XL", None): 675.13,
    ("S", 16): 140.27,
    ("B", 16): 559.22,
    ("L", 8): 1175.97,
    ("L", 16): 1981.96,
    ("XL", 16): 2924.99,
}


def make_config(moe: dict[str, object] | None = None, **model: object) -> Config:
    settings = {"model": {**SMALL, **model}, "moe": moe or {}, "run_dir": "unused", "data": {"shards": "unused"}}
    return build_config(settings)


def make_model(moe: dict[str, object] | None = None, seed: int = 0, **model: object) -> DiT:
    dit = DiT(make_config(moe, **model))
    initialize(dit, seed)
    return dit


def add_noise(model: DiT) -> DiT:
    """So that nothing is zero any more."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_inputs(images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(images, 3, 8, 8, generator=generator)
    return x, torch.rand(images, generator=generator), torch.randint(11, (images,), generator=generator)


@pytest.mark.parametrize(("size", "experts"), TOTALS, ids=str)
def test_the_parameter_totals_are_those_of_the_papers_models(size: str, experts: int | None) -> None:
    moe = {"router": "global_pool", "num_experts": experts} if experts else {}
    model = {"size": size, "learn_sigma": True}
    with torch.device("meta"):
        dit = DiT(build_config({"model": model, "moe": moe, "run_dir": "unused", "data": {"shards": "unused"}}))

    total = sum(parameter.numel() for parameter in dit.parameters()) + dit.pos_embed.numel()

    assert round(total / 1e6, 2) == TOTALS[size, experts]


def test_every_second_block_is_a_mixture_of_experts_beginning_with_the_second() -> None:
    names = set(make_model(MOE).state_dict())

    assert [f"blocks.{block}.mlp.experts.w1" in names for block in range(4)] == [False, True, False, True]
    assert [f"blocks.{block}.mlp.fc1.weight" in names for block in range(4)] == [True, False, True, False]


def test_parameters_have_the_names_and_shapes_of_the_published_weights() -> None:
    width, classes = 16, 10
    shapes = {
        "x_embedder.proj.weight": (width, 3, 2, 2),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (12, width),
        "final_layer.linear.bias": (12,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for block in range(2):
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.qkv.bias": (3 * width,),
            f"blocks.{block}.attn.proj.weight": (width, width),
            f"blocks.{block}.attn.proj.bias": (width,),
            f"blocks.{block}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{block}.mlp.fc1.bias": (4 * width,),
            f"blocks.{block}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{block}.mlp.fc2.bias": (width,),
            f"blocks.{block}.adaLN_modulation.1.weight": (6 * width, width),
            f"blocks.{block}.adaLN_modulation.1.bias": (6 * width,),
        }
    dit = make_model(depth=2)

    assert {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()} == shapes
    assert dit.pos_embed.shape == (1, 16, width)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_at_initialisation_the_prediction_is_exactly_zero(moe: dict[str, object] | None) -> None:
    output = make_model(moe, learn_sigma=True)(*make_inputs())

    assert output.prediction.shape == (3, 3, 8, 8) and not output.prediction.any()
    assert output.variance is not None and not output.variance.any()
    assert add_noise(make_model(moe))(*make_inputs()).prediction.any()


def test_at_initialisation_every_block_is_the_identity() -> None:
    x, condition = torch.randn(2, 16, 16), torch.randn(2, 16)

    for block in make_model(MOE).blocks:
        assert torch.equal(block(x, condition, torch.zeros(len(x), dtype=torch.bool))[0], x)


def test_unpatchify_inverts_the_cut_into_patches() -> None:
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    patches = [
        [images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0).flatten()]
        for n in range(2)
        for row in range(4)
        for column in range(4)
    ]
    patches_NTD = torch.stack([patch for (patch,) in patches]).view(2, 16, 12)  # pixel by pixel, channels last

    assert torch.equal(make_model()._unpatchify(patches_NTD), images)


def test_the_patch_embedding_and_unpatchify_agree_on_the_order_of_the_patches() -> None:
    model, (x, _, _) = make_model(), make_inputs()
    with torch.no_grad():  # the first 12 features are the pixels of the patch, channels last
        model.x_embedder.proj.weight.zero_()
        for feature in range(12):
            pixel, channel = divmod(feature, 3)
            model.x_embedder.proj.weight[feature, channel, pixel // 2, pixel % 2] = 1.0

        assert torch.equal(model._unpatchify(model.x_embedder(x)[..., :12]), x)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "global_pool"])
def test_the_residual_stream_lies_contiguous_in_memory_in_every_block(moe: dict[str, object] | None) -> None:
    model = make_model(moe)
    streams: list[Tensor] = []
    for layer in (*model.blocks, model.final_layer):
        layer.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))

    model(*make_inputs())

    assert len(streams) == len(model.blocks) + 1
    assert all(stream.is_contiguous() for stream in streams), [stream.stride() for stream in streams]


def test_the_learned_variance_is_the_second_half_of_the_channels() -> None:
    model = make_model(learn_sigma=True)
    with torch.no_grad():
        model.final_layer.linear.bias.copy_(torch.arange(6.0).repeat(4))  # each of the 4 pixels: 6 channels

    output = model(*make_inputs())

    for channel in range(3):
        assert (output.prediction[:, channel] == channel).all()
        assert output.variance is not None and (output.variance[:, channel] == 3 + channel).all()


def test_a_model_without_learned_variance_has_none() -> None:
    assert make_model()(*make_inputs()).variance is None


def test_an_expert_starts_with_the_same_values_on_whichever_device_it_is() -> None:
    whole = make_model(MOE, seed=3)
    for first in (0, 2):
        shard = DiT(make_config(MOE))
        for layer in shard.moe_layers:
            layer.experts = Experts(2, 16, 64)
            layer.experts.first = first
        initialize(shard, 3)

        held = dict(shard.named_parameters())
        for name, parameter in whole.named_parameters():
            expected = parameter[first : first + 2] if ".experts." in name else parameter
            assert torch.equal(held[name], expected), name


def test_initialisation_depends_on_the_seed_the_name_and_the_expert_and_on_nothing_else() -> None:
    model, deeper = make_model(MOE, seed=3), make_model(MOE, seed=3, depth=6, num_heads=4)
    torch.manual_seed(1)
    again, other = make_model(MOE, seed=3), make_model(MOE, seed=4)

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
        assert torch.equal(parameter, dict(deeper.named_parameters())[name]), name
        if parameter.any():
            assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
    assert not torch.equal(model.moe_layers[0].experts.w1, model.moe_layers[1].experts.w1)
    assert not torch.equal(model.moe_layers[0].experts.w1[0], model.moe_layers[0].experts.w1[1])
    first, second = (model.get_parameter(f"blocks.{block}.attn.qkv.weight") for block in (0, 1))
    assert not torch.equal(first, second)


def test_initialisation_follows_the_published_rules() -> None:
    model = make_model(MOE, hidden_size=64, seed=3)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    width, hidden = 64, 256

    def bound(fan_in: int, fan_out: int) -> float:
        return math.sqrt(6 / (fan_in + fan_out))

    uniform = {
        "x_embedder.proj.weight": bound(12, width),
        "blocks.attn.qkv.weight": bound(width, 3 * width),
        "blocks.attn.proj.weight": bound(width, width),
        "blocks.mlp.fc1.weight": bound(width, hidden),
        "blocks.mlp.fc2.weight": bound(hidden, width),
        "blocks.mlp.experts.w1": bound(width, hidden),
        "blocks.mlp.experts.w2": bound(hidden, width),
        "blocks.mlp.router.capacity_predictor.0.weight": bound(width, width),
        "blocks.mlp.router.capacity_predictor.2.weight": bound(width, 4),
    }
    normal = {
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
        "y_embedder.embedding_table.weight": 0.02,
        "blocks.mlp.router.gate_weight": 0.006,
    }
    for name, parameter in named.items():
        rule = re.sub(r"^blocks\.\d", "blocks", name)
        if rule in uniform:  # at least 256 numbers: the largest is within 3 % of the bound, almost surely
            assert 0.97 * uniform[rule] < parameter.abs().max() <= uniform[rule], name
        elif rule in normal:  # the deviation of 256 numbers is known to 4.4 %, one sigma
            assert parameter.std().item() == pytest.approx(normal[rule], rel=0.15), name
            assert parameter.mean().abs() < 4 * normal[rule] / math.sqrt(parameter.numel()), name
        else:
            assert not parameter.any(), name


def test_the_position_table_is_that_of_an_independent_loop() -> None:
    table = position_table(16, 3)

    assert table.shape == (1, 9, 16)
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            # Computed in fp64, stored in fp32.
            assert table[0, 3 * row + column].tolist() == pytest.approx(expected, abs=6e-8)


def test_a_model_has_its_position_table_and_adds_it() -> None:
    model = make_model()
    assert torch.equal(model.pos_embed, position_table(16, 4))

    add_noise(model)
    x = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        output = model(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64)).prediction
        model.pos_embed.zero_()
        without = model(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64)).prediction

    corner = without[:, :, :2, :2].repeat(1, 1, 4, 4)  # without places, equal patches have equal results
    assert torch.allclose(without, corner, atol=1e-5) and not torch.allclose(output, without, atol=1e-2)


def test_the_time_embedding_is_cosines_then_sines() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.0, 0.3, 700.0]), 8)

    for t, row in zip((0.0, 0.3, 700.0), embedding.tolist(), strict=True):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert row == pytest.approx(expected, abs=1e-4)  # an fp32 angle of 700 is known to 3e-5


def head_normed(values: Tensor, norm: nn.Module | None, kind: str) -> Tensor:
    """Row by row: queries or keys of one head."""
    if norm is None:
        return values
    weight, rows = dict(norm.named_parameters()), []
    for row in values:
        if kind == "layer":
            row = row - row.mean()
        row = row / torch.sqrt(row.square().mean() + (1e-5 if kind == "layer" else 1e-6)) * weight["weight"]
        rows.append(row + weight["bias"] if kind == "layer" else row)
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "width"), [("none", 4), ("none", 6), ("layer", 4), ("rms", 6)])
def test_attention_is_the_softmax_of_scaled_products_within_an_image(
    kind: Literal["none", "layer", "rms"], width: int
) -> None:
    model = ModelConfig(hidden_size=8, num_heads=2, head_dim=width, qk_norm=kind)
    attention, generator = Attention(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 5, 8, generator=generator)

    with torch.no_grad():
        output = attention(x)
        q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(2 * width, dim=2)
        for image in range(2):
            heads = []
            for head in (slice(0, width), slice(width, 2 * width)):
                queries = head_normed(q[image, :, head], attention.q_norm, kind)
                keys = head_normed(k[image, :, head], attention.k_norm, kind)
                scores = (queries @ keys.T / math.sqrt(width)).softmax(dim=1)
                heads.append(scores @ v[image, :, head])
            expected = torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias
            assert torch.allclose(output[image], expected, atol=1e-5)


def test_a_block_modulates_normalises_and_gates_as_adaln_zero_does() -> None:
    model = ModelConfig(hidden_size=8, num_heads=2, head_dim=4)
    block, generator = DiTBlock(model, Mlp(8, 32)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x, condition = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 8, generator=generator)

    def normalised(values: Tensor) -> Tensor:
        centred = values - values.mean(dim=2, keepdim=True)
        return centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()

    with torch.no_grad():
        output, routing = block(x, condition, torch.zeros(len(x), dtype=torch.bool))
        linear = block.adaLN_modulation[1]
        assert isinstance(linear, nn.Linear)
        six = (condition * condition.sigmoid()) @ linear.weight.T + linear.bias
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None] for part in six.split(8, dim=1))
        expected = x + gate_a * block.attn(normalised(x) * (1 + scale_a) + shift_a)
        expected = expected + gate_m * block.mlp(normalised(expected) * (1 + scale_m) + shift_m)

    assert routing is None
    assert torch.allclose(output, expected, atol=1e-5)


def test_time_and_label_reach_the_prediction_and_the_null_label_is_a_label() -> None:
    model, (x, t, _) = add_noise(make_model()), make_inputs()
    y = torch.tensor([0, 3, 10])

    with torch.no_grad():
        base = model(x, t, y).prediction
        assert not torch.allclose(base, model(x, t + 0.2, y).prediction)
        other = model(x, t, torch.tensor([0, 4, 9])).prediction
    changed = (base - other).flatten(1).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, True, True]


def test_losses_add_up_over_the_layers_and_statistics_are_layer_by_layer() -> None:
    model, (x, t, y) = add_noise(make_model(MOE)), make_inputs()
    seen = []
    for layer in model.moe_layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output[1]))

    output = model(x, t, y)

    assert len(seen) == len(output.routing) == 2 and set(output.losses) == {"capacity"}
    total = seen[0].losses["capacity"] + seen[1].losses["capacity"]
    assert output.losses["capacity"].item() == pytest.approx(total.item(), rel=1e-6)
    assert not torch.equal(seen[0].losses["capacity"], seen[1].losses["capacity"])
    assert all(stats is routing.stats for stats, routing in zip(output.routing, seen, strict=True))
    assert model.eval()(x, t, y).losses == {} and make_model()(x, t, y).losses == {}


def test_the_prediction_is_fp32_for_a_bf16_model() -> None:
    output = add_noise(make_model(MOE)).bfloat16()(*make_inputs())

    assert output.prediction.dtype == torch.float32 and output.prediction.any()
