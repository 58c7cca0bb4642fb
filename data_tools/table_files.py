"""Tables row by row: CSV, TSV, JSON lines, Parquet. Nothing in a cell stops the reading; what is wrong stays in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffmoe_dist.errors import UserError

TEXT_ERRORS = "surrogateescape"  # as Python names files: what is not UTF-8 comes back as it was


class UnreadableCell(str):
    """In the place of a value: why there is none."""

    __slots__ = ()


class Table(Protocol):
    """A file with named columns."""

    names: Sequence[str]

    def rows(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        """The cells of some columns, a row at a time. Raises UserError for a row that is none."""
        ...


def open_table(path: Path) -> Table:
    """By the name's suffix. Raises UserError for a file that is no table."""
    if path.suffix == ".parquet":
        return _ParquetTable(path)
    return _JsonLines(path) if path.suffix == ".jsonl" else _TextTable(path)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or the NaN that pandas writes for it."""
    return value is None or bool(value != value)


def import_pyarrow() -> Any:
    """Raises UserError where pyarrow is not installed; only Parquet needs it."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("SOURCE: Parquet files need pyarrow; run: pip install pyarrow") from error
    return pyarrow


def column_cells(column: Any) -> Iterator[Any]:
    """The values of a column of pyarrow's; text as `str`, also where it is not UTF-8."""
    for scalar in _text_as_bytes(column):
        try:
            value = scalar.as_py()
        except (ValueError, OverflowError, import_pyarrow().ArrowException) as error:
            yield UnreadableCell(f"a cell cannot be read ({type(error).__name__})")
            continue
        yield value.decode("utf-8", TEXT_ERRORS) if isinstance(value, bytes) else value


def _text_as_bytes(column: Any) -> Any:
    pyarrow = import_pyarrow()
    types = pyarrow.types
    if types.is_dictionary(column.type):  # a categorical of pandas
        column = column.cast(column.type.value_type)
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        return column.cast(pyarrow.large_binary())
    return column


class _TextTable:
    """CSV, or TSV without quoting: in a TSV a quotation mark is a character like any other."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_tsv = path, path.suffix == ".tsv"
        header = next(self._lines(), None)
        if header is None:
            raise UserError(f"SOURCE={path}: is empty; a table begins with the names of its columns")
        if any("\0" in name for name in header):
            raise UserError(f"SOURCE={path}: is not text in UTF-8; convert it")
        self.names: Sequence[str] = [name.strip() for name in header]

    def rows(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        places = [self.names.index(column) for column in columns]
        lines = self._lines()
        next(lines)
        yield from ([line[place] for place in places] for line in lines)

    def _lines(self) -> Iterator[list[str]]:
        width = None
        try:
            with self._path.open(encoding="utf-8-sig", errors=TEXT_ERRORS, newline="") as file:
                lines = (
                    csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                    if self._is_tsv
                    else csv.reader(file, strict=True)
                )
                for line in lines:
                    width = width or len(line)
                    if line and len(line) != width:
                        problem = f"line {lines.line_num} has {len(line)} cells, the first one {width}"
                        raise UserError(f"SOURCE={self._path}: {problem}; correct it, or its quotation marks")
                    if line:
                        yield line
        except csv.Error as error:
            problem = f"line {lines.line_num} or a quotation mark before it is wrong ({error})"
            raise UserError(f"SOURCE={self._path}: {problem}; correct it") from None
        except OSError as error:
            raise UserError(f"SOURCE={self._path}: cannot be read ({error.strerror}); restore it") from None


class _JsonLines:
    """Any object on a line may lack any of the columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.names: Sequence[str] = list(dict.fromkeys(name for row in self._objects() for name in row))

    def rows(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        yield from ([row.get(column) for column in columns] for row in self._objects())

    def _objects(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open(encoding="utf-8-sig", errors=TEXT_ERRORS, newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield self._parse(number, line)
        except OSError as error:
            raise UserError(f"SOURCE={self._path}: cannot be read ({error.strerror}); restore it") from None

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            found = json.loads(line, object_pairs_hook=_as_dict)
            if isinstance(found, dict):
                return found
            problem = "is no object"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        raise UserError(f"SOURCE={self._path}: line {number}: {problem}; write a JSON object a line")


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


class _ParquetTable:
    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_parquet(path)
        self.names: Sequence[str] = self._file.schema_arrow.names

    def rows(self, columns: Sequence[str]) -> Iterator[list[Any]]:
        try:
            for batch in self._file.iter_batches(columns=list(columns)):
                places = [batch.schema.get_field_index(column) for column in columns]
                yield from map(list, zip(*(column_cells(batch.column(place)) for place in places), strict=True))
        except (OSError, import_pyarrow().ArrowException) as error:
            raise UserError(f"SOURCE={self._path}: cannot be read as Parquet ({error}); restore it") from error


def open_parquet(path: Path) -> Any:
    """Raises UserError for a file that is no Parquet."""
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"SOURCE={path}: cannot be read as Parquet ({error}); restore it") from error
