"""Latents: reading stored moments, sampling a training latent from them, and the autoencoder they come from.

Shape legend: V views of an image (plain, mirrored), C latent channels, h x w latent pixels, N images, H x W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.data.encoding import load_in_fp32
from diffmoe_dist.data.format import LATENT_FIELD, MEAN, MEAN_LOGVAR, LatentSpec
from diffmoe_dist.data.images import ImageError
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.model_folder import check_model_folder
from diffmoe_dist.errors import UserError

FLIP_VIEW = "flip"
VIEWS = ("plain", FLIP_VIEW)
_LEAST_LOGVAR, _LARGEST_LOGVAR = np.float32(-30), np.float32(20)  # as diffusers' DiagonalGaussianDistribution
_DECODED_TOGETHER = 8


class LatentReader:
    """Samples training latents from the moments in a side folder. Raises UserError for a folder without latents."""

    def __init__(self, index: ShardIndex) -> None:
        if index.latents is None:
            command = "python -m data_tools encode-latents BASE OUT"
            raise UserError(f"{index.named}: holds no latents; make a folder with them: {command}")
        self.index, self.spec = index, index.latents
        spec = self.spec
        self._views = {view: number for number, view in enumerate(spec.views)}
        self._moments_shape = (len(spec.views), spec.planes, spec.height, spec.width)
        self._header = _npy_header(self._moments_shape)
        self._num_bytes = len(self._header) + 2 * int(np.prod(self._moments_shape))
        self._scale, self._shift = _per_channel(spec.scale), _per_channel(spec.shift)

    def read(self, sample_id: int, flip: bool, noise_Chw: np.ndarray, out_Chw: np.ndarray) -> None:
        """Sample the latent of an image, or of its mirror image, with the given standard normal noise; all fp32.

        Where only means are stored, they are the latent.

        Raises ImageError where the sample has none because its image was bad, CorruptShardError for damage.
        """
        moments = self.moments(sample_id)[self._views[FLIP_VIEW if flip else VIEWS[0]]].astype(np.float32)
        mean, logvar = moments[: self.spec.channels], moments[self.spec.channels :]
        if self.spec.parametrisation == MEAN:
            np.subtract(mean, self._shift, out=out_Chw)
            out_Chw *= self._scale
            return
        # z = mean + exp(logvar / 2) * eps; then what the model is trained on, (z - shift) * scale.
        np.maximum(logvar, _LEAST_LOGVAR, out=logvar)
        np.minimum(logvar, _LARGEST_LOGVAR, out=logvar)
        logvar *= np.float32(0.5)
        np.multiply(np.exp(logvar, out=logvar), noise_Chw, out=out_Chw)
        out_Chw += mean
        out_Chw -= self._shift
        out_Chw *= self._scale

    def moments(self, sample_id: int) -> np.ndarray:
        """(V, 2C or C, h, w) fp16, as stored. Raises ImageError where there is none, CorruptShardError for damage."""
        payload = self.index.read(sample_id, (LATENT_FIELD,)).get(LATENT_FIELD)
        if payload is None:
            raise ImageError("has no latent: its image did not decode when it was encoded")
        if len(payload) == self._num_bytes and payload.startswith(self._header):  # what encode-latents writes
            return np.frombuffer(payload, np.float16, offset=len(self._header)).reshape(self._moments_shape)
        moments = read_fp16(self.index, sample_id, LATENT_FIELD, payload)
        if moments.shape != self._moments_shape:
            problem = f"{LATENT_FIELD} has shape {moments.shape}, the index says {self._moments_shape}"
            raise self.index.corrupt(sample_id, problem)
        return moments


def read_fp16(index: ShardIndex, sample_id: int, field: str, payload: bytes) -> np.ndarray:
    """The array of an .npy payload, which must be fp16; unpickles nothing. Raises CorruptShardError where it is not."""
    try:
        array = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy fail in any way
        raise index.corrupt(sample_id, f"{field} is no .npy array ({error})") from error
    if array.dtype != np.float16:
        raise index.corrupt(sample_id, f"{field} holds {array.dtype}, not float16")
    return array


def variance_of(moments_VChw: np.ndarray, spec: LatentSpec) -> np.ndarray:
    """(V, C, h, w): that of the normal distribution which each latent is sampled from; zeros of means alone."""
    if spec.parametrisation == MEAN:
        return np.zeros_like(moments_VChw)
    return np.exp(np.clip(moments_VChw[:, spec.channels :], _LEAST_LOGVAR, _LARGEST_LOGVAR))


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the content of an .npy file, the same bytes every time."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _npy_header(shape: tuple[int, ...]) -> bytes:
    return npy_bytes(np.broadcast_to(np.float16(0), shape))[: -2 * int(np.prod(shape))]


def _per_channel(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None, None]


_DEFAULT = {"AutoencoderKL": MEAN_LOGVAR, "AutoencoderDC": MEAN}  # by diffusers' class, which config.json names


@dataclass(frozen=True)
class Autoencoder:
    """A diffusers AutoencoderKL or AutoencoderDC, and how its latents are scaled for a model: (z - shift) * scale."""

    module: Any
    scale: tuple[float, ...]  # (C,)
    shift: tuple[float, ...]  # (C,)
    parametrisation: str = MEAN_LOGVAR  # of `moments`

    @classmethod
    def open(
        cls, folder: str | Path, setting: str, device: torch.device | str, parametrisation: str | None = None
    ) -> Autoencoder:
        """Load the weights in fp32 from a local folder; `setting` is how the user named it.

        Args:
            parametrisation: what `moments` gives; None: all that the autoencoder has.

        Raises UserError for a folder that holds no such autoencoder with safetensors weights, and where log variances
        are asked of one that has none.
        """
        named = f"{setting}={folder}"
        kind = check_model_folder(
            Path(folder), named, "a diffusers AutoencoderKL or AutoencoderDC, such as the vae folder of a pipeline",
            _DEFAULT, entry="_class_name", files=(("diffusion_pytorch_model*.safetensors",),),
        )  # fmt: skip
        if parametrisation == MEAN_LOGVAR != _DEFAULT[kind]:
            raise UserError(f"--parametrisation={MEAN_LOGVAR}: {named} is {kind}, which has no variance; use {MEAN}")
        try:
            import diffusers

            architecture = getattr(diffusers, kind)
        except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
            raise UserError(f"{named}: diffusers does not import ({error}); install it again") from error
        module = load_in_fp32(architecture, folder, named, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        return cls(module.to(device), *_scaling(dict(module.config)), parametrisation or _DEFAULT[kind])

    @classmethod
    def of(cls, module: Any) -> Autoencoder:
        """One that is open already."""
        return cls(module, *_scaling(dict(module.config)), _DEFAULT.get(type(module).__name__, MEAN))

    @property
    def image_channels(self) -> int:
        return int(self.module.config.in_channels)

    @property
    def latent_channels(self) -> int:
        return int(self.module.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels to a latent pixel, along each side."""
        config = self.module.config
        blocks = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        return int(2 ** (len(blocks) - 1))

    @torch.no_grad()
    def moments(self, images_NCHW: Tensor) -> Tensor:
        """Of images in [-1, 1], unscaled: mean over log variance, (N, 2C, h, w), or the mean, (N, C, h, w)."""
        encoded = self.module.encode(images_NCHW)
        if "latent" in encoded:  # AutoencoderDC
            return encoded.latent
        return encoded.latent_dist.mean if self.parametrisation == MEAN else encoded.latent_dist.parameters

    @torch.no_grad()
    def sample(self, images_NCHW: Tensor, noise_NChw: Tensor) -> Tensor:
        """Latents (N, C, h, w) to train on, sampled with standard normal noise as `LatentReader` does stored ones."""
        device = self.module.device
        mean = self.moments(images_NCHW.to(device)).half().float()  # as they are stored
        scale, shift = (mean.new_tensor(values)[:, None, None] for values in (self.scale, self.shift))
        if self.parametrisation == MEAN:
            return (mean - shift) * scale
        mean, logvar = mean.chunk(2, dim=1)
        logvar = logvar.clamp(float(_LEAST_LOGVAR), float(_LARGEST_LOGVAR))
        return (mean + torch.exp(0.5 * logvar) * noise_NChw.to(device) - shift) * scale

    @torch.no_grad()
    def decode(self, latents_NChw: Tensor) -> Tensor:
        """Images (N, C, H, W), about [-1, 1], of scaled latents; a few at a time, for decoding needs much memory."""
        scale, shift = (latents_NChw.new_tensor(values)[:, None, None] for values in (self.scale, self.shift))
        z_NChw = (latents_NChw / scale + shift).to(self.module.dtype)
        return torch.cat([self.module.decode(z).sample.float() for z in z_NChw.split(_DECODED_TOGETHER)])


def _scaling(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale, shift), a number for each channel, as diffusers' pipelines use these entries."""
    channels = config["latent_channels"]
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return tuple(factor / std for std in config["latents_std"]), tuple(map(float, config["latents_mean"]))
    return (float(factor),) * channels, (float(config.get("shift_factor") or 0.0),) * channels


def same_scaling(autoencoder: Autoencoder, spec: LatentSpec) -> bool:
    """Whether latents of this kind are what the decoder takes."""
    return (autoencoder.scale, autoencoder.shift) == (spec.scale, spec.shift)
