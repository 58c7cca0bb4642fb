"""Checkpoints that know no ranks: saved by any number of them, loaded by any other, at any expert-parallel size.

DeepSpeed's own checkpoints lose stacked experts and do not change shape, so the state goes through
torch.distributed.checkpoint instead. Every tensor is stored flattened; each rank writes the intervals it owns and reads
the intervals it needs (`sharded_state`), without ever gathering a tensor.

    checkpoints/step-00000100/
        state.json     step, images seen, and what a resume is checked against
        config.yaml    the resolved settings
        .metadata, *.distcp
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from diffmoe_dist.config import Config, load_config, model_settings, save_config
from diffmoe_dist.engine.sharded_state import EMA, Fragment, buffers, weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, initialize

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must not change between a checkpoint and its resume."""

    step: int
    images_seen: int
    seed: int
    data_fingerprint: str
    pool_samples: int  # samples that compete in one token pool
    micro_steps: int  # forward passes of an optimizer step, each with pools of its own


def save_checkpoint(
    folder: Path, fragments: Sequence[Fragment], progress: Progress, config: Config, is_first_rank: bool
) -> None:
    """Write a checkpoint to `folder`/step-N; collective. It is complete when its folder has that name.

    The newest `checkpoint.keep` complete checkpoints are left.

    Args:
        fragments: what this rank owns; over all ranks every element of every tensor once.
    """
    final = folder / f"step-{progress.step:08d}"
    unfinished = folder / f".unfinished-{final.name}"
    if is_first_rank:
        for remains in (*folder.glob(".unfinished-*"), *folder.glob(".removing-*")):  # of a run that was killed
            shutil.rmtree(remains)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dcp.save({}, storage_writer=_Writer(unfinished), planner=_SaveFragments(fragments))
    if is_first_rank:
        _check_files(unfinished)
        save_config(config, unfinished / "config.yaml")
        write_durably(unfinished / "state.json", json.dumps(asdict(progress), indent=2) + "\n")
        if final.exists():  # torn by hand or by a file system, else the run would have started from it
            _remove(final)
        unfinished.rename(final)
        _flush_directory(folder)
        for old in complete_checkpoints(folder)[: -config.checkpoint.keep]:
            _remove(old)
    dist.barrier()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones do not count."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def find_checkpoint(directory: str | Path) -> Path:
    """The checkpoint meant by a run folder (its newest) or a step folder.

    Raises:
        UserError: there is none.
    """
    directory = Path(directory)
    if (directory / "state.json").is_file():
        return directory
    found = complete_checkpoints(directory / "checkpoints")
    if not found:
        raise UserError(f"checkpoint {directory}: no complete checkpoint there; give a run folder or a step-N folder")
    return found[-1]


def read_progress(checkpoint: Path) -> Progress:
    try:
        return Progress(**json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: state.json is damaged ({error}); remove that folder") from None


def check_same_model(checkpoint: Path, config: Config) -> None:
    """Refuse a checkpoint of another model, naming the first setting that differs."""
    saved = model_settings(load_config(checkpoint / "config.yaml"))
    for key, value in model_settings(config).items():
        if saved[key] != value:
            raise UserError(
                f"{key}={value}, but the checkpoint {checkpoint} is of another model with {key}={saved[key]}; "
                "use that value or another run_dir"
            )


def check_same_run(checkpoint: Path, saved: Progress, now: Progress, allow_pool_change: bool) -> None:
    """Refuse a resume with another seed, other data or another token pool: it would be another run."""
    if saved.seed != now.seed:
        raise UserError(
            f"seed={now.seed}, but {checkpoint} was trained with seed={saved.seed}; use that or another run_dir"
        )
    if saved.data_fingerprint != now.data_fingerprint:
        raise UserError(
            f"data.shards holds other data (index {now.data_fingerprint[:12]}) than {checkpoint} was trained on "
            f"({saved.data_fingerprint[:12]}); use the same shards or another run_dir"
        )
    if saved.pool_samples != now.pool_samples and not allow_pool_change:
        raise UserError(
            f"one token pool of this launch has {now.pool_samples} samples, of {checkpoint} it had "
            f"{saved.pool_samples}; set train.micro_batch_size so that they agree, or checkpoint.allow_pool_change=true"
        )


def load_fragments(checkpoint: Path, fragments: Sequence[Fragment]) -> None:
    """Fill fragments in place from a checkpoint; collective where a process group exists.

    Raises:
        UserError: the checkpoint's files are missing or damaged, or its tensors are not these.
    """
    try:
        dcp.load(
            {},
            storage_reader=_SafeReader(checkpoint),
            planner=_LoadFragments(checkpoint, fragments),
            no_dist=not dist.is_initialized(),
        )
    except dcp.CheckpointException as error:
        for failure in error.failures.values():
            cause = failure[0]
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, pickle.UnpicklingError):
                raise UserError(
                    f"checkpoint {checkpoint}: .metadata is no checkpoint's ({cause}); do not use this folder"
                ) from None
            reason = f"{type(cause).__name__}: {cause}"
            raise UserError(f"checkpoint {checkpoint} is damaged ({reason}); remove that folder") from None
        raise


