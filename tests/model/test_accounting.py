from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.model.accounting import PARTS, account, part_of
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT, initialize


def config(size: str, router: str, experts: int | None = None, **moe: Any) -> Config:
    """An ImageNet 256x256 model of the papers."""
    moe = {"router": router, **moe} | ({"num_experts": experts} if experts else {})
    return build_config(
        {"run_dir": "r", "data": {"shards": "s"}, "model": {"size": size, "learn_sigma": True}, "moe": moe}
    )


# DiffMoE Table 1 and 9, ProMoE Table 12, to the digits that the published code gives.
TOTALS = [
    ("S", "dense", None, 32.96), ("B", "dense", None, 130.51), ("L", "dense", None, 458.10),
    ("XL", "dense", None, 675.13),
    ("S", "global_pool", 16, 140.27), ("B", "global_pool", 16, 559.22), ("L", "global_pool", 2, 571.47),
    ("L", "global_pool", 4, 772.97), ("L", "global_pool", 8, 1175.97), ("L", "global_pool", 16, 1981.96),
    ("XL", "global_pool", 8, 1735.00), ("XL", "global_pool", 16, 2924.99),
    ("L", "token_choice", 8, 1163.27), ("L", "token_choice", 16, 1969.17),
    ("L", "expert_choice", 8, 1163.27), ("L", "expert_choice", 16, 1969.17),
    ("S", "prototype", 12, 75.54), ("B", "prototype", 12, 300.61), ("L", "prototype", 12, 1062.68),
    ("XL", "prototype", 12, 1567.73),
]  # fmt: skip


@pytest.mark.parametrize(("size", "router", "experts", "millions"), TOTALS)
def test_a_model_has_as_many_parameters_as_published(
    size: str, router: str, experts: int | None, millions: float
) -> None:
    assert round(account(config(size, router, experts)).total / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "experts", "millions"),
    [
        ("S", 16, 33.9), ("B", 16, 134.2), ("L", 2, 470.7), ("L", 4, 470.8), ("L", 8, 470.9), ("L", 16, 471.1),
        ("XL", 8, 694.0), ("XL", 16, 694.2),
    ],
)  # fmt: skip
def test_activated_parameters_are_all_that_a_token_passes_through(size: str, experts: int, millions: float) -> None:
    # 470.7456 M for L with 2 experts: half of the last digit either way.
    assert account(config(size, "global_pool", experts)).activated(1.0) / 1e6 == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize(
    ("size", "top_k", "millions"), [("S", 1, 32.99), ("B", 1, 130.57), ("L", 1, 458.26), ("XL", 1, 675.34)]
)
def test_promoe_activates_the_shared_and_top_k_other_experts(size: str, top_k: int, millions: float) -> None:
    assert round(account(config(size, "prototype", 12, top_k=top_k)).activated() / 1e6, 2) == millions
    # E14A3S1U1: two more experts of half width in each of the 12 mixture layers.
    assert round(account(config("L", "prototype", 12, top_k=3)).activated() / 1e6, 1) == 559.0


def test_the_papers_formula_hides_most_of_the_capacity_predictor() -> None:
    counts = account(config("L", "global_pool", 16))
    eq40 = counts.activated_eq40(0.95)
    assert eq40 is not None and round(eq40 / 1e6, 1) == 454.6
    assert round(counts.activated(0.95) / 1e6, 1) == 466.1
    assert counts.parameters["capacity predictor"] / 1e6 == pytest.approx(12.79, abs=0.005)


def test_the_papers_formula_knows_no_shared_experts() -> None:
    assert account(config("S", "prototype", 12)).activated_eq40() is None
    assert account(config("S", "token_choice", 4, shared_experts=1)).activated_eq40() is None
    dense = account(config("S", "dense"))
    assert dense.activated_eq40() == dense.activated() == dense.total


@pytest.mark.parametrize(
    ("size", "router", "experts", "giga"),
    [
        ("L", "dense", None, 77.48), ("L", "token_choice", 16, 77.53), ("L", "expert_choice", 16, 77.53),
        ("L", "global_pool", 8, 80.75), ("L", "global_pool", 16, 80.80), ("L", "prototype", 12, 77.51),
        ("XL", "dense", None, 114.39),
    ],
)  # fmt: skip
def test_linear_multiply_accumulates_are_the_published_ones(
    size: str, router: str, experts: int | None, giga: float
) -> None:
    assert round(sum(account(config(size, router, experts)).macs().values()) / 1e9, 2) == giga


def test_multiply_accumulates_of_xl_with_16_experts() -> None:
    assert sum(account(config("XL", "global_pool", 16)).macs().values()) / 1e9 == pytest.approx(119.2, abs=0.1)


def test_arithmetic_grows_with_the_experts_visited_only() -> None:
    counts = account(config("L", "global_pool", 16))
    one, two = counts.macs(1.0), counts.macs(2.0)
    assert two.pop("routed experts") == 2 * one.pop("routed experts")
    assert one == two
    assert counts.attention_macs == 24 * 2 * 256 * 256 * 1024


SMALL = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "in_channels": 1, "num_classes": 10}


TEXT = {
    **SMALL, "condition": "text", "num_classes": 0, "text_hidden_size": 24, "text_max_length": 10,
    "text_pooled_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("shape", [SMALL, TEXT], ids=["class", "text"])
@pytest.mark.parametrize(
    "moe",
    [
        {"router": "dense"},
        {"router": "global_pool", "num_experts": 4},
        {"router": "token_choice", "num_experts": 4, "activation": "swiglu", "shared_experts": 2, "top_k": 2},
        {"router": "expert_choice", "num_experts": 4, "capacity_predictor": True},
        {"router": "prototype", "num_experts": 4, "top_k": 2, "expert_mlp_ratio": 2.0},
    ],
    ids=lambda moe: moe["router"],
)
def test_multiply_accumulates_are_what_torch_counts_in_a_forward_pass(
    moe: dict[str, Any], shape: dict[str, Any]
) -> None:
    settings = build_config({"model": shape, "moe": moe}, training=False)
    model = DiT(settings).eval()  # which leaves the losses' arithmetic out
    initialize(model, 0)
    images = 8
    # The counter knows neither grouped products nor the one operation that attention is on a CPU.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})
    condition: Condition = torch.tensor([0, 10] * (images // 2))  # 10: the null label
    if shape is TEXT:
        null = torch.tensor([False, True] * (images // 2))
        condition = TextCondition(
            torch.randn(images, 10, 24), torch.ones(images, 10).bool(), torch.randn(images, 16), null
        )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        output = model(torch.randn(images, 1, 8, 8), torch.rand(images), condition)
    counts = account(settings)
    capacity = sum(float(stats.capacity) for stats in output.routing)  # of the only layer that has experts, if any
    # Two operations a multiply-accumulate.
    expected = 2 * images * (sum(counts.macs(capacity).values()) + counts.attention_macs)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def _grouped_flops(x: torch.Size, w: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * w[2]


def test_every_parameter_belongs_to_a_part() -> None:
    assert part_of("blocks.3.mlp.router.capacity_predictor.0.weight") == "capacity predictor"
    assert part_of("t_embedder.mlp.0.weight") == "embedders", "not a dense MLP"
    assert part_of("final_layer.adaLN_modulation.1.weight") == "final layer"
    assert set(account(config("S", "prototype", 12)).parameters) == set(PARTS)
    with pytest.raises(AssertionError, match="belongs to no part"):
        part_of("blocks.0.new_thing.weight")
