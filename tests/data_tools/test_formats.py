"""What lies in a folder or a tar is told by looking at all of it; what could be read in two ways is refused."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from data_tools.index_tars import index_tars
from data_tools.pack import PackSettings, pack
from data_tools.source import BadItemError, Source
from data_tools.sources import SourceOptions, guess_format, open_source
from data_tools.verify import verify
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture
from tests.data_tools.tar_files import write_tar

JPEG = encoded(picture(20, 20))


def _write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() if name.endswith(".txt") else JPEG)
    return folder


def _open(path: Path, source_format: str | None = None) -> Source:
    return open_source(str(path), source_format, SourceOptions())


def _packed(source: Source, out: Path) -> tuple[list[tuple[str | None, str | None]], dict[str, str]]:
    """(class, caption) of every sample, and the reasons of the items that were left out."""
    pack(source, out, PackSettings(shuffled=False))
    index = ShardIndex.open(out)
    assert verify(index, full=True).problems == []
    samples = [index.read(sample) for sample in range(index.num_samples)]
    found = [tuple(s[f].decode() if f in s else None for f in ("cls", "txt")) for s in samples]
    list_of_bad = out / "quarantine.jsonl"
    lines = list_of_bad.read_text().splitlines() if list_of_bad.exists() else []
    return found, {line["item"]: line["reason"] for line in map(json.loads, lines)}  # type: ignore[return-value]


def test_an_image_without_text_at_the_front_does_not_drop_the_captions(tmp_path: Path) -> None:
    _write(tmp_path / "in", "a.jpg", "b.jpg", "b.txt", "c.JPG", "c.txt")
    (tmp_path / "in" / "c.txt").rename(tmp_path / "in" / "c.TXT")  # as on Windows
    samples, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert (samples, bad) == ([(None, "b.txt"), (None, "c.txt")], {"a.jpg": "no text file beside it"})


def test_class_folders_with_text_files_keep_class_and_caption(tmp_path: Path) -> None:
    _write(tmp_path / "in", "cat/a.jpg", "cat/a.txt", "cat/b.jpg", "cat/b.txt", "dog/a.jpg", "dog/a.txt", "dog/b.jpg")
    samples, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert samples == [("0", "cat/a.txt"), ("0", "cat/b.txt"), ("1", "dog/a.txt"), ("1", None)] and not bad
    assert ShardIndex.open(tmp_path / "out").class_names == ["cat", "dog"]


def test_a_stray_image_beside_class_folders_does_not_drop_the_labels_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "in", "cat/a.jpg", "dog/b.jpg", "preview.png", "dog/notes.xml", "LICENSE", "dog/b.txt")
    with caplog.at_level(logging.INFO, "data_tools"):
        samples, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert samples == [("0", None), ("1", "dog/b.txt")] and not bad
    assert "read as image-folder" in caplog.text
    assert "2 images in 2 classes (cat, dog), 1 with a caption; left aside: 1 images beside the class folders (preview"
    assert "1 .xml" in caplog.text and "1 without suffix" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["a.jpg", "b.jpg", "x/c.jpg", "y/d.jpg", "y/e.jpg"],
            "2 images beside 3 in subfolders .x, y.: classes, or one",
        ),
        (["a.jpg", "b.jpg", "c.jpg", "c.txt"], "1 of 3 images have a text file; --source-format=pairs takes these"),
        (["train/a/x.jpg", "val/a/x.jpg"], "train, val are splits, not classes; name one of them"),
        (["a.jpg", "metadata.csv"], "holds 1 images and metadata.csv; name SOURCE=.*metadata.csv for the table"),
        (["a/x.jpg", "metadata.jsonl"], "holds 1 images and metadata.jsonl; name SOURCE=.*metadata.jsonl"),
        (["a.jpg", "0.tar"], "holds 1 tars and 1 images; name --source-format"),
        (["a.parquet", "0.tar"], "holds 1 tars and 1 .parquet files"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"SOURCE=.*{said}"):
        _open(_write(tmp_path, *names))


def test_the_format_that_is_named_decides_where_the_guess_refuses(tmp_path: Path) -> None:
    folder = _write(tmp_path / "in", "a.jpg", "b.jpg", "b.txt", "c.jpg", "t.csv")
    assert _packed(_open(folder, "pairs"), tmp_path / "pairs")[0] == [(None, "b.txt")]
    samples, _ = _packed(_open(folder, "image-folder"), tmp_path / "images")
    assert samples == [(None, None), (None, "b.txt"), (None, None)]


def _members(keys: str, *fields: str, hidden: bool = False) -> list[tuple[str, bytes]]:
    contents = {"jpg": JPEG, "cls": b"1", "txt": b"a text", "json": b"{}"}
    names = [(f"{key}.{field}", contents[field]) for key in keys for field in fields]
    if not hidden:
        return names
    pairs = [[(f"d/._{name}", b"Mac OS X"), (f"d/{name}", payload)] for name, payload in names]
    return [("d/.DS_Store", b"x"), *(member for pair in pairs for member in pair), ("__MACOSX/d/q.jpg", b"x")]


def test_the_largest_label_of_tars_may_be_zero_and_is_refused_where_they_have_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "t.tar", _members("ab", "jpg", "cls"))
    source = open_source(str(tmp_path / "in"), None, SourceOptions(max_label=0))
    with pytest.raises(BadItemError, match="label 1 is not a whole number from 0 to 0"):
        source.read(0)
    write_tar(tmp_path / "in" / "t.tar", _members("ab", "jpg", "txt"))
    with pytest.raises(UserError, match="--max-label=0: there are no labels, so it would change nothing; leave it out"):
        open_source(str(tmp_path / "in"), None, SourceOptions(max_label=0))


@pytest.mark.parametrize("by_index", [False, True])
def test_a_tar_made_on_macos_keeps_its_labels_and_captions(tmp_path: Path, by_index: bool) -> None:
    write_tar(tmp_path / "in" / "t.tar", _members("ab", "jpg", "cls", "txt", hidden=True))
    if by_index:
        index_tars(tmp_path / "in")
        index = ShardIndex.open(tmp_path / "in")
        found = [(index.read(n)["cls"], index.read(n)["txt"]) for n in range(2)]
        assert found == [(b"1", b"a text")] * 2 and index.num_samples == 2
        assert verify(index, full=True).problems == []
    else:
        assert _packed(_open(tmp_path / "in"), tmp_path / "out") == ([("1", "a text")] * 2, {})


def test_what_samples_have_is_told_by_all_tars_and_not_by_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "in" / "0.tar", _members("a", "jpg"))
    write_tar(tmp_path / "in" / "1.tar", _members("bcd", "jpg", "cls") + _members("ef", "jpg", "cls", "txt"))
    with caplog.at_level(logging.INFO, "data_tools"):
        samples, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert samples == [("1", None)] * 3 + [("1", "a text")] * 2
    assert bad == {"0.tar:a": "no cls among its members (jpg)"}
    assert "6 samples in 2 tars, 5 with cls, 2 with txt" in caplog.text


def test_a_label_that_few_samples_have_is_left_aside_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "in" / "0.tar", _members("abc", "jpg") + _members("d", "jpg", "cls"))
    with caplog.at_level(logging.INFO, "data_tools"):
        assert _packed(_open(tmp_path / "in"), tmp_path / "out")[0] == [(None, None)] * 4
    assert "1 with cls; left aside: cls, which most samples lack" in caplog.text


@pytest.mark.parametrize("first", ["jpg", "txt"])
def test_a_tar_whose_samples_are_all_torn_apart_is_refused(tmp_path: Path, first: str) -> None:
    write_tar(tmp_path / "t.tar", _members("abc", first) + _members("abc", "txt" if first == "jpg" else "jpg"))
    for action in (lambda: index_tars(tmp_path), lambda: _open(tmp_path)):
        with pytest.raises(UserError, match="t.tar: the files of a do not lie side by side; .*--sort=name"):
            action()


@pytest.mark.parametrize("first", ["jpg", "txt"])
def test_a_sample_that_is_torn_apart_among_whole_ones_is_one_bad_item(tmp_path: Path, first: str) -> None:
    second = "txt" if first == "jpg" else "jpg"
    torn = [*_members("t", first), *_members("a", "cls", "jpg", "txt"), *_members("t", second), *_members("t", "cls")]
    write_tar(tmp_path / "in" / "0.tar", [*torn, *_members("bc", "cls", "jpg", "txt")])
    samples, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    reason = "its files do not lie side by side; write the tar again with tar --sort=name"
    assert (samples, bad) == ([("1", "a text")] * 3, {"0.tar:t": reason})
    assert index_tars(tmp_path / "in").num_samples == 3
    lines = [json.loads(line) for line in (tmp_path / "in" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["item"], line["reason"]) for line in lines] == [("0.tar:t", reason)]


@pytest.mark.parametrize(("name", "said"), [("x.tar", "1 of its 2 files are those of ilsvrc-train")])
def test_a_tar_of_tars_and_other_files_is_refused(tmp_path: Path, name: str, said: str) -> None:
    path = write_tar(tmp_path / "t.tar", [(name, b"x"), ("a.jpg", JPEG)])
    with pytest.raises(UserError, match=said):
        guess_format(path)


@pytest.mark.parametrize("label", [b"-1", b"3.5", b"1000001", b"9" * 20, b"9" * 5000, b"\xb2", b"", b"1 2"])
def test_a_label_in_a_tar_that_is_no_class_is_a_bad_item(tmp_path: Path, label: bytes) -> None:
    members = [
        (f"{key}.{f}", {"jpg": JPEG, "cls": label if key == "b" else b"7"}[f]) for key in "abc" for f in ("jpg", "cls")
    ]
    write_tar(tmp_path / "t.tar", members)
    index_tars(tmp_path)
    assert ShardIndex.open(tmp_path).num_classes == 8
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["reason"].startswith("label ")


def _make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may not be long
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.symlink_to({"link to itself": str(path), "link to nowhere": "gone", "device": "/dev/zero"}[kind])


SPECIAL = {
    "pipe": "not a regular file",
    "socket": "not a regular file",
    "device": "not a regular file",
    "link to itself": "a link to itself",
    "link to nowhere": "no such file",
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_a_bad_item(tmp_path: Path, kind: str) -> None:
    _make_special(_write(tmp_path / "in", "a/x.jpg") / "a" / "y.jpg", kind)
    _make_special(tmp_path / "in" / "a" / "z", kind)
    _, bad = _packed(_open(tmp_path / "in"), tmp_path / "out")
    assert bad == {"a/y.jpg": SPECIAL[kind]}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_a_table_is_a_bad_item(tmp_path: Path, kind: str) -> None:
    _make_special(_write(tmp_path, "x.jpg") / "y.jpg", kind)
    names = ["x.jpg", "y.jpg", "z\0.jpg", "n" * 300, "x.jpg/x.jpg"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"path": name, "label": 0}) + "\n" for name in names))
    _, bad = _packed(_open(tmp_path / "t.jsonl"), tmp_path / "out")
    assert bad == {"y.jpg": SPECIAL[kind], **dict.fromkeys(names[2:], "no such file")}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["s.tar", "s.csv", "s.parquet", "s.json", "s-images-idx3-ubyte", "s"])
def test_a_source_that_is_no_regular_file_is_one_line(tmp_path: Path, kind: str, name: str) -> None:
    _make_special(tmp_path / name, kind)
    with pytest.raises(UserError, match="no such file or folder|neither a regular file nor a folder"):
        _open(tmp_path / name)


def test_a_pipe_among_the_tars_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", _members("ab", "jpg"))
    os.mkfifo(tmp_path / "1.tar")
    for action in (lambda: index_tars(tmp_path), lambda: _open(tmp_path)):
        with pytest.raises(UserError, match="1.tar is no regular file"):
            action()


@pytest.mark.parametrize("target", [".", "..", "a", "../elsewhere"])
def test_folders_are_visited_once(tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, "in/a/x.jpg", "in/b/y.jpg", "elsewhere/z.jpg")
    (tmp_path / "elsewhere" / "back").symlink_to("../in")
    (tmp_path / "in" / "b" / "link").symlink_to(Path("..") / target)
    with caplog.at_level(logging.INFO, "data_tools"):
        source = _open(tmp_path / "in")
    names = [source.item_name(item) for item in range(len(source))]
    added = {"..": ["b/link/elsewhere/z.jpg"], "../elsewhere": ["b/link/z.jpg"]}.get(target, [])
    assert names == ["a/x.jpg", *added, "b/y.jpg"]
    assert "links to folders that are read already (b/link" in caplog.text


def test_two_classes_that_are_one_folder_are_refused(tmp_path: Path) -> None:
    (_write(tmp_path, "a/x.jpg") / "b").symlink_to("a")
    with pytest.raises(UserError, match="class folder b has no images of its own"):
        _open(tmp_path)
