"""Source: Parquet files of Hugging Face data sets, with the images inside: a struct of `bytes` and `path`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.image_folder import name_some
from data_tools.labels import number_labels, refuse_max_label
from data_tools.source import IMAGE, BadItemError, caption_payloads
from data_tools.table import CAPTIONS, LABELS, Columns, as_captions, choose_column, tell_unlabelled
from data_tools.table_files import column_cells, import_pyarrow, open_parquet
from diffmoe_dist.data.images import walk_files
from diffmoe_dist.errors import UserError


class HfParquetSource:
    """The rows of all files, in order.

    A row is read with the whole row group around it, so a part takes from a group, once, all rows it will need of it.
    """

    name = "hf-parquet"
    channels = 3
    image_size = None

    def __init__(self, root: Path, columns: Columns, split: str | None, max_label: int | None = None) -> None:
        self._files, self._named_from = _files_of(root, split) if root.is_dir() else ([root], root.parent)
        files = [open_parquet(path) for path in self._files]
        schema = files[0].schema_arrow
        self._image = _image_column(self._files[0], schema, columns.image)
        self._caption = choose_column(root, schema.names, "caption", columns.caption, CAPTIONS)
        self._label = choose_column(root, schema.names, "label", columns.label, LABELS)
        used = [name for name in (self._image, self._caption, self._label) if name is not None]
        known = _known_names(schema, self._label)
        for path, file in zip(self._files, files, strict=True):
            missing = [name for name in used if file.schema_arrow.names.count(name) != 1]
            if missing or _known_names(file.schema_arrow, self._label) != known:
                problem = f"the column {missing[0]}" if missing else "the names of the classes"
                raise UserError(f"SOURCE={path}: {problem} is not as in {self._files[0].name}; pack them separately")
        self._places = np.concatenate(
            [_rows(number, group, file) for number, file in enumerate(files) for group in range(file.num_row_groups)]
            or [np.empty((0, 3), dtype=np.int64)]
        )  # (items, 3): file, row group, row in it
        self._labels = None
        if self._label is not None:
            columns_of = (_read(path, None, [self._label]) for path in self._files)
            values = [value for column in columns_of for value in column_cells(column[self._label])]
            self._labels = number_labels(values, known, max_label)
            if self._labels is None and values:
                tell_unlabelled(root, self._label, len(values), needed=False)
        if self._labels is None:
            refuse_max_label(max_label, "there are no labels")
        self.class_names: Sequence[str] = () if self._labels is None else self._labels.class_names
        self._read_ahead: dict[int, tuple[bytes | None, Any]] = {}

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.numbers

    def __len__(self) -> int:
        return len(self._places)

    def item_name(self, item: int) -> str:
        number, group, row = self._places[item].tolist()
        return f"{self._files[number].relative_to(self._named_from)}: row {row} of group {group}"

    def part(self, items: np.ndarray) -> HfParquetSource:
        part = copy.copy(self)
        part._places, part._read_ahead = self._places[items], {}
        part._labels = None if self._labels is None else self._labels.part(items)
        part.class_names = ()
        return part

    def read(self, item: int) -> dict[str, bytes]:
        if item not in self._read_ahead:
            self._read_group(item)
        image, captions = self._read_ahead.pop(item)
        if image is None:
            raise BadItemError("no image bytes in its row")
        payloads = {IMAGE: image}
        if self._labels is not None:
            payloads["cls"] = self._labels.payload(item)
        if self._caption is not None:
            payloads.update(caption_payloads(as_captions(captions)))
        return payloads

    def _read_group(self, item: int) -> None:
        number, group, _ = self._places[item].tolist()
        columns = [self._image, *([self._caption] if self._caption is not None else [])]
        table = _read(self._files[number], group, columns)
        here = np.flatnonzero((self._places[:, :2] == (number, group)).all(axis=1))
        rows = self._places[here, 2].tolist()
        captions = [None] * len(rows) if self._caption is None else list(column_cells(table[self._caption].take(rows)))
        for other, row, caption in zip(here.tolist(), rows, captions, strict=True):
            (image,) = column_cells(table[self._image].slice(row, 1))
            content = image.get("bytes") if isinstance(image, dict) else None
            self._read_ahead[other] = (content if isinstance(content, bytes) else None, caption)


def holds_images(path: Path) -> bool:
    """Whether a Parquet file has images inside, rather than paths to them."""
    return any(_is_image(field) for field in open_parquet(path).schema_arrow)


def _rows(number: int, group: int, file: Any) -> np.ndarray:
    rows = np.arange(file.metadata.row_group(group).num_rows, dtype=np.int64)
    return np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], axis=1)


def _files_of(root: Path, split: str | None) -> tuple[list[Path], Path]:
    """The files of one split, by name: `train-00000-of-00004.parquet`, or `train/0000.parquet`.

    With them the folder that their paths are told from: their own, or `root` where other splits have the same names.
    Raises UserError where they lie in several folders, for those are configurations of one repository.
    """
    files: dict[str, list[Path]] = {}
    for path in (root / name for name in walk_files(root) if name.endswith(".parquet")):
        if not path.is_file():
            raise UserError(f"SOURCE={path}: not a regular file; remove it")
        numbered = re.match(r"(.+?)-\d", path.name)
        files.setdefault(numbered[1] if numbered else path.parent.name, []).append(path)
    if not files:
        raise UserError(f"SOURCE={root}: holds no .parquet file; name a file or a folder of them")
    if split is not None and split not in files:
        raise UserError(f"--split={split}: not in {root}, which has {', '.join(files)}")
    if split is None and len(files) > 1:
        raise UserError(f"SOURCE={root}: holds several splits ({', '.join(files)}); name one with --split")
    split = next(iter(files)) if split is None else split
    folders = list(dict.fromkeys(path.parent for path in files[split]))
    if len(folders) > 1:
        names = name_some([str(folder.relative_to(root)) for folder in folders])
        raise UserError(
            f"SOURCE={root}: {split} lies in several folders ({names}), as configurations do; name one of them"
        )
    names_of_files = [path.name for paths in files.values() for path in paths]
    return files[split], root if len(names_of_files) > len(set(names_of_files)) else folders[0]


def _read(path: Path, group: int | None, columns: list[str]) -> Any:
    """Columns of a file, or of one row group."""
    file = open_parquet(path)
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns=columns)
    except (OSError, import_pyarrow().ArrowException) as error:
        raise UserError(f"SOURCE={path}: cannot be read as Parquet ({error}); restore it") from error


def _is_image(field: Any) -> bool:
    kind = import_pyarrow().types
    return bool(kind.is_struct(field.type)) and field.type.get_field_index("bytes") >= 0


def _image_column(path: Path, schema: Any, given: str | None) -> str:
    images = [field.name for field in schema if _is_image(field)]
    if given is not None and given not in images:
        raise UserError(f"--image-column={given}: not a column of images in {path}; there are {', '.join(images)}")
    if not images:
        raise UserError(f"SOURCE={path}: no column is a struct with `bytes`; for paths use --source-format=table")
    return given or images[0]


def _known_names(schema: Any, label: str | None) -> list[str]:
    """The names of the classes, where the file was written by `datasets` and says them."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = found.get("info", {}).get("features", {}).get(label, {}).get("names") or []
    except (AttributeError, ValueError, RecursionError):
        return []  # notes that `datasets` does not write
    return [str(name) for name in names] if isinstance(names, list) else []
