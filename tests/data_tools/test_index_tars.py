"""Tars of another origin get an index and stay as they are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_tools.index_tars import index_tars
from data_tools.pack import PackSettings, pack
from data_tools.parallel import make_workers
from data_tools.tars import TarDamageError
from data_tools.verify import verify
from data_tools.webdataset_tars import WebDatasetSource
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.streamed_tar import stream_samples
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture

LONG = "a/" * 60 + "long"  # longer than the plain header's 100 bytes


def _write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), 1_700_000_000
            tar.addfile(info, io.BytesIO(payload))


def _sample(key: str, seed: int, caption: str = "a picture") -> list[tuple[str, bytes]]:
    """As img2dataset writes it."""
    described = {"caption": caption, "key": key, "status": "success", "width": 30}
    return [
        (f"{key}.jpg", encoded(picture(30, 20 + seed, seed))),
        (f"{key}.json", json.dumps(described).encode()),
        (f"{key}.txt", caption.encode()),
    ]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """img2dataset's output, with what happens to it: a half sample, a broken image, notes, other files."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    half = [member for member in _sample("000000002", 2) if not member[0].endswith(".jpg")]
    broken = [("000000003.jpg", encoded(picture(90, 90))[:-500]), *_sample("000000003", 3)[1:]]
    first = [*_sample("000000000", 0), *_sample("000000001", 1), *half, *broken, *_sample(LONG, 4, "ein Löwe")]
    _write(folder / "00000.tar", [("__notes__", b"none of ours"), *first])
    _write(
        folder / "00001.tar",
        [*_sample("000010000", 5), ("000010000.mask.png", b"of no use"), *_sample("x/000010001", 6)],
    )
    (folder / "00000_stats.json").write_text("{}")
    (folder / "00000.parquet").write_bytes(b"")
    return folder


def test_good_samples_of_foreign_tars_are_indexed_and_bad_ones_listed(foreign: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    packed = index_tars(foreign)
    assert (packed.num_samples, packed.num_bad, packed.num_shards) == (5, 2, 2)
    assert {name: (foreign / name).read_bytes() for name in before} == before
    index = ShardIndex.open(foreign)
    keys = [index.key(sample) for sample in range(5)]
    assert keys == ["000000000", "000000001", LONG, "000010000", "x/000010001"]
    assert (index.fields, index.num_classes, index.image_size) == (("jpg", "json", "txt"), 0, None)
    for sample, (key, seed) in enumerate(zip(keys, (0, 1, 4, 5, 6), strict=True)):
        caption = "ein Löwe" if key == LONG else "a picture"
        assert index.read(sample) == {name.rpartition(".")[2]: data for name, data in _sample(key, seed, caption)}
    lines = [json.loads(line) for line in (foreign / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["000000002", "000000003"]
    assert lines[0]["reason"] == "no image among its members (json, txt)" and "truncated" in lines[1]["reason"]
    assert verify(ShardIndex.open(foreign), full=True).problems == []
    assert sorted(path.name for path in foreign.iterdir()) == sorted(
        [*before, "index.json", "keys.npy", "offsets.npy", "quarantine.jsonl"]
    )


def test_the_index_of_foreign_tars_is_the_same_over_processes(foreign: Path) -> None:
    index_tars(foreign)
    names = ("index.json", "keys.npy", "offsets.npy", "quarantine.jsonl")
    first = {name: (foreign / name).read_bytes() for name in names}
    (foreign / "index.json").unlink()
    with make_workers(2) as workers:
        assert workers is not None
        index_tars(foreign, workers=workers)
    assert {name: (foreign / name).read_bytes() for name in names} == first


def test_keys_and_samples_are_those_that_webdataset_finds(foreign: Path) -> None:
    index_tars(foreign)
    index = ShardIndex.open(foreign)
    tars = [str(foreign / shard.name) for shard in index.shards]
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False) if "jpg" in sample}
    for sample in range(index.num_samples):
        payloads = index.read(sample)
        assert {field: found[index.key(sample)][field] for field in payloads} == payloads


def test_what_the_index_leaves_out_packing_again_leaves_out_too(foreign: Path, tmp_path: Path) -> None:
    index_tars(foreign)
    packed = pack(WebDatasetSource(foreign), tmp_path / "out", PackSettings(samples_per_shard=2))
    assert (packed.num_samples, packed.num_bad) == (5, 2)
    contents = []
    for folder in (foreign, tmp_path / "out"):
        index = ShardIndex.open(folder)
        contents.append(sorted(index.read(sample)["jpg"] for sample in range(5)))
    assert contents[0] == contents[1]


def test_labels_of_foreign_tars_must_be_numbers_and_be_there(tmp_path: Path) -> None:
    jpeg = encoded(picture(20, 20))
    labels = {"a": b"2\n", "b": b"0", "c": b"cat", "d": None, "e": b"1"}
    members = [(f"{key}.jpg", jpeg) for key in labels]
    members += [(f"{key}.cls", label) for key, label in labels.items() if label is not None]
    _write(tmp_path / "t.tar", sorted(members, key=lambda member: member[0][0]))
    index_tars(tmp_path)
    index = ShardIndex.open(tmp_path)
    assert [index.key(sample) for sample in range(3)] == ["a", "b", "e"]
    assert (index.num_classes, index.class_names) == (3, ["0", "1", "2"])
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["label 'cat' is not a number", "no cls among its members (jpg)"]
    assert index.read(0)["cls"] == b"2\n" and verify(ShardIndex.open(tmp_path), full=True).problems == []


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "zeroed header"])
def test_a_damaged_foreign_tar_is_refused_by_name(foreign: Path, damage: str) -> None:
    path = foreign / "00001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    if damage == "cut":
        del content[third + 100 :]
    elif damage == "cut at a member":
        del content[third:]
    else:
        content[third : third + 512] = bytes(512)
    path.write_bytes(content)
    for action in (lambda: index_tars(foreign), lambda: WebDatasetSource(foreign)):
        with pytest.raises(TarDamageError, match=r"00001.tar: damaged near byte \d+"):
            action()
    assert not (foreign / "index.json").exists()


