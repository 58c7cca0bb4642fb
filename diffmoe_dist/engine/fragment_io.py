"""Fragments to files and back through torch.distributed.checkpoint; reading them cannot execute code.

A `Fragment` is an interval of a flattened tensor (`sharded_state`), and stored as that; a fragment of some columns of a
matrix is stored as rectangles. Each rank writes the fragments it owns and reads those it needs, in either form; those
that write and those that read may be different in number.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NoReturn

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

from diffmoe_dist.engine.sharded_state import Fragment
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from diffmoe_dist.parallel.slices import Columns

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def write_fragments(
    folder: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup | None = None
) -> dict[str, str]:
    """Write fragments into a folder, which exists; collective.

    Args:
        fragments: what this rank owns; over all ranks every element of every tensor once.
        group: all ranks, on gloo.

    Returns:
        The SHA-256 of each file that this rank has written, by name.

    Raises:
        CheckpointException: torch's; a rank could not write. On every rank, with the errors of all.
    """
    writer = _Writer(folder)
    dcp.save({}, storage_writer=writer, planner=_SaveFragments(fragments), process_group=group)
    return writer.sums


def load_fragments(checkpoint: Path, fragments: Sequence[Fragment]) -> None:
    """Fill fragments in place from a checkpoint; collective where a process group exists.

    Raises:
        UserError: the checkpoint's files are missing or damaged, or its tensors are not these.
    """
    planner = _LoadFragments(checkpoint, fragments)
    try:
        dcp.load({}, storage_reader=_SafeReader(checkpoint), planner=planner, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        for failure in error.failures.values():
            _refuse(checkpoint, failure[0])
        raise
    planner.cut_columns()


def check_stored(checkpoint: Path, fragments: Sequence[Fragment]) -> None:
    """Check that a checkpoint has the whole of each fragment's tensor; their data may be on the meta device.

    Raises:
        UserError: its tensors are not these, or its list of them is damaged.
    """
    try:
        metadata = read_metadata(checkpoint)
        for fragment in fragments:
            _stored(checkpoint, metadata, fragment)
    except Exception as error:  # a damaged pickle can fail in any way
        _refuse(checkpoint, error)


def stored_names(checkpoint: Path, kind: str) -> set[str]:
    """The tensors `kind.name` of a checkpoint. Raises UserError: its list of them is damaged."""
    try:
        return {name for name in read_metadata(checkpoint).state_dict_metadata if name.startswith(f"{kind}.")}
    except Exception as error:  # a damaged pickle can fail in any way
        _refuse(checkpoint, error)


def _refuse(checkpoint: Path, cause: BaseException) -> NoReturn:
    if isinstance(cause, UserError):
        raise cause from None
    if isinstance(cause, pickle.UnpicklingError):
        what = str(cause).split(". ")[0]
        raise UserError(f"checkpoint {checkpoint} holds more than tensors ({what}); do not use this folder") from None
    reason = f"{type(cause).__name__}: {cause}"
    raise UserError(f"checkpoint {checkpoint} is damaged ({reason}); remove that folder") from None


def _stored(checkpoint: Path, metadata: Metadata, fragment: Fragment) -> TensorStorageMetadata:
    """Where the tensor of a fragment is. Raises UserError if it has another size, RuntimeError if a part is missing."""
    stored = metadata.state_dict_metadata.get(fragment.name)
    if not isinstance(stored, TensorStorageMetadata) or not _has_size(stored, fragment):
        what = "nothing" if stored is None else f"{list(getattr(stored, 'size', []))} elements"
        raise UserError(
            f"checkpoint {checkpoint} is of another model: this one needs {fragment.total} elements of "
            f"{fragment.name}, it has {what}; use the settings it was trained with"
        )
    _check_whole(fragment.name, stored)
    return stored


def _has_size(stored: TensorStorageMetadata, fragment: Fragment) -> bool:
    columns = stored.size[1] if fragment.columns is None and len(stored.size) == 2 else None
    if fragment.columns is not None:
        columns = fragment.columns.of
    sizes = [[fragment.total]] if columns is None else [[fragment.total], [fragment.total // columns, columns]]
    return list(stored.size) in sizes


def read_metadata(folder: Path) -> Metadata:
    """What tensors are in a folder, and where. Raises pickle.UnpicklingError for anything beside that."""
    return _SafeReader(folder).read_metadata()


def check_files(folder: Path) -> None:
    """Raises UserError where a rank's file is not here in its full length: ranks have folders of their own."""
    for info in read_metadata(folder).storage_data.values():
        file = folder / info.relative_path
        if not file.is_file() or file.stat().st_size < info.offset + info.length:
            raise UserError(f"{file} was written by no rank that shares this folder: choose a run_dir on a shared disk")


def check_coverage(metadata: Metadata) -> None:
    """Every element of every tensor is written once: what a silent loss of experts would break."""
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        _check_whole(name, stored)


