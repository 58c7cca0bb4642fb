"""Side folders: what a model makes of each sample of a folder, under the same keys; and on which device it does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data_tools.folder import PackedFolder, ShardFolder, ShardSlot
from data_tools.parallel import Workers
from data_tools.shards import BadItem, ShardRecord, write_shard
from diffmoe_dist.data.format import QUARANTINE_NAME
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch


@dataclass
class ShardNotes:
    """What comes up while a shard is encoded."""

    bad: list[BadItem] = field(default_factory=list)
    num_cut: int = 0  # captions that were too long


# From the base, the number of one of its shards and the settings: (key, fields) of each sample of the shard, in order.
EncodeSamples = Callable[[ShardIndex, int, Any, ShardNotes], Iterator[tuple[str, Mapping[str, bytes]]]]


@dataclass(frozen=True)
class _Job:
    slot: ShardSlot
    base: ShardIndex
    shard: int
    settings: Any
    encode: EncodeSamples


def side_names(kind: str, base: ShardIndex) -> list[str]:
    """The side folder's shards, one for each of `base`."""
    return [f"{kind}-{shard:06d}.tar" for shard in range(len(base.shards))]


def write_side(
    folder: ShardFolder,
    base: ShardIndex,
    settings: Any,
    encode: EncodeSamples,
    description: Mapping[str, Any],
    *,
    max_bad: int,
    workers: Workers,
    on_shard: Callable[[int], None],
) -> PackedFolder:
    """Encode each shard of `base`, unless an earlier run did, and close the side folder.

    Raises UserError where more than `max_bad` samples are bad.
    """
    jobs = [_Job(slot, base, shard, settings, encode) for shard, slot in enumerate(folder.slots)]
    num_bad = 0
    for record in workers.run(_write_shard, jobs):
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


def _write_shard(job: _Job) -> ShardRecord:
    record = job.slot.finished()
    if record is None:
        notes = ShardNotes()
        record = write_shard(job.slot.begin(), job.encode(job.base, job.shard, job.settings, notes))
        record = replace(record, bad=notes.bad, num_cut=notes.num_cut)
        job.slot.save(record)
    job.base.close()
    return record


def choose_encoder_device(device: str, num_workers: int) -> str:
    """`auto`, `cpu` or `cuda` to a kind of device. Raises UserError for a GPU that is not there or would be shared."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and num_workers == 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: this machine has no usable CUDA device; use --device=cpu")
    if device == "cuda" and num_workers > 1:
        raise UserError(f"--workers={num_workers}: processes would share one GPU; use mpirun with a rank for each GPU")
    return device


def worker_device(kind: str) -> torch.device:
    """The device of this process: of several GPUs on a node each MPI rank takes its own."""
    return torch.device("cpu" if kind == "cpu" else f"cuda:{detect_launch().local_rank % torch.cuda.device_count()}")
