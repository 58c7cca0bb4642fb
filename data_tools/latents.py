"""encode-latents: the autoencoder's moments of every image, plain and mirrored, as a side folder of the images.

Shape legend: N images, V views, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.folder import PackedFolder, ShardFolder
from data_tools.parallel import SERIAL, Workers
from data_tools.shards import BadItem
from data_tools.side import ShardNotes, side_names, worker_device, write_side
from diffmoe_dist.data.encoding import model_sha256, reproducible_arithmetic, to_fp16
from diffmoe_dist.data.format import LATENT_FIELD
from diffmoe_dist.data.images import Crop, ImageError, crop_image, decode_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import VIEWS, Autoencoder, npy_bytes
from diffmoe_dist.errors import UserError

_INPUT_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class LatentSettings:
    """What decides the bytes of the latents, beside the images and the autoencoder's weights."""

    vae: Path
    image_size: int
    crop: Crop = "adm"
    flip: bool = True  # encode the mirror image too
    batch_size: int = 16
    device: str = "cpu"  # "cpu" or "cuda"
    parametrisation: str | None = None  # what is stored: mean_logvar or mean; None: what the autoencoder has

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS if self.flip else VIEWS[:1]


def encode_latents(
    base: ShardIndex,
    out: Path,
    settings: LatentSettings,
    *,
    max_bad: int = 100,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> PackedFolder:
    """Write `latents-000000.tar` ..., one for each shard of `base`, and the index. Run again, it goes on where it was.

    An image that cannot be encoded leaves its sample without a latent and is listed in the quarantine; training puts
    another sample in its place. On one kind of device the same arguments give the same bytes, whoever does the work.
    Raises UserError for images or an autoencoder that do not fit, and where more than `max_bad` images are bad.
    """
    if base.channels is None:
        raise UserError(f"BASE={base.folder}: holds no images; give the folder that pack made")
    _open_vae.cache_clear()  # the folder may hold another one since
    vae = _open_vae(settings.vae, "cpu" if workers.executor else settings.device, settings.parametrisation)
    _check(vae, settings)
    side = settings.image_size // vae.downsampling
    spec = {
        "parametrisation": vae.parametrisation,
        "channels": vae.latent_channels,
        "height": side,
        "width": side,
        "views": list(settings.views),
        "scale": list(vae.scale),
        "shift": list(vae.shift),
        "input_range": list(_INPUT_RANGE),
        "image_size": settings.image_size,
        "crop": settings.crop,
        "vae_sha256": model_sha256(settings.vae, "config.json", "*.safetensors"),
    }
    identity = {
        "command": "encode-latents",
        "base": base.fingerprint,
        "batch_size": settings.batch_size,
        "device": settings.device,
        **spec,
    }
    folder = ShardFolder(out, side_names("latents", base), identity)
    folder.claim()
    return write_side(
        folder, base, settings, _samples, {"latents": spec}, max_bad=max_bad, workers=workers, on_shard=on_shard
    )


def _check(vae: Autoencoder, settings: LatentSettings) -> None:
    if vae.image_channels not in (1, 3):
        raise UserError(f"--vae={settings.vae}: takes images of {vae.image_channels} channels; 1 or 3 are known")
    if settings.image_size < 1:
        raise UserError(f"--size={settings.image_size}: not a number of pixels; 256 and 512 are usual")
    if settings.image_size % vae.downsampling:
        raise UserError(
            f"--size={settings.image_size}: one latent pixel stands for {vae.downsampling} pixels; use a multiple"
        )
    if settings.batch_size < 1:
        raise UserError(f"--batch-size={settings.batch_size}: must be at least 1")


def _samples(
    base: ShardIndex, shard: int, settings: LatentSettings, notes: ShardNotes
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """No fields where the image is bad."""
    vae = _open_vae(settings.vae, settings.device, settings.parametrisation)
    ids = base.samples_of(shard)
    for start in range(0, len(ids), settings.batch_size):
        pixels: dict[int, np.ndarray] = {}
        together = ids[start : start + settings.batch_size]
        for sample_id in together:
            try:
                pixels[sample_id] = _pixels(base, sample_id, vae.image_channels, settings)
            except ImageError as error:
                key = base.key(sample_id)
                notes.bad.append(BadItem(key, f"{base.shards[shard].name}, key {key}", str(error)))
        moments = dict(zip(pixels, _encode(vae, list(pixels.values()), settings), strict=True))
        for sample_id in together:
            fields = {LATENT_FIELD: npy_bytes(moments[sample_id])} if sample_id in moments else {}
            yield base.key(sample_id), fields


def _pixels(base: ShardIndex, sample_id: int, channels: int, settings: LatentSettings) -> np.ndarray:
    """(C, H, W) uint8."""
    payload = next(iter(base.read(sample_id, base.image_fields).values()), None)
    if payload is None:
        raise ImageError("has no image")
    image = decode_image(payload, channels)
    if image.size != (settings.image_size, settings.image_size):
        image = crop_image(image, settings.image_size, settings.crop)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _encode(vae: Autoencoder, pixels: list[np.ndarray], settings: LatentSettings) -> np.ndarray:
    """(N, V, 2C or C, h, w) fp16."""
    if not pixels:
        return np.empty((0,), dtype=np.float16)
    images = torch.from_numpy(np.stack(pixels)).to(vae.module.device).float() / 127.5 - 1
    views: list[Tensor] = [images, images.flip(-1)] if settings.flip else [images]
    with reproducible_arithmetic():
        moments = torch.stack([vae.moments(view) for view in views], dim=1)
    return to_fp16(moments.cpu().numpy(), f"--vae={settings.vae}")


@lru_cache(maxsize=1)  # a process opens it once, not for every shard
def _open_vae(folder: Path, device: str, parametrisation: str | None) -> Autoencoder:
    return Autoencoder.open(folder, "--vae", worker_device(device), parametrisation)
