"""precision=bf16_mixed: autocast over fp32 weights, with routers, norms, sums and the residual stream in fp32."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, DiTOutput, initialize
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.precision import check_device
from diffmoe_dist.model.routing import Routing
from diffmoe_dist.sampling.routing_trace import overlap_of_rules
from tests.engine.runs import tiny_config

SHAPE = {"model": {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 16}}
ROUTERS: dict[str, dict[str, Any]] = {
    "dense": {"moe": {"router": "dense", "num_experts": None}},
    "global pool": {},
    "expert choice": {"moe": {"router": "expert_choice"}},
    "token choice": {"moe": {"router": "token_choice", "activation": "swiglu", "shared_experts": 1}},
    "prototype": {"moe": {"router": "prototype"}},
}


def build(precision: str, router: str = "global pool") -> DiT:
    """A model whose blocks and output do something; the same weights in every precision."""
    config = tiny_config(Path("unused"), Path("unused"), ROUTERS[router], SHAPE, {"precision": precision})
    model = DiT(config)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model.bfloat16() if precision == "bf16" else model


def compute(model: nn.Module) -> DiTOutput:
    generator = torch.Generator().manual_seed(2)
    images, times = torch.randn(8, 1, 16, 16, generator=generator), torch.rand(8, generator=generator) * 1000
    output: DiTOutput = model(images, times, torch.arange(8) + 3)  # 10 is the null label
    return output


def loss_of(output: DiTOutput) -> Tensor:
    return output.prediction.square().mean() + sum(output.losses.values(), torch.zeros(()))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())


def outputs_by_module(model: DiT) -> dict[str, list[Any]]:
    """What each kind of module takes and gives in a forward pass."""
    seen: dict[str, list[Any]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(type(module).__name__, []).append((inputs, output))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    compute(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("router", ROUTERS)
def test_the_residual_stream_and_the_norms_are_in_fp32_and_products_in_bf16(router: str) -> None:
    seen = outputs_by_module(build("bf16_mixed", router))
    for (x, condition, *_), (output, _) in seen["DiTBlock"]:
        assert x.dtype == condition.dtype == output.dtype == torch.float32
    for (x,), output in seen["LayerNorm"]:
        assert x.dtype == output.dtype == torch.float32
    for name in ("Attention", "PatchEmbed", "TimestepEmbedder", "FinalLayer"):
        assert {output.dtype for _, output in seen[name]} == {torch.bfloat16}, name
    for _, output in seen.get("Experts", []):
        assert output.dtype == torch.bfloat16
    for _, (output, routing) in seen.get("MoELayer", []):
        assert output.dtype == routing.gate.dtype == torch.float32, "experts' results are added up in fp32"


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "dense"])
def test_a_router_decides_exactly_as_in_fp32_about_the_same_tokens(router: str) -> None:
    mixed, full = build("bf16_mixed", router), build("fp32", router)
    x_BSD = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(3))
    null = torch.tensor([False, True, False, False])

    def decide(model: DiT) -> Routing:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.mixed):
            _, routing = model.moe_layers[0](x_BSD, null)
        assert isinstance(routing, Routing)
        return routing

    got, expected = decide(mixed), decide(full)
    assert torch.equal(got.pool.chosen, expected.pool.chosen)
    assert torch.equal(got.gate, expected.gate)
    for name in ("contrastive", "balance"):
        if name in expected.losses:
            assert torch.equal(got.losses[name], expected.losses[name])
    if "capacity" in expected.losses:  # the predictor's first layer is a product of the model's width
        torch.testing.assert_close(got.losses["capacity"], expected.losses["capacity"], rtol=2e-3, atol=0)
        assert got.losses["capacity"] != expected.losses["capacity"]


class SlowLayer(MoELayer):
    """As the published layers: each expert on its own rows, and nothing but plain products under autocast."""

    def forward(self, x_BSD: Tensor, null_B: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        null_T = null_B.repeat_interleave(x_BSD.shape[1])
        with torch.autocast("cpu", enabled=False):
            routing = self.router(x_TD, null_T)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(len(self.experts.w1)):
            of_expert = routing.expert_index == expert
            rows = routing.token_index[of_expert]
            y_AD = _expert(self.experts, expert, x_TD[rows]) * routing.gate[of_expert][:, None]
            y_TD = y_TD.index_add(0, rows, y_AD)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.unconditional is not None:
            y_TD = y_TD + self.unconditional(x_TD) * null_T[:, None]
        return y_TD.view_as(x_BSD), routing


def _expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    if experts.b1 is None or experts.b2 is None:
        gate, up = F.linear(x, experts.w1[e].T).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, experts.w2[e].T)
    hidden = F.gelu(F.linear(x, experts.w1[e].T, experts.b1[e]), approximate="tanh")
    return F.linear(hidden, experts.w2[e].T, experts.b2[e])


@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_plain_autocast_over_the_fp32_model(router: str) -> None:
    fast, slow = build("bf16_mixed", router), build("fp32", router)
    for layer in slow.moe_layers:
        layer.__class__ = SlowLayer
        if isinstance(layer.router, PoolChoice):
            layer.router.mixed = True  # the predictor's first layer
    got = compute(fast)
    with torch.autocast("cpu", torch.bfloat16):
        expected = compute(slow)
    # Bit for bit where experts have slots; biases of grouped products are added after rounding: measured 1.2e-3, and
    # 3.7e-3 in the gradients.
    assert error(got.prediction, expected.prediction) < 1.5e-3
    loss_of(got).backward()
    loss_of(expected).backward()
    theirs = {name: parameter.grad for name, parameter in slow.named_parameters()}
    for name, parameter in fast.named_parameters():
        ours, reference = parameter.grad, theirs[name]
        if ours is None or reference is None:
            assert ours is None and reference is None, name
            continue
        assert ours.dtype == torch.float32
        assert error(ours, reference) < 6e-3 or float(reference.norm()) < 1e-5, name


@pytest.mark.parametrize("router", ROUTERS)
def test_its_error_is_about_half_of_a_bf16_models(router: str) -> None:
    full, mixed, half = (compute(build(name, router)).prediction for name in ("fp32", "bf16_mixed", "bf16"))
    # Measured 3.8e-3 to 5.0e-3 here, and 8.1e-3 to 1.0e-2.
    assert 1e-3 < error(mixed, full) < 6e-3
    assert error(mixed, full) < 0.6 * error(half, full)


def test_no_weight_is_rounded_and_no_autocast_is_left_behind() -> None:
    model = build("bf16_mixed")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    compute(model)
    assert not torch.is_autocast_enabled("cpu")


def test_the_rules_that_a_report_compares_decide_in_fp32_within_a_pass() -> None:
    mixed, full = build("bf16_mixed").eval(), build("fp32").eval()
    x_TD = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    null_T = torch.zeros(256, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        got = overlap_of_rules(full.moe_layers[0].router, x_TD, null_T)
    assert got == overlap_of_rules(full.moe_layers[0].router, x_TD, null_T)
    assert overlap_of_rules(mixed.moe_layers[0].router, x_TD, null_T) is not None


def test_a_gpu_without_bf16_is_refused_and_a_cpu_without_its_instructions_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(logging.getLogger("diffmoe_dist"), "propagate", True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device in (cuda, cpu):
        check_device(device, "fp32")
    assert not caplog.text
    for precision in ("bf16_mixed", "bf16"):
        with pytest.raises(UserError, match=f"precision={precision}: Tesla V100-SXM2-32GB has no bf16 arithmetic"):
            check_device(cuda, precision)
        check_device(cpu, precision)
        assert f"precision={precision}: this CPU has no bf16 instructions" in caplog.text