def _check_whole(name: str, stored: TensorStorageMetadata) -> None:
    if len(stored.size) == 2:
        _check_whole_matrix(name, stored)
        return
    end = 0
    for start, size in sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks):
        if start != end:
            raise RuntimeError(f"{name}: elements {end} to {start} are owned by no rank or by two")
        end = start + size
    if end != stored.size[0]:
        raise RuntimeError(f"{name}: elements {end} to {stored.size[0]} are owned by no rank")


def _check_whole_matrix(name: str, stored: TensorStorageMetadata) -> None:
    """Its rectangles are inside of it, as large as it together, and no two overlap."""
    rows, columns = stored.size
    rectangles = sorted((*chunk.offsets, *chunk.sizes) for chunk in stored.chunks)
    for number, (row, column, height, width) in enumerate(rectangles):
        if row + height > rows or column + width > columns:
            raise RuntimeError(f"{name}: a part at row {row} and column {column} goes beyond it")
        for other_row, other_column, _, other_width in rectangles[number + 1 :]:
            if other_row >= row + height:
                break
            if other_column < column + width and column < other_column + other_width:
                raise RuntimeError(f"{name}: row {other_row}, column {other_column} is owned by two ranks")
    if sum(height * width for _, _, height, width in rectangles) != rows * columns:
        raise RuntimeError(f"{name}: a part of it is owned by no rank")


@dataclass(frozen=True)
class _Piece:
    """A part of a fragment that is one block of the stored tensor, an interval or a rectangle."""

    name: str
    offsets: torch.Size
    size: torch.Size  # of the whole tensor
    data: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.data.shape)

    @property
    def key(self) -> tuple[str, torch.Size]:
        return self.name, self.offsets


def _pieces(fragment: Fragment, columns: Columns | None) -> list[_Piece]:
    """The fragment as an interval, or as rectangles of a matrix of which it has these columns."""
    if columns is None:
        return [_Piece(fragment.name, torch.Size([fragment.start]), torch.Size([fragment.total]), fragment.data)]
    size = torch.Size([fragment.total // columns.of, columns.of])
    pieces, done = [], 0
    for place, (height, width) in columns.rectangles(fragment.start, len(fragment.data)):
        data = fragment.data[done : done + height * width].view(height, width)
        pieces.append(_Piece(fragment.name, torch.Size(place), size, data))
        done += height * width
    return pieces


class _SaveFragments(dcp.DefaultSavePlanner):
    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        pieces = [piece for fragment in fragments for piece in _pieces(fragment, fragment.columns)]
        self.pieces = {piece.key: piece for piece in pieces}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self.pieces.values()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, self.metadata = dcp.default_planner.create_default_global_save_plan(all_plans)
        check_coverage(self.metadata)
        return plans, self.metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.fqn, index.offset].data


class _LoadFragments(dcp.DefaultLoadPlanner):
    def __init__(self, checkpoint: Path, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.fragments = fragments
        self.pieces: dict[tuple[str, torch.Size], _Piece] = {}
        self.whole_rows: list[tuple[Fragment, Tensor]] = []

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([item for fragment in self.fragments for item in self._read_items(fragment)])

    def _read_items(self, fragment: Fragment) -> list[ReadItem]:
        assert self.metadata is not None
        stored = _stored(self.checkpoint, self.metadata, fragment)
        columns = fragment.columns
        if columns is not None and len(stored.size) == 1:
            fragment, columns = self._rows_of(fragment, columns), None
        elif columns is None and len(stored.size) == 2:
            columns = Columns(0, stored.size[1], stored.size[1])
        pieces = _pieces(fragment, columns)
        self.pieces |= {piece.key: piece for piece in pieces}
        return [
            item for piece in pieces for item in create_read_items_for_chunk_list(fragment.name, stored, [piece.chunk])
        ]

    def _rows_of(self, fragment: Fragment, columns: Columns) -> Fragment:
        """Whole rows in place of some columns of them: a matrix stored as one interval has no other way to be read."""
        first, end = fragment.start // columns.count, -(-(fragment.start + len(fragment.data)) // columns.count)
        rows = fragment.data.new_empty((end - first) * columns.of)
        self.whole_rows.append((fragment, rows))
        return Fragment(fragment.name, first * columns.of, fragment.total, rows)

    def cut_columns(self) -> None:
        """Once everything is read: fill the fragments of which whole rows were read."""
        for fragment, rows in self.whole_rows:
            columns = fragment.columns
            assert columns is not None
            cut = rows.view(-1, columns.of)[:, columns.first : columns.first + columns.count].flatten()
            fragment.data.copy_(cut[fragment.start % columns.count :][: len(fragment.data)])

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        data = self.pieces[index.fqn, index.offset].data
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            data = data.narrow(dim, start, length)
        return data


def _write_item(piece: _Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.name, piece.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=piece.chunk, properties=TensorProperties.create_from_tensor(piece.data), size=piece.size
        ),
    )


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
