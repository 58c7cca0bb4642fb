"""The training objectives: what the model predicts from a noisy image, and the losses of its prediction.

An objective maps uniform numbers to training times, images and noise to the noisy images that the model sees, and the
model's prediction to named losses of each image. Training minimises the sum of the losses.

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmoe_dist.config import Config, ObjectiveConfig

DDPM_STEPS = 1000
# The linear schedule (DDPM, Ho et al. 2020, section 4), in the words of diffusers' schedulers
DDPM_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": DDPM_STEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
HALF_BIN = 1 / 255  # of 256 grey values over [-1, 1]


class RectifiedFlow:
    """Straight paths between data and noise; the target is their velocity dz/dt.

    With `data_at_one` (DiffMoE) z_t = t x + (1 - t) e and the target is x - e; with `noise_at_one` (ProMoE, SD3)
    z_t = (1 - t) x + t e and the target is e - x. The model is conditioned on `time_scale` * t.
    """

    loss_names = ("diffusion",)

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.data_time = 1.0 if config.direction == "data_at_one" else 0.0
        self.time_scale = config.time_scale

    def times(self, uniform: Tensor) -> Tensor:
        """(N,) uniform numbers in (0, 1), fp64, to (N,) training times, fp32, by the inverse CDF.

        Logit-normal and mode-weighted times are those of SD3 (Esser et al. 2024, section 3.1), of the time that this
        objective has. Then the noise is shifted.
        """
        config = self.config
        if config.time_distribution == "logit_normal":
            uniform = (config.logit_mean + config.logit_std * torch.special.ndtri(uniform)).sigmoid()
        elif config.time_distribution == "mode":
            uniform = uniform + config.mode_scale * ((math.pi / 2 * uniform).cos().square() - 1 + uniform)
        return self.shifted(uniform, config.time_shift).float()

    def noise_level(self, t: Tensor) -> Tensor:
        """(N,) from 0, the data, to 1, noise alone."""
        return (t - self.data_time).abs()

    def shifted(self, t: Tensor, shift: float) -> Tensor:
        """Times at which noise over data is `shift` times that of the times t: SD3, eq. 23, in either direction."""
        if shift == 1.0:
            return t
        data, noise = (t, shift * (1 - t)) if self.data_time == 1.0 else (1 - t, shift * t)
        return (data if self.data_time == 1.0 else noise) / (data + noise)

    def model_time(self, t: Tensor) -> Tensor:
        """What the model is conditioned on, (N,) fp32."""
        return self.time_scale * t

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy images at times t, (N, C, H, W)."""
        data_weight = (t if self.data_time == 1.0 else 1 - t)[:, None, None, None]
        return data_weight * x + (1 - data_weight) * noise

    def target(self, x: Tensor, noise: Tensor) -> Tensor:
        """The velocity dz/dt, (N, C, H, W)."""
        return x - noise if self.data_time == 1.0 else noise - x

    def losses(
        self, prediction: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Mean squared error of each image, (N,). The published models' variance channels are not trained."""
        return {"diffusion": _image_mean((prediction - self.target(x, noise)).square())}


class DDPM:
    """A chain of 1000 noising steps; the target is the noise, and the variance of a step back may be learned.

    z_t = sqrt(abar_t) x + sqrt(1 - abar_t) e with abar_t the product of 1 - beta_0 ... 1 - beta_t, so that t = 0 is the
    least noise (DDPM, Ho et al. 2020, counts it as 1). The model is conditioned on t itself.

    Two losses (IDDPM, Nichol and Dhariwal 2021, eq. 16, as in DiT): the squared error of the noise, and one step's term
    of the variational bound, which trains the variance alone. With 1000 steps the term of a random step is 0.001 times
    an estimate of the whole bound, which is the paper's weight. Without a learned variance the first is the only one.
    `min_snr_gamma` weights it by min(SNR, gamma) / SNR (Hang et al. 2023, eq. 8, for predicted noise).
    """

    def __init__(self, learned_variance: bool = True, min_snr_gamma: float | None = None) -> None:
        self.learned_variance, self.min_snr_gamma = learned_variance, min_snr_gamma
        self.loss_names = ("diffusion", "variational") if learned_variance else ("diffusion",)
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # takes seconds to import

        beta = DDPMScheduler(**DDPM_SCHEDULE).betas.double()
        alpha_bar = (1 - beta).cumprod(dim=0)
        alpha_bar_before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        # DDPM eq. 7
        posterior_variance = (1 - alpha_bar_before) / (1 - alpha_bar) * beta
        posterior_variance[0] = posterior_variance[1]  # zero, which has no logarithm; as published
        # DDPM eq. 11: the mean of the step back changes by this factor times the predicted noise
        mean_per_noise = beta / ((1 - beta) * (1 - alpha_bar)).sqrt()
        self.table = torch.stack(
            [alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), mean_per_noise, posterior_variance.log(), beta.log()]
        )

    def times(self, uniform: Tensor) -> Tensor:
        """(N,) uniform numbers in (0, 1), fp64, to (N,) training times 0..999, int64."""
        return (uniform * DDPM_STEPS).long()

    def noise_level(self, t: Tensor) -> Tensor:
        """(N,) from 0, the data, to 1, noise alone: the part of the steps."""
        return t / (DDPM_STEPS - 1)

    def model_time(self, t: Tensor) -> Tensor:
        """What the model is conditioned on, (N,) fp32."""
        return t.float()

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy images at times t, (N, C, H, W)."""
        step = self._at(t, x.dtype)
        return step.data_weight * x + step.noise_weight * noise

    def losses(
        self, prediction: Tensor, variance: Tensor | None, x: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Of each image, (N,): mean squared error of the noise, and the step's term of the bound in bits a dimension.

        The term is KL(true step back || the model's) or, at t = 0, the negative log likelihood (NLL) of the image under
        the model's last step. It trains `variance` alone: the prediction is detached.
        """
        step = self._at(t, x.dtype)
        diffusion = _image_mean((prediction - noise).square())
        if self.min_snr_gamma is not None:
            ratio = (step.data_weight / step.noise_weight).square().flatten()
            diffusion = diffusion * (self.min_snr_gamma / ratio).clamp(max=1)
        if not self.learned_variance:
            return {"diffusion": diffusion}
        assert variance is not None, "of a model with model.learn_sigma"
        # IDDPM eq. 15
        fraction = (variance + 1) / 2
        log_variance = fraction * step.log_beta + (1 - fraction) * step.log_posterior_variance
        # The true mean minus the model's; at t = 0 the true one is the image itself.
        distance = step.mean_per_noise * (prediction.detach() - noise)
        kl = _gaussian_kl(distance, step.log_posterior_variance, log_variance)
        nll = _discretized_nll(x, distance, log_variance)
        nats = torch.where((t == 0)[:, None, None, None], nll, kl)
        return {"diffusion": diffusion, "variational": _image_mean(nats) / math.log(2)}

    def _at(self, t: Tensor, dtype: torch.dtype) -> _StepValues:
        self.table = self.table.to(t.device)
        return _StepValues(*self.table[:, t].to(dtype)[..., None, None, None])


