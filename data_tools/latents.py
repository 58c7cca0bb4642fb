"""encode-latents: the autoencoder's moments of every image, plain and mirrored, as a side folder of the images.

Shape legend: N images, V views, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.folder import PackedFolder, ShardFolder, ShardSlot
from data_tools.parallel import SERIAL, Workers
from data_tools.shards import BadItem, ShardRecord, write_shard
from diffmoe_dist.data.encoding import model_sha256, reproducible_arithmetic, to_fp16
from diffmoe_dist.data.format import LATENT_FIELD, MEAN_LOGVAR, QUARANTINE_NAME
from diffmoe_dist.data.images import Crop, ImageError, crop_image, decode_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import VIEWS, Autoencoder, check_autoencoder, npy_bytes
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch

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

    @property
    def views(self) -> tuple[str, ...]:
        return VIEWS if self.flip else VIEWS[:1]


@dataclass(frozen=True)
class _Job:
    slot: ShardSlot
    base: ShardIndex
    shard: int
    settings: LatentSettings


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
    check_autoencoder(settings.vae, "--vae")
    vae = Autoencoder.open(settings.vae, "--vae", "cpu")
    _check(vae, settings)
    side = settings.image_size // vae.downsampling
    names = [f"latents-{shard:06d}.tar" for shard in range(len(base.shards))]
    spec = {
        "parametrisation": MEAN_LOGVAR,
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
    folder = ShardFolder(out, names, identity)
    folder.claim()
    jobs = [_Job(slot, base, shard, settings) for shard, slot in enumerate(folder.slots)]
    return write_side(folder, base, _encode_shard, jobs, {"latents": spec}, max_bad, workers, on_shard)


def write_side(
    folder: ShardFolder,
    base: ShardIndex,
    encode_shard: Callable[[Any], ShardRecord],
    jobs: Sequence[Any],
    description: Mapping[str, Any],
    max_bad: int,
    workers: Workers,
    on_shard: Callable[[int], None],
) -> PackedFolder:
    """Do a job for each shard of `base` and close the side folder, which has the keys of `base`."""
    num_bad = 0
    for record in workers.run(encode_shard, jobs):
        num_bad += len(record.bad)
        if num_bad > max_bad:
            folder.write_quarantine()
            last = record.bad[-1]
            raise UserError(
                f"--max-bad={max_bad}: {num_bad} bad samples so far, as {last.item} ({last.reason}); "
                f"see {folder.out / QUARANTINE_NAME}, and allow more or pack the good ones"
            )
        on_shard(record.shard.num_samples)
    written = folder.finish(
        {"base": {"fingerprint": base.fingerprint, "keys_sha256": base.meta.keys.sha256}, **description}
    )
    ShardIndex.open(folder.out).check_base(base)
    return written


def choose_device(device: str, num_workers: int) -> str:
    """`auto`, `cpu` or `cuda` to a kind of device. Raises UserError for a GPU that is not there or would be shared."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and num_workers == 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: this machine has no usable CUDA device; use --device=cpu")
    if device == "cuda" and num_workers > 1:
        raise UserError(
            f"--workers={num_workers}: processes would share one GPU; "
            "use mpirun with one rank more than there are GPUs, as the first rank hands out the work"
        )
    return device


def worker_device(kind: str) -> torch.device:
    """The device of this process: of several GPUs on a node each MPI rank takes its own."""
    return torch.device("cpu" if kind == "cpu" else f"cuda:{detect_launch().local_rank % torch.cuda.device_count()}")


def _check(vae: Autoencoder, settings: LatentSettings) -> None:
    if vae.image_channels not in (1, 3):
        raise UserError(f"--vae={settings.vae}: takes images of {vae.image_channels} channels; 1 or 3 are known")
    if settings.image_size < 1 or settings.image_size % vae.downsampling:
        raise UserError(
            f"--size={settings.image_size}: one latent pixel stands for {vae.downsampling} pixels; use a multiple"
        )
    if settings.batch_size < 1:
        raise UserError(f"--batch-size={settings.batch_size}: must be at least 1")


def _encode_shard(job: _Job) -> ShardRecord:
    """Write the latents of one shard, unless an earlier run did."""
    record = job.slot.finished()
    if record is None:
        bad: list[BadItem] = []
        record = write_shard(job.slot.begin(), _samples(job, bad))
        record = replace(record, bad=bad)
        job.slot.save(record)
    job.base.close()
    return record


def _samples(job: _Job, bad: list[BadItem]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """(key, fields) of every sample of the shard, in order; no fields where the image is bad."""
    base, settings = job.base, job.settings
    vae, device = _open_vae(settings.vae, settings.device)
    ids = base.samples_of(job.shard)
    for start in range(0, len(ids), settings.batch_size):
        pixels: dict[int, np.ndarray] = {}
        together = ids[start : start + settings.batch_size]
        for sample_id in together:
            try:
                pixels[sample_id] = _pixels(base, sample_id, vae.image_channels, settings)
            except ImageError as error:
                key = base.key(sample_id)
                bad.append(BadItem(key, f"{base.shards[job.shard].name}, key {key}", str(error)))
        moments = dict(zip(pixels, _encode(vae, list(pixels.values()), device, settings), strict=True))
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


def _encode(vae: Autoencoder, pixels: list[np.ndarray], device: torch.device, settings: LatentSettings) -> np.ndarray:
    """(N, V, 2C, h, w) fp16."""
    if not pixels:
        return np.empty((0,), dtype=np.float16)
    images = torch.from_numpy(np.stack(pixels)).to(device).float() / 127.5 - 1
    views: list[Tensor] = [images, images.flip(-1)] if settings.flip else [images]
    with reproducible_arithmetic():
        moments = torch.stack([vae.moments(view) for view in views], dim=1)
    return to_fp16(moments.cpu().numpy(), f"--vae={settings.vae}")


@lru_cache(maxsize=1)  # a process opens it once, not for every shard
def _open_vae(folder: Path, device: str) -> tuple[Autoencoder, torch.device]:
    own = worker_device(device)
    return Autoencoder.open(folder, "--vae", own), own
