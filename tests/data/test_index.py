from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.digits import DigitsSource
from data_tools.pack import pack
from diffmoe_dist.data import index as index_module
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.errors import UserError


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return 50


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(_FewDigits(), out, samples_per_shard=20, seed=0)
    return out


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((folder / "index.json").read_text())
    change(meta)
    (folder / "index.json").write_text(json.dumps(meta))


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ShardIndex.open(folder)
    message = str(caught.value)
    assert message.startswith(f"data.shards={folder}: ") and "; " in message and "\n" not in message
    return message


def test_an_opened_index_tells_what_was_packed(packed: Path) -> None:
    index = ShardIndex.open(packed)
    assert (index.num_samples, index.num_classes, index.image_size, index.channels) == (50, 10, 8, 1)
    assert index.fields == ("png", "cls") and index.class_names == [str(digit) for digit in range(10)]
    assert [shard.num_samples for shard in index.shards] == [20, 20, 10]
    assert index.fingerprint == hashlib.sha256((packed / "index.json").read_bytes()).hexdigest()


def test_a_sample_is_read_whole_and_the_same_twice(packed: Path) -> None:
    index = ShardIndex.open(packed)
    first = [index.read(sample) for sample in range(50)]
    assert first == [index.read(sample) for sample in range(50)]
    assert all(sample["png"].startswith(b"\x89PNG") and 0 <= int(sample["cls"]) <= 9 for sample in first)


@pytest.mark.parametrize("sample_id", [-1, 50])
def test_a_sample_id_outside_the_set_is_an_index_error(packed: Path, sample_id: int) -> None:
    with pytest.raises(IndexError):
        ShardIndex.open(packed).read(sample_id)


def test_an_index_in_use_survives_pickling_forking_and_spawning(packed: Path) -> None:
    index = ShardIndex.open(packed)
    expected = index.read(7)
    copy = pickle.loads(pickle.dumps(index))
    assert copy._offsets is None  # they stay on the disk: a large set has hundreds of megabytes of them
    assert copy.read(7) == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(index.read, (7,)) == expected


def test_few_shards_are_open_at_a_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_MAX_OPEN_SHARDS", 2)
    index = ShardIndex.open(packed)
    expected = ShardIndex.open(packed)
    for sample in (0, 20, 40, 1, 21, 41, 22):
        assert index.read(sample) == expected.read(sample)
        assert len(index._open_shards) <= 2
    index.close()
    assert not index._open_shards and index.read(3) == expected.read(3)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in _refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["index.json", "offsets.npy", "digits-000001.tar"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in _refusal(folder)


@pytest.mark.parametrize("cut", [1, 512, 10240])
def test_a_cut_shard_is_refused(folder: Path, cut: int) -> None:
    shard = folder / "digits-000002.tar"
    shard.write_bytes(shard.read_bytes()[:-cut])
    assert "digits-000002.tar has" in _refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}"])
def test_an_index_that_is_no_index_is_refused(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    assert "index.json" in _refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: meta.update(format="other"), "says other version 1"),
        (lambda meta: meta.update(version=2), "version 2"),
        (lambda meta: meta.update(num_samples=51), "says 51 samples but its shards hold 50"),
        (lambda meta: meta["shards"].pop(), "says 50 samples but its shards hold 40"),
        (lambda meta: meta["shards"].clear(), "hold 0"),
        (lambda meta: meta["shards"][0].update(num_samples=19), "hold 49"),
        (lambda meta: meta["shards"][1].update(num_bytes=7), "digits-000001.tar has"),
        (lambda meta: meta["shards"][0].update(name="../other.tar"), "not the name of a file"),
        (lambda meta: meta["offsets"].update(file="/etc/passwd"), "not the name of a file"),
        (lambda meta: meta["offsets"].update(sha256="0" * 64), "offsets.npy has SHA-256"),
        (lambda meta: meta.update(num_classes=11), "11 classes but names 10"),
        (lambda meta: meta.update(image_size="8"), "image_size is '8', not int"),
        (lambda meta: meta.update(channels=0), "not a positive number"),
        (lambda meta: meta.update(fields=["png"]), "offsets.npy holds"),
        (lambda meta: meta.pop("fields"), "no entry 'fields'"),
    ],
)
def test_an_edited_index_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    _edit(folder, change)
    assert said in _refusal(folder)


def test_edited_offsets_are_refused(folder: Path) -> None:
    offsets = bytearray((folder / "offsets.npy").read_bytes())
    offsets[-1] ^= 1
    (folder / "offsets.npy").write_bytes(offsets)
    assert "offsets.npy has SHA-256" in _refusal(folder)


def test_offsets_are_never_unpickled(folder: Path) -> None:
    np.save(folder / "offsets.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    sha256 = hashlib.sha256((folder / "offsets.npy").read_bytes()).hexdigest()
    _edit(folder, lambda meta: meta["offsets"].update(sha256=sha256))
    assert "offsets.npy is damaged" in _refusal(folder)


def _flip_payload_byte(folder: Path, sample_id: int, field: int) -> Path:
    shard = folder / f"digits-{sample_id // 20:06d}.tar"
    content = bytearray(shard.read_bytes())
    offset, size, _ = np.load(folder / "offsets.npy", allow_pickle=False)[sample_id, field]
    content[offset + size // 2] ^= 1
    shard.write_bytes(content)
    return shard


@pytest.mark.parametrize("field", [0, 1])
def test_a_flipped_payload_byte_is_reported_with_shard_and_key(folder: Path, field: int) -> None:
    shard = _flip_payload_byte(folder, 33, field)
    index = ShardIndex.open(folder)
    index.read(32)
    with pytest.raises(CorruptShardError, match=re.escape(f"{shard}, key 000000033: {index.fields[field]}")):
        index.read(33)


def test_a_shard_cut_or_removed_while_running_is_reported_with_shard_and_key(folder: Path) -> None:
    cut, removed = folder / "digits-000000.tar", folder / "digits-000002.tar"
    index = ShardIndex.open(folder)
    cut.write_bytes(cut.read_bytes()[:2000])
    removed.unlink()
    with pytest.raises(CorruptShardError, match=re.escape(f"{cut}, key 000000019: png is cut")):
        index.read(19)
    with pytest.raises(CorruptShardError, match=re.escape(f"{removed}, key 000000040: cannot be read")):
        index.read(40)
