"""Samplers, guidance and objectives on the simulated device: their waits and copies in four steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config import build_config
from diffmoe_dist.diffusion.objectives import Objective, build_objective
from diffmoe_dist.diffusion.samplers import ADAPTIVE, SAMPLERS, Guidance, Prediction, filled_in, sample, with_guidance
from tests.accelerator.simulator import Log, on_device, simulate

IMAGES, STEPS = 2, 4
GUIDED = {"flow": Guidance(2.0, interval=(0.2, 0.8)), "ddpm": Guidance(2.0, 3, interval=(100, 800))}
# In four steps: waits, waits with guidance in an interval, copies from the host. The adaptive sampler reads its error.
WAITS = {
    "euler": (0, 0, 0),
    "heun": (0, 0, 0),
    "sde": (0, 0, 3),  # its noise too
    "ddpm": (0, 0, 3),  # its noise, which generators on the host make for each image
    "ddim": (0, 0, 0),
    "dpm-solver++": (0, 0, 0),
}


def objective_of(kind: str) -> Objective:
    settings = {"model": {"size": "S", "learn_sigma": kind == "ddpm"}, "objective": {"name": kind}}
    return build_objective(build_config(settings, training=False))


@torch.no_grad()
def run(name: str, guidance: Guidance) -> Log:
    objective = objective_of(SAMPLERS[name])

    def denoise(z: Tensor, t: Tensor, y: None) -> Prediction:
        prediction = z * 0.1 + objective.model_time(filled_in(t, z.device))[:, None, None, None] * 1e-4
        return prediction, torch.zeros_like(z) if SAMPLERS[name] == "ddpm" else None

    noise = on_device(torch.randn(IMAGES, 4, 8, 8))
    generators = [torch.Generator().manual_seed(image) for image in range(IMAGES)]
    with simulate() as log:
        denoiser = with_guidance(denoise, None, None, lambda: None, guidance)
        sample(name, denoiser, noise, objective, None if name in ADAPTIVE else STEPS, generators)
    return log


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_nothing_that_cuda_refuses(name: str) -> None:
    log, guided = run(name, Guidance()), run(name, GUIDED[SAMPLERS[name]])
    assert log.faults == guided.faults == []


@pytest.mark.parametrize("name", WAITS)
def test_a_sampler_waits_and_copies_as_often_as_the_table_says(name: str) -> None:
    log, guided = run(name, Guidance()), run(name, GUIDED[SAMPLERS[name]])
    assert (len(log.waits), len(guided.waits), len(log.copies)) == WAITS[name], f"{log}\nguided: {guided.waits}"


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_an_objective_keeps_to_the_device_from_its_second_step_on(kind: str) -> None:
    objective = objective_of(kind)
    step(objective)
    log = step(objective)
    assert log.faults == log.waits == log.copies == []


def step(objective: Objective) -> Log:
    def images() -> Tensor:
        return on_device(torch.randn(IMAGES, 4, 8, 8))

    x, noise, uniform = images(), images(), on_device(torch.rand(IMAGES, dtype=torch.float64))
    prediction, variance = images().requires_grad_(), images().requires_grad_()
    with simulate() as log:
        t = objective.times(uniform)
        objective.corrupt(x, noise, t)
        losses = objective.losses(prediction, variance, x, noise, t)
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    return log
