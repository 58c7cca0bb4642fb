"""Source: a table of paths with captions, labels or both: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.labels import number_labels, refuse_max_label
from data_tools.source import IMAGE, BadItemError, Strings, caption_payloads, read_file
from data_tools.table_files import UnreadableCell, is_missing, open_table
from diffmoe_dist.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_PATHS = ("path", "file_name", "filename", "file", "image_path", "image")
CAPTIONS = ("caption", "captions", "text", "prompt")
LABELS = ("label", "labels", "cls", "class")

logger = logging.getLogger("data_tools")


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

    def __init__(self, path: Path, images: Path | None, columns: Columns, max_label: int | None = None) -> None:
        self._root = images or path.parent
        table = open_table(path)
        names = table.names
        image = choose_column(path, names, "image", columns.image, _PATHS)
        caption = choose_column(path, names, "caption", columns.caption, CAPTIONS)
        label = choose_column(path, names, "label", columns.label, LABELS)
        if image is None:
            raise UserError(f"SOURCE={path}: no column of paths among {', '.join(names)}; name it with --image-column")
        if caption is None and label is None:
            raise UserError(
                f"SOURCE={path}: neither captions nor labels among {', '.join(names)}; use --caption-column"
            )
        self._has_captions = caption is not None
        chosen = [image, *([caption] if caption is not None else []), *([label] if label is not None else [])]
        values: list[Any] = []
        self._items = Strings(_items(table.rows(chosen), caption is not None, values if label is not None else None))
        self._labels = None if label is None else number_labels(values, largest=max_label)
        if label is not None and self._labels is None:
            tell_unlabelled(path, label, len(values), needed=caption is None)
        if self._labels is None:
            refuse_max_label(max_label, "there are no labels")
        self.class_names: Sequence[str] = () if self._labels is None else self._labels.class_names

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.numbers

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        return str(json.loads(self._items[item])[0])

    def part(self, items: np.ndarray) -> TableSource:
        part = copy.copy(self)
        part._items = self._items.take(items)
        part._labels = None if self._labels is None else self._labels.part(items)
        part.class_names = ()
        return part

    def read(self, item: int) -> dict[str, bytes]:
        path, problem, captions = json.loads(self._items[item])
        if problem is not None:
            raise BadItemError(problem)
        payloads = {IMAGE: read_file(self._root / path)}
        if self._labels is not None:
            payloads["cls"] = self._labels.payload(item)
        if self._has_captions:
            payloads.update(caption_payloads(captions, path=path))
        return payloads


def _items(rows: Iterable[list[Any]], has_captions: bool, labels: list[Any] | None) -> Iterable[str]:
    """(path or number of the row, problem, captions) of each row, as JSON; its label is added to `labels`."""
    for number, row in enumerate(rows):
        path, problem, captions = row[0], None, []
        if is_missing(path) or path == "":
            path, problem = f"row {number}", "no path"
        elif isinstance(path, (UnreadableCell, list, dict)):
            path, problem = f"row {number}", "its path is no text"
        try:
            captions = as_captions(row[1]) if has_captions else []
        except BadItemError as error:
            problem = problem or str(error)
        if labels is not None:
            labels.append(row[-1])
        yield json.dumps([str(path), problem, captions])


def choose_column(path: Path, names: Sequence[str], what: str, given: str | None, usual: Iterable[str]) -> str | None:
    """The column that is given, or the first of the usual ones that is there, however capital. Raises UserError."""
    if given is not None and given not in names:
        raise UserError(f"--{what}-column={given}: not a column of {path}; there are {', '.join(names)}")
    wanted = [given] if given is not None else usual
    for one in wanted:
        found = [name for name in names if (name == given if given is not None else name.strip().lower() == one)]
        if len(found) > 1:
            raise UserError(
                f"SOURCE={path}: {len(found)} columns for the {what}: {', '.join(found)}; rename all but one"
            )
        if found:
            return found[0]
    return None


def tell_unlabelled(path: Path, column: str, num_items: int, *, needed: bool) -> None:
    """No row has a label: a warning, or a UserError where the labels are all there is."""
    problem = f"SOURCE={path}: no row has a label from 0 in the column {column} ({num_items} rows)"
    if needed:
        raise UserError(f"{problem}; use --label-column")
    logger.warning("%s: packed without labels", problem)


def as_captions(value: Any) -> list[str]:
    """A caption or several. Raises BadItemError for what is no text."""
    if isinstance(value, (list, tuple)):
        return [caption for one in value for caption in as_captions(one)]
    if isinstance(value, UnreadableCell):
        raise BadItemError(f"caption: {value}")
    if isinstance(value, dict):
        raise BadItemError(f"caption {str(value)[:40]} is no text")
    return [] if is_missing(value) else [str(value)]
