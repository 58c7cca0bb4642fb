"""Images of a DDPM from a model: which sampler, and what an image depends on."""

from __future__ import annotations

import pytest
import torch

from diffmoe_dist.config import build_config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import ADAMS, Guidance
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import (
    UINT8_RULE,
    Generated,
    SamplerSettings,
    choose_sampler,
    choose_time_shift,
    generate,
    to_uint8,
)

CONFIG = {
    "run_dir": "r",
    "data": {"shards": "s"},
    "model": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "in_channels": 1, "num_classes": 10,
        "learn_sigma": True,
    },
    "moe": {"router": "global_pool", "num_experts": 4, "inference": "threshold"},
    "objective": {"name": "ddpm"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DiT:
    model = DiT(build_config(CONFIG))
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh model predicts zeros, whatever it sees
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


DIGITS = ClassLabels(list(range(10)), null_label=10)


def sample(model: DiT, numbers: list[int], seed: int = 0, sampler: str = "ddpm") -> Generated:
    objective = build_objective(build_config(CONFIG))
    return generate(model, objective, numbers, DIGITS, SamplerSettings(sampler, 10, Guidance(2.0), seed))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_an_image_is_a_function_of_the_seed_and_its_number(model: DiT, sampler: str) -> None:
    together = sample(model, [0, 1, 2, 3], sampler=sampler).images
    others = sample(model, [3, 11, 1], sampler=sampler).images
    other_seed = sample(model, [0, 1, 2, 3], seed=1, sampler=sampler).images

    assert together.shape == (4, 1, 8, 8) and together.isfinite().all()
    # Batches of another size round the matrix products differently.
    assert torch.allclose(others[0], together[3], rtol=1e-4, atol=1e-4)
    assert torch.allclose(others[2], together[1], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(other_seed, together, rtol=1e-3, atol=1e-3).all(dim=(1, 2, 3)).any()


def test_two_images_of_a_seed_take_different_noise_on_the_way(model: DiT) -> None:
    """The noise that ddpm adds, apart from the start: what remains after ddim, which begins at the same place."""
    added = sample(model, [0, 10]).images - sample(model, [0, 10], sampler="ddim").images

    assert (added[0] - added[1]).abs().mean() > 0.1


@pytest.mark.parametrize(("objective", "sampler"), [("flow", "euler"), ("ddpm", "ddpm")])
def test_without_a_name_the_sampler_is_that_of_the_objective(objective: str, sampler: str) -> None:
    assert choose_sampler(None, None, objective) == (sampler, 50)


@pytest.mark.parametrize(
    ("name", "steps", "objective", "message"),
    [
        ("euler", 50, "ddpm", r"--sampler euler is not for .* objective\.name=ddpm; choose ddpm or ddim or dpm"),
        ("ddpm", 50, "flow", r"--sampler ddpm is not for .* objective\.name=flow; choose euler"),
        (None, 1, "ddpm", r"--steps 1: --sampler ddpm takes 2 to 1000"),
        ("ddpm", 1001, "ddpm", r"--steps 1001: --sampler ddpm takes 2 to 1000"),
        ("ddim", 300, "ddpm", r"--steps 300: .* each n-th of the 1000 times, as published; .* 250 and 334"),
        ("ddim", 1, "ddpm", r"--steps 1: .* the nearest numbers of steps are 2 and 3"),
        ("ddim", 2000, "ddpm", r"--steps 2000: .* the nearest numbers of steps are 500 and 1000"),
        ("sde", 1, "flow", r"--steps 1: --sampler sde takes at least 2"),
        ("sde", 10, "ddpm", r"--sampler sde is not for a model with objective\.name=ddpm"),
        ("bosh3", 50, "flow", r"--steps 50 has no effect with --sampler bosh3"),
        ("dpm-solver++", 1000, "ddpm", r"--steps 1000: --sampler dpm-solver\+\+ takes 1 to 999"),
        ("dopri5", 50, "flow", r"--steps 50 has no effect with --sampler dopri5"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(name: str | None, steps: int, objective: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_sampler(name, steps, objective)


@pytest.mark.parametrize("of_run", ["objective", "sample"])
@pytest.mark.parametrize("sampler", ADAMS)
def test_the_adams_samplers_refuse_the_time_shift_of_a_run_but_not_one_of_1(sampler: str, of_run: str) -> None:
    config = build_config({**CONFIG, "objective": {"name": "flow"}}, {of_run: {"time_shift": 3.0}})
    with pytest.raises(UserError, match=rf"^sample\.time_shift=3: --sampler {sampler} .*; give --time-shift 1, or"):
        choose_time_shift(None, sampler, config)
    assert choose_time_shift(1.0, sampler, config) == 1.0
    assert choose_time_shift(None, "rk4", config) == 3.0


def test_eight_bit_pixels_follow_the_recorded_rule() -> None:
    values = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.9999, 1.0, 7.0]).view(1, 1, 1, 7)

    # By hand: -1 gives 0.5 and 1 gives 255.5, whose fractions are cut off.
    assert to_uint8(values).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert UINT8_RULE == "clamp(127.5 x + 128, 0, 255), fractions cut off"
