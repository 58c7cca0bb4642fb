"""Source: a table of paths with captions, labels or both: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.source import IMAGE, BadItemError, caption_payloads, label_payload, read_file
from diffmoe_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_PATHS = ("path", "file_name", "filename", "file", "image_path", "image")
CAPTIONS = ("caption", "captions", "text", "prompt")
LABELS = ("label", "labels", "cls", "class")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: by the usual names."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None


class TableSource:
    """One item a row. Labels that are not numbers get their rank among the sorted names."""

    name = "table"
    channels = 3
    image_size = None

    def __init__(self, path: Path, images: Path | None, columns: Columns) -> None:
        self._root = images or path.parent
        table = _read_table(path)
        names = table.column_names
        image = choose_column(path, names, "image", columns.image, _PATHS)
        caption = choose_column(path, names, "caption", columns.caption, CAPTIONS)
        label = choose_column(path, names, "label", columns.label, LABELS)
        if image is None:
            raise UserError(f"SOURCE={path}: no column of paths among {', '.join(names)}; name it with --image-column")
        if caption is None and label is None:
            raise UserError(
                f"SOURCE={path}: neither captions nor labels among {', '.join(names)}; use --caption-column"
            )
        self._caption = caption
        self._rows = table.select([image] if caption is None else [image, caption])
        self.class_names: Sequence[str] = ()
        self.labels: np.ndarray | None = None
        if label is not None:
            self.class_names, self.labels = number_labels(path, table[label].to_pylist())

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def item_name(self, item: int) -> str:
        return str(self._rows[0][item].as_py())

    def part(self, items: np.ndarray) -> TableSource:
        part = copy.copy(self)
        part._rows = self._rows.take(items).combine_chunks()
        part.labels = None if self.labels is None else self.labels[items]
        part.class_names = ()
        return part

    def read(self, item: int) -> dict[str, bytes]:
        path = self._rows[0][item].as_py()
        if not path:
            raise BadItemError("no path")
        payloads = {IMAGE: read_file(self._root / str(path))}
        if self.labels is not None:
            payloads["cls"] = label_payload(self.labels[item])
        if self._caption is not None:
            payloads.update(caption_payloads(as_captions(self._rows[1][item].as_py()), path=path))
        return payloads


def import_pyarrow() -> Any:
    """Raises UserError where pyarrow is not installed; only tables need it."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("SOURCE: tables and Parquet files need pyarrow; run: pip install pyarrow") from error
    return pyarrow


def choose_column(path: Path, names: Sequence[str], what: str, given: str | None, usual: Iterable[str]) -> str | None:
    """The column that is given, or the first of the usual ones that is there. Raises UserError."""
    if given is not None and given not in names:
        raise UserError(f"--{what}-column={given}: not a column of {path}; there are {', '.join(names)}")
    return given or next((name for name in usual if name in names), None)


def number_labels(path: Path, values: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """Names and (items,) int64 labels: numbers from 0 are taken as they are, other values by their rank."""
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise UserError(f"SOURCE={path}: {missing} rows have no label; complete or remove them")
    texts = [str(value) for value in values]
    if all(text.isascii() and text.isdigit() for text in texts):
        labels = np.array([int(text) for text in texts], dtype=np.int64)
        return [str(label) for label in range(labels.max(initial=0) + 1)], labels
    names = sorted(set(texts))
    rank = {name: number for number, name in enumerate(names)}
    return names, np.array([rank[text] for text in texts], dtype=np.int64)


def as_captions(value: Any) -> list[str]:
    """A caption or several."""
    if value is None:
        return []
    return [str(caption) for caption in value] if isinstance(value, list) else [str(value)]


def _read_table(path: Path) -> pyarrow.Table:
    pyarrow = import_pyarrow()
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path)
        if path.suffix == ".jsonl":
            from pyarrow import json

            return json.read_json(path)
        return _read_csv(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"SOURCE={path}: cannot be read as a table ({error}); repair it") from error


def _read_csv(path: Path) -> pyarrow.Table:
    """All columns as text: a class named 007 is not the number 7."""
    import pyarrow
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    convert = csv.ConvertOptions(column_types={name: pyarrow.string() for name in names}, strings_can_be_null=False)
    return csv.read_csv(path, parse_options=parse, convert_options=convert)