class _StepValues(NamedTuple):
    """What the schedule has for the times of a batch, each (N, 1, 1, 1)."""

    data_weight: Tensor
    noise_weight: Tensor
    mean_per_noise: Tensor
    log_posterior_variance: Tensor
    log_beta: Tensor


Objective = RectifiedFlow | DDPM


def build_objective(config: Config) -> Objective:
    if config.objective.name == "ddpm":
        return DDPM(config.model.learn_sigma, config.objective.min_snr_gamma)
    return RectifiedFlow(config.objective)


def _gaussian_kl(distance: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) in nats of Gaussians whose means are `distance` apart."""
    ratio = (log_variance_q - log_variance_p).exp()
    return 0.5 * (log_variance_p - log_variance_q - 1 + ratio + distance.square() * (-log_variance_p).exp())


def _discretized_nll(x: Tensor, distance: Tensor, log_variance: Tensor) -> Tensor:
    """NLL in nats of the bin of x under a Gaussian whose mean is x - `distance` (DDPM eq. 13).

    The bins are those of 8-bit images, the outermost open. The published code takes the same bins for latents, which
    are no 8-bit numbers, and so does this: there they are a resolution, and the value is no likelihood. The published
    code approximates the normal CDF, this computes it.
    """
    precision = (-0.5 * log_variance).exp()
    below_upper_edge = _normal_cdf((HALF_BIN + distance) * precision)
    above_lower_edge = _normal_cdf((HALF_BIN - distance) * precision)
    # By symmetry the bin is taken below the mean: there the CDF is small, and the difference loses no digits.
    far = distance.abs()
    inside = _normal_cdf((HALF_BIN - far) * precision) - _normal_cdf((-HALF_BIN - far) * precision)
    mass = torch.where(x < -0.999, below_upper_edge, torch.where(x > 0.999, above_lower_edge, inside))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The CDF of the standard normal. torch.special.ndtr computes small values as 1 plus nearly -1 and loses them."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _image_mean(values: Tensor) -> Tensor:
    """(N, C, H, W) to (N,)."""
    return values.flatten(1).mean(dim=1)
