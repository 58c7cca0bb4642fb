"""Labels and captions of tables: a right value, a quarantine entry or a UserError."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools.labels import number_labels
from data_tools.pack import PackSettings, pack
from data_tools.source import BadItemError
from data_tools.sources import SourceOptions, open_source
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture

JPEG = encoded(picture(20, 20))
Row = dict[str, Any]


def _write(folder: Path, kind: str, rows: list[Row]) -> Path:
    """A table of rows with the same keys; `path` is that of an image that is there."""
    (folder / "a.jpg").write_bytes(JPEG)
    path, names = folder / f"t.{kind}", list(rows[0])
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in names}), path)
    elif kind == "hf":
        path = folder / "train-00000.parquet"
        columns = {name: [row[name] for row in rows] for name in names if name != "path"}
        parquet.write_table(pyarrow.table({"image": [{"bytes": JPEG, "path": "a"}] * len(rows), **columns}), path)
    else:
        with path.open("w", newline="") as file:
            options: Row = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if kind == "tsv" else {}
            csv.writer(file, **options).writerows([names, *([row[name] for name in names] for row in rows)])
    return path


def _read(path: Path) -> tuple[list[str], list[str | None], list[str]]:
    """Names of classes; `cls` or `txt` of each good item; reasons of the bad ones."""
    out = path.parent / "out"
    pack(open_source(str(path), None, SourceOptions()), out, PackSettings(shuffled=False))
    index = ShardIndex.open(out)
    samples = [index.read(sample) for sample in range(index.num_samples)]
    found = [(sample.get("cls") or sample.get("txt") or b"").decode() or None for sample in samples]
    bad = out / "quarantine.jsonl"
    return (
        index.class_names,
        found,
        [json.loads(x)["reason"] for x in bad.read_text().splitlines()] if bad.exists() else [],
    )


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "hf"])
def test_whole_floats_are_the_numbers_they_were_before_pandas_met_a_gap(tmp_path: Path, kind: str) -> None:
    labels = [10.0, 2.0, math.nan if kind in ("parquet", "hf") else None, 3.0]
    names, found, bad = _read(_write(tmp_path, kind, [{"path": "a.jpg", "label": label} for label in labels]))
    assert (found, bad, len(names)) == (["10", "2", "3"], ["no label"], 11)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "hf"])
def test_a_negative_a_huge_or_a_broken_label_is_a_bad_item_among_numbers(tmp_path: Path, kind: str) -> None:
    labels = ["3", "-1", "0", " 2 ", "1000001", "1e20", "1.5", "?", "9" * 5000]
    names, found, bad = _read(_write(tmp_path, kind, [{"path": "a.jpg", "label": label} for label in labels]))
    assert (found, names) == (["3", "0", "2"], ["0", "1", "2", "3"])
    assert len(bad) == 6 and all(reason.startswith("label ") for reason in bad)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "hf"])
def test_padded_names_are_one_class(tmp_path: Path, kind: str) -> None:
    labels = ["dog", " cat", "cat ", "\ufeffdog", "-1"]
    names, found, bad = _read(_write(tmp_path, kind, [{"path": "a.jpg", "label": label} for label in labels]))
    assert (names, found, len(bad)) == (["cat", "dog"], ["1", "0", "0", "1"], 1)


def test_labels_that_are_all_negative_or_missing_make_unlabelled_data() -> None:
    assert number_labels([-1, -1, None]) is None and number_labels(["-1", "", "-1.0"]) is None


def test_named_classes_are_found_by_name_or_number_and_never_laid_over_ranks() -> None:
    known = ["zebra", "ant", "3"]
    by_name = number_labels(["ant", "zebra ", "bee", "3"], known)
    assert by_name is not None and by_name.numbers.tolist() == [1, 0, -1, 2]
    assert by_name.problems == {2: "label 'bee' is none of the 3 named classes"}
    by_number = number_labels([1.0, 0, 3, -1, True], known)
    assert by_number is not None and by_number.numbers.tolist() == [1, 0, -1, -1, -1]
    assert by_number.class_names == known


def test_the_largest_label_is_an_option(tmp_path: Path) -> None:
    path = _write(tmp_path, "csv", [{"path": "a.jpg", "label": label} for label in (5, 9)])
    source = open_source(str(path), None, SourceOptions(max_label=8))
    assert source.read(0)["cls"] == b"5"
    with pytest.raises(BadItemError, match="label 9 is not a whole number from 0 to 8"):
        source.read(1)
    (tmp_path / "zero").mkdir()
    path = _write(tmp_path / "zero", "csv", [{"path": "a.jpg", "label": label} for label in (0, 1)])
    with pytest.raises(BadItemError, match="label 1 is not a whole number from 0 to 0"):
        open_source(str(path), None, SourceOptions(max_label=0)).read(1)
    for largest in (-1, 1_000_001):
        with pytest.raises(UserError, match=f"--max-label={largest}: must be from 0 to 1000000; give"):
            SourceOptions(max_label=largest)


@pytest.mark.parametrize("kind", ["csv", "hf"])
def test_the_largest_label_of_classes_with_names_or_of_no_labels_is_refused(tmp_path: Path, kind: str) -> None:
    for column, problem in (("label", "the classes have names"), ("caption", "there are no labels")):
        path = _write(tmp_path, kind, [{"path": "a.jpg", column: value} for value in ("dog", "cat")])
        with pytest.raises(UserError, match=f"--max-label=3: {problem}, so it would change nothing; leave it out"):
            open_source(str(path), None, SourceOptions(max_label=3))
    with pytest.raises(UserError, match="--max-label=3: the classes have names"):
        number_labels([0, 1], ["cat", "dog"], 3)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_a_missing_caption_is_no_caption_and_never_the_word_nan(tmp_path: Path, kind: str) -> None:
    captions = ["\ufeffa cat", None, "", "two\0bytes"]
    _, found, bad = _read(_write(tmp_path, kind, [{"path": "a.jpg", "caption": text} for text in captions]))
    assert (found, sorted(set(bad))) == (
        ["a cat"],
        ["its caption holds zero bytes, as text in UTF-16 does", "no caption"],
    )


def test_a_caption_that_is_a_float_nan_is_no_caption(tmp_path: Path) -> None:
    path = _write(tmp_path, "parquet", [{"path": "a.jpg", "caption": value} for value in (math.nan, 7.5)])
    assert _read(path) == ([], ["7.5"], ["no caption"])


def test_a_tsv_is_read_without_quoting_so_a_quotation_mark_merges_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "t.tsv").write_bytes(b'\xef\xbb\xbfpath\tcaption\na.jpg\t"5 inch\na.jpg\tthe "cat"\na.jpg\t6" disk\n')
    assert _read(tmp_path / "t.tsv")[1] == ['"5 inch', 'the "cat"', '6" disk']


def test_names_of_columns_count_without_spaces_and_capitals(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "t.csv").write_text("path, Caption\na.jpg, a cat\n")
    assert _read(tmp_path / "t.csv")[1] == ["a cat"]


def test_text_that_is_not_utf8_is_a_bad_item_and_a_file_name_need_not_be(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.jpg").write_bytes(JPEG)
    (tmp_path / "t.csv").write_bytes(b"path,caption\na\xff.jpg,a cat\na\xff.jpg,caf\xe9\n")
    assert _read(tmp_path / "t.csv") == ([], ["a cat"], ["its caption is not UTF-8"])


def test_a_date_in_json_lines_stays_the_text_that_it_is(tmp_path: Path) -> None:
    path = _write(tmp_path, "jsonl", [{"path": "a.jpg", "caption": "2020-01-01"}])
    assert _read(path)[1] == ["2020-01-01"]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["x" * 300, "-1", "3.0", " 3 ", "nan", "1e999", "1_0",
                     "\ufeffx", '"', "a\tb", "\0", "\ud800", "\uff13", "9" * 5000]),
)  # fmt: skip
CELLS = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
ARROW = [
    pyarrow.string(), pyarrow.binary(), pyarrow.float32(), pyarrow.int8(), pyarrow.uint64(), pyarrow.bool_(),
    pyarrow.decimal128(20, 3), pyarrow.timestamp("ms"), pyarrow.timestamp("us", "Nowhere/There"), pyarrow.date64(),
    pyarrow.list_(pyarrow.string()), pyarrow.duration("ns"), pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
]  # fmt: skip


def _check(path: Path) -> None:
    """Opening, naming and reading raise nothing but UserError and BadItemError, and give what training reads."""
    try:
        source = open_source(str(path), None, SourceOptions())
    except UserError:
        return
    for item in range(len(source)):
        part = source.part(np.array([item]))
        try:
            fields = part.read(0)
        except BadItemError as error:
            assert str(error) and part.item_name(0)
            continue
        if "cls" in fields:
            assert 0 <= int(fields["cls"]) < len(source.class_names) <= 1_000_001
        if "txt" in fields:
            text = fields["txt"].decode()
            assert text == text.strip() != "" and json.loads(fields["json"])["captions"][0] == text


@pytest.mark.parametrize("odd", [[1], {"a": 1}, {}, "\ud800", "a\0b"])
def test_a_label_of_no_kind_that_a_class_can_have_is_a_bad_item_and_never_a_class(odd: Any) -> None:
    nothing = number_labels([odd, odd, odd])
    assert nothing is not None and not nothing.class_names and set(nothing.problems) == {0, 1, 2}
    for good, names in ((["4", "2"], ["0", "1", "2", "3", "4"]), (["cat", "dog"], ["cat", "dog"])):
        found = number_labels([odd, good[0], odd, good[1], odd])
        assert found is not None and list(found.class_names) == names and set(found.problems) == {0, 2, 4}


def test_an_infinite_label_among_numbers_is_a_bad_item() -> None:
    found = number_labels([float("inf"), 1.0, 1.0])
    assert found is not None and list(found.class_names) == ["0", "1"] and set(found.problems) == {0}


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4), st.booleans())
def test_any_json_lines_give_right_values_bad_items_or_one_line(rows: list[tuple[Any, Any, Any]], real: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        table = [{"path": "a.jpg" if real else p, "caption": c, "label": label} for p, c, label in rows]
        _check(_write(Path(name), "jsonl", table))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.binary(max_size=60), st.sampled_from(["csv", "tsv", "jsonl"]), st.booleans())
def test_any_bytes_of_a_text_table_give_right_values_bad_items_or_one_line(data: bytes, kind: str, real: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a.jpg").write_bytes(JPEG)
        start = {
            "csv": b"path,caption,label\na.jpg,",
            "tsv": b"path\tcaption\tlabel\na.jpg\t",
            "jsonl": b'{"path": "a.jpg"',
        }
        (Path(name) / f"t.{kind}").write_bytes((start[kind] if real else b"") + data)
        _check(Path(name) / f"t.{kind}")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(ARROW), st.sampled_from(ARROW), st.data(), st.booleans())
def test_any_parquet_cells_give_right_values_bad_items_or_one_line(
    caption: pyarrow.DataType, label: pyarrow.DataType, data: st.DataObject, images_inside: bool
) -> None:
    columns = {}
    for name, kind in (("caption", caption), ("label", label)):
        values = data.draw(st.lists(SCALARS, min_size=3, max_size=3))
        arrays = [_array(value, kind) for value in values]
        columns[name] = pyarrow.concat_arrays(arrays)
    first = {"image": [{"bytes": JPEG, "path": "a"}] * 3} if images_inside else {"path": ["a.jpg", "a.jpg", None]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jpg").write_bytes(JPEG)
        parquet.write_table(pyarrow.table({**first, **columns}), Path(folder) / "t.parquet")
        _check(Path(folder) / "t.parquet")


def _array(value: Any, kind: pyarrow.DataType) -> pyarrow.Array:
    """The value as one of this type, else one that fits none well: bytes that are no text, the largest number."""
    for one in (value, [value], str(value)):
        try:
            return pyarrow.array([one], type=kind)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            continue
    if pyarrow.types.is_timestamp(kind):
        return pyarrow.array([2**52]).cast(kind)
    return pyarrow.nulls(1, kind)
