"""Checkpoints that know no ranks: saved by any number of them, loaded by any other, at any expert-parallel size.

DeepSpeed's own checkpoints lose stacked experts and do not change shape, so the state goes through
torch.distributed.checkpoint instead. Every tensor is stored flattened; each rank writes the intervals it owns and reads
the intervals it needs (`sharded_state`), without ever gathering a tensor.

    checkpoints/step-00000100/
        state.json     step, images seen, and what a resume is checked against
        config.yaml    the resolved settings
        .metadata, *.distcp
        SHA256SUMS     of all of them
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

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

from diffmoe_dist.config import CheckpointConfig, Config, load_config, model_settings, save_config
from diffmoe_dist.engine.run_folder import Claim
from diffmoe_dist.engine.sharded_state import EMA, Fragment, buffers, weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256, flush_directory, write_atomically, write_json
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import from_first_rank, on_first_rank

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
Spread = Callable[[DiT, Config], None]
_STEP_FOLDER = re.compile(r"step-(\d{8})")
SUMS = "SHA256SUMS"
_ROOM = 1.02  # of the tensors' bytes: names, metadata, what a file system keeps for itself


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must not change between a checkpoint and its resume."""

    step: int
    images_seen: int
    seed: int
    data_fingerprint: str
    pool_samples: int  # samples that compete in one token pool
    micro_steps: int  # forward passes of an optimizer step, each with pools of its own
    skipped: int = 0  # of the steps, those whose update was left out because something was not finite


class CheckpointError(Exception):
    """A checkpoint could not be written, for lack of space or the like; the ones before are as they were."""


def save_checkpoint(
    folder: Path,
    fragments: Sequence[Fragment],
    progress: Progress,
    config: Config,
    claim: Claim,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint to `folder`/step-N; collective. It is complete when its folder has that name.

    The newest `checkpoint.keep` complete checkpoints are left, and those of every `checkpoint.keep_every`-th step.

    Args:
        fragments: what this rank owns; over all ranks every element of every tensor once.
        claim: the right to publish it, asked on the first rank.
        group: all ranks, on gloo.

    Raises:
        CheckpointError: the disk is full or refuses; on every rank.
        UserError: another attempt has taken the run over; on every rank.
    """
    final = folder / f"step-{progress.step:08d}"
    unfinished = folder / f".unfinished-{final.name}"
    size = torch.tensor(sum(fragment.data.nbytes for fragment in fragments))
    dist.all_reduce(size, group=group)
    on_first_rank(lambda: _make_room(folder, unfinished, int(size), claim), group)
    writer = _Writer(unfinished)
    try:
        dcp.save({}, storage_writer=writer, planner=_SaveFragments(fragments), process_group=group)
    except dcp.CheckpointException as error:
        on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True), group)  # what it holds of a full disk
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise CheckpointError(f"checkpoint {final}: {cause.strerror} ({cause.filename or folder})") from None
        raise
    sums: list[dict[str, str]] | None = [{}] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(writer.sums, sums, group=group)
    on_first_rank(lambda: _publish(unfinished, final, progress, config, claim, sums or []), group)


def _make_room(folder: Path, unfinished: Path, size: int, claim: Claim) -> None:
    """Remove what runs that were killed have left, and see that there is space."""
    claim.check()
    try:
        for remains in (*folder.glob(".unfinished-*"), *folder.glob(".removing-*")):
            shutil.rmtree(remains)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        needed = size * _ROOM / 1e9
        if free < needed:
            raise CheckpointError(
                f"checkpoint folder {folder}: {free:.3g} GB are free, a checkpoint needs {needed:.3g} GB"
            )
        unfinished.mkdir()
    except OSError as error:
        raise CheckpointError(f"checkpoint folder {folder}: {error.strerror}") from None


def _publish(
    unfinished: Path, final: Path, progress: Progress, config: Config, claim: Claim, sums: list[dict[str, str]]
) -> None:
    try:
        _check_files(unfinished)
        save_config(config, unfinished / "config.yaml")
        write_json(unfinished / "state.json", asdict(progress))
        own = {name: file_sha256(unfinished / name) for name in (".metadata", "config.yaml", "state.json")}
        write_sums(unfinished, {name: value for part in (*sums, own) for name, value in part.items()})
        claim.check()
        if final.exists():  # torn by hand, or damaged, else the run would have started from it
            _remove(final)
        unfinished.rename(final)
        flush_directory(final.parent)
        for old in checkpoints_to_delete(complete_checkpoints(final.parent), config.checkpoint):
            _remove(old)
    except OSError as error:
        raise CheckpointError(f"checkpoint {final}: {error.strerror} ({error.filename})") from None


def checkpoints_to_delete(checkpoints: list[Path], settings: CheckpointConfig) -> list[Path]:
    """Those to remove of complete checkpoints, oldest first."""
    every = settings.keep_every
    return [old for old in checkpoints[: -settings.keep] if not every or _step_of(old) % every]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones do not count."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def newest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with newer ones.

    Collective where a process group exists: the ranks share the files out and read each of them once.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = complete_checkpoints(folder)
    if dist.is_initialized():
        found = from_first_rank(found)
    complaints: list[str] = []
    for checkpoint in reversed(found):
        damage = verify_checkpoint(checkpoint)
        if damage is None:
            return checkpoint, complaints
        complaints.append(f"checkpoint {checkpoint} is damaged ({damage})")
    if complaints:
        raise UserError(f"{complaints[0]}, and no other one is valid; remove {folder} to begin at step 0")
    return None, []


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, if something is; collective where a process group exists."""
    if not dist.is_initialized():
        return _damage(checkpoint, 0, 1)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _damage(checkpoint, dist.get_rank(), len(found)))
    return next((damage for damage in found if damage is not None), None)


