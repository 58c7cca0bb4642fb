"""Layers and models on a CUDA device: what they compute there, and that the simulated device counts waits rightly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmoe_dist.launch import Launch
from diffmoe_dist.model.condition import Condition
from diffmoe_dist.model.condition import on_device as condition_on_device
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.moe import ExpertInput, Experts
from diffmoe_dist.model.precision import set_weight_type
from diffmoe_dist.parallel.topology import choose_device, set_deterministic
from tests.accelerator.cases import MOE, config, host_inputs, host_model, part_inputs, step_of_part
from tests.accelerator.test_table import ROWS
from tests.model.layers import gelu_expert

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
ON_ONE_DEVICE = [name for name in ROWS if ", " not in name]


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    set_deterministic(torch.device(device))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def train(model: DiT, x: Tensor, t: Tensor, y: Condition) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction and the gradients, on the host."""
    model.zero_grad()
    out = model(x, t, y)
    torch.stack([out.prediction.square().mean(), *out.losses.values()]).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return out.prediction.detach().cpu(), gradients


def inputs_on(device: str, captions: bool) -> tuple[Tensor, Tensor, Condition]:
    x, t, y = host_inputs(captions)
    return x.to(device), t.to(device), condition_on_device(y, torch.device(device))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("moe", "captions"), [*[(moe, False) for moe in MOE], ("global_pool", True)])
def test_a_model_predicts_and_learns_as_on_the_cpu_and_twice_with_the_same_bits(
    moe: str, captions: bool, device: str
) -> None:
    choose_device(device, Launch(0, 1, 0, "single"))  # without TF32
    settings = config(moe, captions)
    expected, expected_gradients = train(host_model(settings), *host_inputs(captions))
    model = host_model(settings).to(device)
    with deterministic(device):
        prediction, gradients = train(model, *inputs_on(device, captions))
        again, gradients_again = train(model, *inputs_on(device, captions))
    # fp32 sums in another order; a token whose experts nearly tie could choose another, which these do not.
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)
    assert torch.equal(prediction, again)
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 9, 0, 0], [4, 0, 5, 0], [1, 2, 3, 5], [64, 63, 65, 1]], ids=str)
def test_experts_of_any_numbers_of_rows_are_single_experts(
    counts: list[int], activation: str, dtype: torch.dtype, device: str
) -> None:
    experts = Experts(4, 64, 128, activation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    x = torch.randn(sum(counts), 64, generator=generator)
    gradient = torch.randn(sum(counts), 64, generator=generator)
    expected = torch.cat([single_expert(experts, expert, rows) for expert, rows in enumerate(x.split(counts))])
    expected.backward(gradient)
    expected_gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    experts.zero_grad()
    experts.to(device, dtype)
    x, gradient = x.to(device, dtype).requires_grad_(), gradient.to(device, dtype)
    y = experts(ExpertInput(x, torch.tensor(counts, device=device), None))
    y.backward(gradient)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]  # bf16 keeps 8 bits, and rounds on the way
    torch.testing.assert_close(y.detach().float().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)
    for name, parameter in experts.named_parameters():
        there = expected_gradients[name]
        assert parameter.grad is not None and there is not None
        scale = float(there.abs().max())
        torch.testing.assert_close(parameter.grad.float().cpu(), there, rtol=tolerance, atol=tolerance * scale)


def single_expert(experts: Experts, expert: int, x: Tensor) -> Tensor:
    if experts.activation == "gelu":
        return gelu_expert(experts, expert, x)
    gate, up = (x @ experts.w1[expert]).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up) @ experts.w2[expert]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["bf16", "bf16_mixed"])
@pytest.mark.parametrize("moe", ["dense", "global_pool", "token_choice", "prototype"])
def test_a_model_in_bf16_is_near_the_one_in_fp32(moe: str, precision: Any, device: str) -> None:
    settings = config(moe)
    expected, _ = train(host_model(settings), *host_inputs())
    model = host_model(replace(settings, precision=precision)).to(device)
    set_weight_type(model, precision)
    prediction, gradients = train(model, *inputs_on(device, captions=False))
    # Products are rounded at 2^-9, and some tokens choose another expert.
    difference = (prediction - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert difference < 0.1
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_ONE_DEVICE)
def test_a_layer_waits_for_the_device_as_often_as_on_the_simulated_one(name: str) -> None:
    moe = name.removesuffix(" MLP").removesuffix(" layer").removesuffix(" block")
    part = host_model(config(moe)).get_submodule("blocks.1" if name.endswith("block") else "blocks.1.mlp")
    set_weight_type(part.cuda(), "bf16")
    given, gradients = part_inputs(part, torch.bfloat16)
    there = [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in given]
    gradients = [tensor.cuda() for tensor in gradients]
    step_of_part(part, there, gradients)  # libraries start up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step_of_part(part, there, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
    # Where grouped_mm has no kernel of its own, ragged experts are computed in bf16 as in fp32.
    column = 3 if torch.cuda.get_device_capability()[0] in (9, 10) else 4
    assert len(waits) == int(ROWS[name][39:].split()[column]), [f"{w.filename}:{w.lineno}" for w in caught]


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_use_tf32_if_it_is_asked_for_and_only_then(tf32: bool) -> None:
    choose_device("cuda", Launch(0, 1, 0, "single"), tf32)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=generator)
    # As many images as cuDNN has a kernel in TF32 for.
    images, kernel = torch.randn(32, 64, 16, 16, generator=generator), torch.randn(64, 64, 2, 2, generator=generator)
    product = (a.cuda() @ b.cuda()).cpu() - (a.double() @ b.double())
    convolution = nn.functional.conv2d(images.cuda(), kernel.cuda(), stride=2).cpu() - nn.functional.conv2d(
        images.double(), kernel.double(), stride=2
    )
    choose_device("cuda", Launch(0, 1, 0, "single"))
    for error in (product, convolution):
        largest = float(error.abs().max())  # of sums of some hundred products of about 1
        assert largest > 1e-3 if tf32 else largest < 1e-3