def test_compressed_tars_are_refused(foreign: Path) -> None:
    (foreign / "00002.tar.gz").touch()
    with pytest.raises(UserError, match="00002.tar.gz is compressed .* gunzip it first"):
        index_tars(foreign)


def test_folders_that_need_no_index_or_cannot_have_one_are_refused(foreign: Path, tmp_path: Path) -> None:
    index_tars(foreign)
    with pytest.raises(UserError, match="has an index already"):
        index_tars(foreign)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .tar file"):
        index_tars(tmp_path / "empty")
    _write(tmp_path / "empty" / "t.tar", [("a.txt", b"text")])
    with pytest.raises(UserError, match="no sample with an image"):
        index_tars(tmp_path / "empty")
    with pytest.raises(UserError, match="FOLDER=.*not a folder"):
        index_tars(foreign / "00000.tar")


def test_more_bad_samples_than_allowed_are_listed_and_refused(foreign: Path) -> None:
    with pytest.raises(UserError, match="--max-bad=1: 2 bad samples so far, as 00000.tar:000000003"):
        index_tars(foreign, max_bad=1)
    assert len((foreign / "quarantine.jsonl").read_text().splitlines()) == 2
    assert not (foreign / "index.json").exists()


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["img_1.3.cls", "img_1.3.png", "img_1.V4.cls", "img_1.V4.png"], ["img_1.3", "img_1.V4"]),
        (["v1.a.png", "v1.b.png", "v1.a.cls", "v1.b.cls"], ["v1.a", "v1.b"]),
        (["d/a.1.cls", "d/a.1.jpg", "d/a.cls", "d/a.jpg"], ["d/a.1", "d/a"]),
        (["a.cls", "a.jpg", "a.mask.png"], ["a"]),  # a field more, as WebDataset has it
    ],
)
def test_keys_with_dots_are_read_where_the_members_are_samples_only_so_also_in_a_stream(
    tmp_path: Path, names: list[str], keys: list[str]
) -> None:
    members = [(name, b"1" if name.endswith("cls") else encoded(picture(20, 20), "PNG")) for name in names]
    _write(tmp_path / "t.tar", members)
    index_tars(tmp_path)
    index = ShardIndex.open(tmp_path)
    assert [index.key(sample) for sample in range(index.num_samples)] == keys
    assert all(index.read(sample)["cls"] == b"1" for sample in range(index.num_samples))
    assert verify(index, full=True).problems == []
    streamed = dict(stream_samples(str(tmp_path / "t.tar")))
    assert list(streamed) == keys
    for sample, key in enumerate(keys):
        assert index.read(sample).items() <= streamed[key].items()
    pack(WebDatasetSource(tmp_path), tmp_path / "out")
    assert ShardIndex.open(tmp_path / "out").num_samples == len(keys)