def _damage(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with this rank's share of the files."""
    name = SUMS
    try:
        sums = read_sums(checkpoint)
        for needed in (".metadata", "config.yaml", "state.json"):
            if needed not in sums:
                return f"{SUMS} lacks {needed}"
        for name in sorted(sums)[rank::ranks]:
            if Path(name).name != name or file_sha256(checkpoint / name) != sums[name]:
                return f"{name} is not what was written: another SHA-256 than in {SUMS}"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    return None


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """SHA256SUMS, which `sha256sum --check` reads too."""
    write_atomically(folder / SUMS, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))


def read_sums(folder: Path) -> dict[str, str]:
    """File name to SHA-256. Raises OSError and ValueError."""
    lines = (folder / SUMS).read_text().splitlines()
    return {name: value for value, name in (line.split("  ", 1) for line in lines)}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


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
    saved = load_config(checkpoint / "config.yaml")
    refuse_other_model(config, saved, f"the checkpoint {checkpoint}", "another run_dir")


def refuse_other_model(config: Config, saved: Config, whose: str, otherwise: str) -> None:
    """Name the first setting that makes the model of `config` another one than the saved one."""
    settings = model_settings(saved)
    for key, value in model_settings(config).items():
        if settings[key] != value:
            raise UserError(
                f"{key}={value}, but {whose} is of another model with {key}={settings[key]}; "
                f"use that value or {otherwise}"
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
                what = str(cause).split(". ")[0]
                raise UserError(
                    f"checkpoint {checkpoint} holds more than tensors ({what}); do not use this folder"
                ) from None
            reason = f"{type(cause).__name__}: {cause}"
            raise UserError(f"checkpoint {checkpoint} is damaged ({reason}); remove that folder") from None
        raise


def read_checkpoint_model(
    checkpoint: Path,
    device: str | torch.device,
    kind: str = EMA,
    overrides: Sequence[str] = (),
    spread: Spread | None = None,
) -> tuple[DiT, Config]:
    """The model of a checkpoint in eval mode, and the settings it was trained with, `overrides` applied.

    Args:
        kind: EMA for the averaged weights, MASTER for the weights themselves, both fp32.
        spread: edits the model before it has any memory, to hold a share of the experts; collective then.

    Raises:
        UserError: it is damaged. Another one is not taken in its place: its images would be another step's.
    """
    damage = verify_checkpoint(checkpoint)
    if damage is not None:
        raise UserError(f"checkpoint {checkpoint} is damaged ({damage}); remove that folder, or give an older step-N")
    config = load_config(checkpoint / "config.yaml", overrides)
    with torch.device("meta"):
        model = DiT(config)
        if spread is not None:
            spread(model, config)
    model.to_empty(device="cpu")
    load_fragments(checkpoint, [*weights(model, kind), *buffers(model)])  # fills every tensor, the position table too
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
    """Also sums up what it has written."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch's writer closes its archive on a full disk, and complains of that alone
            raise (_os_error_behind(error) or error) from None
        files = Path(self.path).glob(f"{plan.storage_data.prefix}*")
        self.sums = {file.name: file_sha256(file) for file in files}
        return written

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch would put the path of this machine into the checkpoint


def _os_error_behind(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


class _MetadataUnpickler(pickle.Unpickler):
    """torch stores a checkpoint's metadata as a pickle; this reads its own data classes and nothing else."""

    _ALLOWED: ClassVar = {
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
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Enum:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"refused to load an attribute of {kind}")
    return kind[name]


class _SafeReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
