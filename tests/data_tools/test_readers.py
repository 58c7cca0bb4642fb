"""Each kind of source gives the images, labels and captions that lie in it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.pack import PackSettings, pack
from data_tools.source import Source
from data_tools.sources import FORMATS, SourceOptions, guess_format, open_source
from data_tools.table import Columns
from data_tools.webdataset_tars import WebDatasetSource
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.commands import start
from tests.data_tools.messy import encoded, picture
from tests.machine import ROOT

FASHION = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
JPEGS = [encoded(picture(30 + number, 40, number)) for number in range(6)]


def _write_images(folder: Path, names: list[str]) -> None:
    for name, payload in zip(names, JPEGS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)


def _packed(source: Source, out: Path) -> list[dict[str, bytes]]:
    """Packed over parts of two items, as other processes get them, and read back in the order of the source."""
    pack(source, out, PackSettings(samples_per_shard=2, shuffled=False))
    index = ShardIndex.open(out)
    return [index.read(sample) for sample in range(index.num_samples)]


def _open(path: Path, source_format: str | None = None, **options: object) -> Source:
    return open_source(str(path), source_format, SourceOptions(**options))  # type: ignore[arg-type]


def test_coco_keeps_every_caption_and_the_first_one_alone(tmp_path: Path) -> None:
    _write_images(tmp_path / "train2017", ["000000000009.jpg", "000000000025.jpg", "000000000030.jpg"])
    captions = [(31, 25, "second\n"), (30, 25, " A giraffe. "), (7, 9, "Blåbær 🍇"), (8, 9, "again")]
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 1, "width": 1} for n in (25, 9, 30)],
        "annotations": [{"id": number, "image_id": image, "caption": text} for number, image, text in captions],
    }
    annotations = tmp_path / "annotations" / "captions_train2017.json"
    annotations.parent.mkdir()
    annotations.write_text(json.dumps(content))
    assert guess_format(annotations) == "coco"
    samples = _packed(_open(annotations), tmp_path / "out")
    assert [sample["jpg"] for sample in samples] == JPEGS[:2]
    assert [sample["txt"].decode() for sample in samples] == ["Blåbær 🍇", "A giraffe."]
    found = json.loads(samples[1]["json"])
    assert found == {"captions": ["A giraffe.", "second"], "image_id": 25, "file_name": "000000000025.jpg"}
    quarantine = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert (quarantine["item"], quarantine["reason"]) == ("000000000030.jpg", "no caption")
    with pytest.raises(UserError, match="--images=.*no such folder"):
        _open(annotations, images=tmp_path / "nowhere")


def test_pairs_take_the_text_file_beside_each_image(tmp_path: Path) -> None:
    _write_images(tmp_path / "in", ["a.jpg", "b.v1.jpg", "c.jpg", "sub/d.jpeg"])
    for name, text in (("a", "\ufeffa cat\n"), ("b.v1", "ein Löwe"), ("sub/d", "   ")):
        (tmp_path / "in" / f"{name}.txt").write_text(text, encoding="utf-8")
    assert guess_format(tmp_path / "in") == "pairs"
    samples = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert [(sample["jpg"], sample["txt"].decode()) for sample in samples] == [
        (JPEGS[0], "a cat"),
        (JPEGS[1], "ein Löwe"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["item"]: line["reason"] for line in lines}
    assert reasons == {"c.jpg": "no text file beside it", "sub/d.jpeg": "no caption"}


TABLE_ROWS = [("a.jpg", 'a, quoted "cat"', "zebra"), ("b.jpg", "two\nlines", "007"), ("gone.jpg", "gone", "zebra")]


def _write_table(folder: Path, kind: str) -> Path:
    path = folder / f"table.{kind}"
    columns = {name: [row[place] for row in TABLE_ROWS] for place, name in enumerate(("path", "caption", "label"))}
    if kind == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in TABLE_ROWS))
    else:
        import pyarrow

        table = pyarrow.table(columns)
        if kind == "parquet":
            from pyarrow import parquet

            parquet.write_table(table, path)
        else:
            from pyarrow import csv

            csv.write_csv(table, path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_give_captions_and_labels_by_the_rank_of_their_names(tmp_path: Path, kind: str) -> None:
    _write_images(tmp_path, ["a.jpg", "b.jpg"])
    path = _write_table(tmp_path, kind)
    assert guess_format(path) == "table"
    samples = _packed(_open(path), tmp_path / "out")
    assert [sample["jpg"] for sample in samples] == JPEGS[:2]
    assert [sample["txt"].decode() for sample in samples] == [TABLE_ROWS[0][1], TABLE_ROWS[1][1]]
    assert [sample["cls"] for sample in samples] == [b"1", b"0"]
    assert ShardIndex.open(tmp_path / "out").class_names == ["007", "zebra"]
    assert "no such file" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_a_table_with_numbers_for_labels_takes_them_as_they_are(tmp_path: Path) -> None:
    _write_images(tmp_path / "pictures", ["a.jpg", "b.jpg"])
    (tmp_path / "t.csv").write_text("image,klass\na.jpg,3\nb.jpg,0\n")
    source = _open(tmp_path / "t.csv", images=tmp_path / "pictures", columns=Columns(label="klass"))
    samples = _packed(source, tmp_path / "out")
    assert [sample["cls"] for sample in samples] == [b"3", b"0"]
    assert ShardIndex.open(tmp_path / "out").num_classes == 4 and samples[0].keys() == {"jpg", "cls"}


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("a,b\n1,2\n", Columns(), "no column of paths among a, b"),
        ("path\nx\n", Columns(), "neither captions nor labels among path"),
        ("path,label\nx,1\n", Columns(caption="text"), "--caption-column=text: not a column"),
        ("path,label\nx,\ny,-1\n", Columns(), r"no row has a label from 0 in the column label \(2 rows\)"),
        ("path,label\nx,1,2\n", Columns(), "line 2 has 3 cells, the first one 2"),
        ('path,caption\nx,"5 inch\ny,cat\n', Columns(), "line 3 or a quotation mark before it is wrong"),
        ("path,caption,caption\nx,a,b\n", Columns(), "2 columns for the caption: caption, caption; rename all but one"),
        ("path,caption,Caption\nx,a,b\n", Columns(), "2 columns for the caption"),
        ("", Columns(), "is empty"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, text: str, columns: Columns, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        _open(tmp_path / "t.csv", columns=columns)


def _write_hf(folder: Path, first: int, last: int, captions: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = range(first, last)
    columns = {
        "image": [
            {"bytes": JPEGS[n], "path": f"{n}.jpg"} if n != 4 else {"bytes": None, "path": "4.jpg"} for n in rows
        ],
        "label": [n % 3 for n in rows],
    }
    if captions:
        columns["text"] = [[f"caption {n}", "other"] for n in rows]
    features = {"info": {"features": {"label": {"names": ["ant", "bee", "cow", "dog"], "_type": "ClassLabel"}}}}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    folder.mkdir(exist_ok=True)
    parquet.write_table(table, folder / f"train-{first:05d}.parquet", row_group_size=2)


@pytest.mark.parametrize("captions", [False, True])
def test_hugging_face_parquet_gives_its_images_labels_and_class_names(tmp_path: Path, captions: bool) -> None:
    _write_hf(tmp_path / "in", 0, 3, captions)
    _write_hf(tmp_path / "in", 3, 6, captions)
    assert guess_format(tmp_path / "in") == guess_format(tmp_path / "in" / "train-00000.parquet") == "hf-parquet"
    samples = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == [(JPEGS[n], n % 3) for n in (0, 1, 2, 3, 5)]
    assert [sample.get("txt") for sample in samples] == [
        f"caption {n}".encode() if captions else None for n in (0, 1, 2, 3, 5)
    ]
    assert ShardIndex.open(tmp_path / "out").class_names == ["ant", "bee", "cow", "dog"]
    quarantine = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert quarantine["reason"] == "no image bytes in its row" and "row 1 of group 0" in quarantine["item"]


def test_hidden_parquet_files_are_skipped_and_pipes_among_them_refused(tmp_path: Path) -> None:
    _write_hf(tmp_path / "in", 0, 3, captions=False)
    (tmp_path / "in" / "._train-00000.parquet").write_bytes(b"Mac OS X")
    assert len(_open(tmp_path / "in")) == 3
    os.mkfifo(tmp_path / "in" / "train-00001.parquet")
    with pytest.raises(UserError, match="train-00001.parquet: not a regular file"):
        _open(tmp_path / "in")


def test_splits_of_hugging_face_parquet_are_not_mixed(tmp_path: Path) -> None:
    _write_hf(tmp_path / "in", 0, 3, captions=False)
    _write_hf(tmp_path / "in", 3, 6, captions=False)
    (tmp_path / "in" / "train-00003.parquet").rename(tmp_path / "in" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"several splits \(test, train\); name one with --split"):
        _open(tmp_path / "in")
    with pytest.raises(UserError, match="--split=val: not in .* which has test, train"):
        _open(tmp_path / "in", split="val")
    test = _open(tmp_path / "in", split="test")
    assert len(test) == 3 and test.read(0)["image"] == JPEGS[3]


def test_configurations_of_hugging_face_parquet_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("256px", "512px"):
        _write_hf(tmp_path / folder, 0, 3, captions=False)
    (tmp_path / "256px" / "train-00000.parquet").rename(tmp_path / "256px" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"train lies in several folders \(256px, 512px\).*; name one of them"):
        _open(tmp_path)
    assert len(_open(tmp_path / "512px", split="train")) == 3


def test_rows_of_hugging_face_parquet_are_told_apart_where_the_splits_have_files_of_one_name(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / "default" / split).mkdir(parents=True)
        _write_hf(tmp_path, 0, 3, captions=False)
        (tmp_path / "train-00000.parquet").rename(tmp_path / "default" / split / "0000.parquet")
    assert _open(tmp_path, split="test").item_name(2) == "default/test/0000.parquet: row 0 of group 1"
    assert _open(tmp_path / "default" / "test").item_name(2) == "0000.parquet: row 0 of group 1"


def _write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, compressed: bool = True) -> Path:
    suffix = ".gz" if compressed else ""
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
        path = folder / f"train-{name}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if compressed else content)
    return folder / f"train-images-idx3-ubyte{suffix}"


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_give_gray_images_pixel_by_pixel(tmp_path: Path, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12)).astype(np.uint8)
    path = _write_idx(tmp_path, images, np.array([3, 1, 0, 2, 1], dtype=np.uint8), compressed)
    assert guess_format(path) == "idx"
    samples = _packed(_open(path), tmp_path / "out")
    from diffmoe_dist.data.images import decode_image

    np.testing.assert_array_equal([np.asarray(decode_image(sample["png"], 1)) for sample in samples], images)
    assert [int(sample["cls"]) for sample in samples] == [3, 1, 0, 2, 1]
    index = ShardIndex.open(tmp_path / "out")
    assert (index.image_size, index.channels, index.num_classes) == (12, 1, 4)


def test_idx_files_that_are_cut_or_alone_are_refused(tmp_path: Path) -> None:
    path = _write_idx(tmp_path, np.zeros((5, 4, 4), np.uint8), np.zeros(5, np.uint8), compressed=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="95 bytes, .* needs 96"):
        _open(path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    path.write_bytes(path.read_bytes() + b"\0")
    os.mkfifo(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(UserError, match="labels-idx1-ubyte: not a regular file"):
        _open(path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="labels-idx1-ubyte: no such file"):
        _open(path)


@pytest.mark.skipif(not FASHION.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_is_read_where_debian_puts_it() -> None:
    source = _open(FASHION)
    assert (len(source), source.image_size, len(source.class_names)) == (10_000, 28, 10)
    assert source.labels is not None and np.bincount(source.labels).tolist() == [1000] * 10


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    _write_images(tmp_path / "in", ["b.jpg", "a.jpg", "sub/c.jpg"])
    assert guess_format(tmp_path / "in") == "image-folder"
    samples = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert samples == [{"jpg": JPEGS[1]}, {"jpg": JPEGS[0]}, {"jpg": JPEGS[2]}]
    index = ShardIndex.open(tmp_path / "out")
    assert (index.num_classes, index.class_names, index.fields) == (0, [], ("jpg",))


def test_a_class_folder_without_images_is_refused_because_it_would_move_the_labels(tmp_path: Path) -> None:
    _write_images(tmp_path, ["a/x.jpg", "c/x.jpg"])
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="class folder b has no images"):
        _open(tmp_path, "image-folder")


def test_a_file_name_that_is_no_valid_text_is_read_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    _write_images(folder, ["a\udcff.jpg"])
    (folder / "b\udcfe.jpg").write_bytes(b"")
    assert _packed(_open(folder), tmp_path / "out") == [{"jpg": JPEGS[0]}]
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["item"] == "b\udcfe.jpg"


def test_hidden_files_are_no_items(tmp_path: Path) -> None:
    _write_images(tmp_path, ["a/x.jpg", "a/._x.jpg", "b/x.jpg"])
    (tmp_path / ".cache").mkdir()
    assert len(_open(tmp_path)) == 2


def test_a_packed_folder_can_be_packed_again_in_another_order(tmp_path: Path) -> None:
    _write_images(tmp_path / "in", [f"{'ab'[n % 2]}/{n}.jpg" for n in range(6)])
    first = _packed(_open(tmp_path / "in"), tmp_path / "first")
    assert guess_format(tmp_path / "first") == "webdataset"
    pack(WebDatasetSource(tmp_path / "first"), tmp_path / "second", PackSettings(samples_per_shard=4, seed=3))
    index = ShardIndex.open(tmp_path / "second")
    second = [index.read(sample) for sample in range(6)]
    assert second != first and sorted(map(str, second)) == sorted(map(str, first))
    assert index.num_classes == 2


def test_every_source_travels_in_small_parts(tmp_path: Path) -> None:
    _write_images(tmp_path / "in", [f"{'ab'[n % 2]}/{n}.jpg" for n in range(6)])
    folder = _open(tmp_path / "in")
    pack(folder, tmp_path / "tars", PackSettings(shuffled=False))
    _write_hf(tmp_path / "hf", 0, 4, captions=True)
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"in/{'ab'[n % 2]}/{n}.jpg,{n}\n" for n in range(6)))
    sources = [
        folder,
        _open(tmp_path / "tars"),
        _open(tmp_path / "hf"),
        _open(tmp_path / "t.csv"),
        _open(Path("digits")),
    ]
    for source in sources:
        items = np.array([3, 0])
        part = pickle.loads(pickle.dumps(source.part(items)))
        for place, item in enumerate(items.tolist()):
            assert part.read(place) == source.read(item), source.name
            assert part.item_name(place) == source.item_name(item), source.name
        assert len(pickle.dumps(source.part(items))) < 5000, source.name


@pytest.mark.parametrize(
    ("name", "source_format", "said"),
    [
        ("nowhere", None, "no such file or folder"),
        ("nowhere", "coco", "no such file or folder"),
        ("notes.doc", None, "not known by its name; name --source-format, one of digits"),
        ("notes.doc", "pairs", "pairs reads a folder"),
        ("empty", None, "holds no images, tars or Parquet files"),
    ],
)
def test_a_source_that_is_not_there_or_not_known_is_refused(
    tmp_path: Path, name: str, source_format: str | None, said: str
) -> None:
    (tmp_path / "notes.doc").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"SOURCE=.*{said}"):
        _open(tmp_path / name, source_format)


def test_an_option_that_a_reader_does_not_use_is_refused(tmp_path: Path) -> None:
    _write_images(tmp_path, ["a/x.jpg"])
    with pytest.raises(UserError, match="--devkit=kit: image-folder does not use it, only ilsvrc-val, ilsvrc-train"):
        _open(tmp_path, devkit=Path("kit"))
    with pytest.raises(UserError, match="--label-column=x: image-folder does not use it, only table, hf-parquet"):
        _open(tmp_path, columns=Columns(label="x"))


def test_every_format_is_described_in_the_help() -> None:
    from data_tools.__main__ import _SOURCES_HELP

    assert all(f"\n  {name} " in _SOURCES_HELP for name in FORMATS)


def test_a_reader_of_the_users_own_is_packed_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "my_reader.py").write_text(example + "\n\ndef none(source):\n    return [source]\n")
    (tmp_path / "arrays").mkdir()
    for number in range(4):
        np.save(tmp_path / f"arrays/{number % 2}-{number}.npy", np.full((8, 8), number, np.uint8))
    words = ("pack", "arrays", "command", "--source-format", "my_reader", "--samples-per-shard", "2")
    (command,) = start("data_tools.__main__", *words, folder=tmp_path, prepare=partial(_go_to, tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    samples = _packed(_open(tmp_path / "arrays", "my_reader"), tmp_path / "out")

    assert [sample["cls"] for sample in samples] == [b"0", b"0", b"1", b"1"]
    assert ShardIndex.open(tmp_path / "out").class_names == ["cat", "dog"]
    for source_format, message in (
        ("my_reader:none", "--source-format=my_reader:none: it returned a list without name, class_names, channels"),
        ("my_reader:other", "my_reader has no callable 'other'"),
        ("my_package.none", "there is no module my_package that Python can import"),
        ("cocoa", "--source-format=cocoa: no reader; did you mean coco? choose from digits"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            _open(tmp_path / "arrays", source_format)
    with pytest.raises(UserError, match="--split=train: my_reader does not use it"):
        _open(tmp_path / "arrays", "my_reader", split="train")
    assert command.wait(60) == 0 and "2 shards" in command.stdout, command.stderr


def _go_to(folder: Path, _rank: int) -> None:
    os.chdir(folder)