def load_ema_model(directory: str | Path, device: str | torch.device = "cpu") -> DiT:
    """The averaged model of a run, in eval mode on one device.

    Args:
        directory: a run folder (its newest checkpoint) or a step folder.
    """
    return read_ema_model(find_checkpoint(directory), device)[0]


def read_ema_model(
    checkpoint: Path,
    device: str | torch.device,
    overrides: Sequence[str] = (),
    spread: Callable[[DiT, Config], None] | None = None,
) -> tuple[DiT, Config]:
    """The averaged model of a checkpoint in eval mode, and the settings it was trained with, `overrides` applied.

    Args:
        spread: edits the model before it has any memory, to hold a share of the experts; collective then.
    """
    config = load_config(checkpoint / "config.yaml", overrides)
    with torch.device("meta"):
        model = DiT(config)
        if spread is not None:
            spread(model, config)
    model.to_empty(device="cpu")
    initialize(model, config.seed)  # the position table; everything else is overwritten
    load_fragments(checkpoint, [*weights(model, EMA), *buffers(model)])
    return model.to(device).eval().requires_grad_(False), config


class _SaveFragments(dcp.DefaultSavePlanner):
    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self.data = {(fragment.name, fragment.start): fragment for fragment in fragments}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(fragment) for fragment in self.data.values()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, self.metadata = dcp.default_planner.create_default_global_save_plan(all_plans)
        _check_coverage(self.metadata)
        return plans, self.metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.data[index.fqn, index.offset[0]].data


class _LoadFragments(dcp.DefaultLoadPlanner):
    def __init__(self, checkpoint: Path, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.fragments = {(fragment.name, fragment.start): fragment for fragment in fragments}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for fragment in self.fragments.values() for item in self._read_items(fragment)])

    def _read_items(self, fragment: Fragment) -> list[ReadItem]:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata.get(fragment.name)
        if not isinstance(stored, TensorStorageMetadata) or stored.size != torch.Size([fragment.total]):
            what = "nothing" if stored is None else f"{list(getattr(stored, 'size', []))} elements"
            raise UserError(
                f"checkpoint {self.checkpoint} is of another model: this one needs {fragment.total} elements of "
                f"{fragment.name}, it has {what}; use the settings it was trained with"
            )
        return create_read_items_for_chunk_list(fragment.name, stored, [_chunk(fragment)])

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        data = self.fragments[index.fqn, index.offset[0]].data
        return data.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])


def _chunk(fragment: Fragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([fragment.start]), sizes=torch.Size([fragment.data.numel()]))


def _write_item(fragment: Fragment) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(fragment.name, torch.Size([fragment.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(fragment),
            properties=TensorProperties.create_from_tensor(fragment.data),
            size=torch.Size([fragment.total]),
        ),
    )


def _check_coverage(metadata: Metadata) -> None:
    """Every element of every tensor is written once: what a silent loss of experts would break."""
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        end = 0
        for start, size in sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks):
            if start != end:
                raise RuntimeError(f"{name}: elements {end} to {start} are owned by no rank or by two")
            end = start + size
        if end != stored.size[0]:
            raise RuntimeError(f"{name}: elements {end} to {stored.size[0]} are owned by no rank")


def _check_files(unfinished: Path) -> None:
    """Every rank's file is here in its full length; ranks with a folder of their own would each have a part."""
    for info in _SafeReader(unfinished).read_metadata().storage_data.values():
        file = unfinished / info.relative_path
        if not file.is_file() or file.stat().st_size < info.offset + info.length:
            raise RuntimeError(
                f"{file} was written by no rank that shares this folder: run_dir must be on a shared disk"
            )


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint out of sight in one step, then delete it: a kill in between leaves none that looks whole."""
    hidden = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch would put the path of this machine into the checkpoint


class _MetadataUnpickler(pickle.Unpickler):
    """torch stores a checkpoint's metadata as a pickle; this reads its own data classes and nothing else."""

    _ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "strided"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


class _SafeReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write_durably(path: Path, text: str) -> None:
    """Write a file and see it on the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
