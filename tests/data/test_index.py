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
from data_tools.folder import ShardFolder
from data_tools.pack import PackSettings, pack
from data_tools.shards import write_shard
from diffmoe_dist.data import index as index_module
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.errors import UserError


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return 50


_LATENTS: dict[str, Any] = {
    "parametrisation": "mean_logvar", "channels": 4, "height": 2, "width": 2, "views": ["plain"],
    "scale": [0.18215] * 4, "shift": [0.0] * 4,
    "input_range": [-1.0, 1.0], "image_size": 16, "crop": "adm", "vae_sha256": "0" * 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(_FewDigits(), out, PackSettings(samples_per_shard=20))
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
    assert index.image_fields == ("png",) and (index.base, index.latents, index.text) == (None, None, None)
    assert [index.key(sample) for sample in (0, 7, 49)] == ["000000000", "000000007", "000000049"]
    assert [index.samples_of(shard) for shard in range(3)] == [range(20), range(20, 40), range(40, 50)]
    assert [index.shard_of(sample) for sample in (0, 19, 20, 49)] == [0, 0, 1, 2]
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
    assert copy.read(7) == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(index.read, (7,)) == expected


def test_few_shards_are_open_at_a_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_MAX_OPEN_FILES", 2)
    index = ShardIndex.open(packed)
    expected = ShardIndex.open(packed)
    for sample in (0, 20, 40, 1, 21, 41, 22):
        assert index.read(sample) == expected.read(sample)
        assert len(index._open_shards) <= 2
    index.close()
    assert not index._open_shards and index.read(3) == expected.read(3)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in _refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["index.json", "offsets.npy", "keys.npy", "digits-000001.tar"])
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
        (lambda meta: meta.update(format="other"), "says other version 2"),
        (lambda meta: meta.update(version=1), "version 1"),
        (lambda meta: meta.update(num_samples=51), "says 51 samples but its shards hold 50"),
        (lambda meta: meta["shards"].pop(), "says 50 samples but its shards hold 40"),
        (lambda meta: meta["shards"].clear(), "hold 0"),
        (lambda meta: meta["shards"][0].update(num_samples=19), "hold 49"),
        (lambda meta: meta["shards"][1].update(num_bytes=7), "digits-000001.tar has"),
        (lambda meta: meta["shards"][0].update(name="../other.tar"), "not the name of a file"),
        (lambda meta: meta["offsets"].update(name="/etc/passwd"), "not the name of a file"),
        (lambda meta: meta["offsets"].update(sha256="0" * 64), "offsets.npy has SHA-256"),
        (lambda meta: meta.update(num_classes=11), "11 classes but names 10"),
        (lambda meta: meta.update(image_size="8"), "image_size is '8', not int"),
        (lambda meta: meta.update(channels=0), "not a positive number"),
        (lambda meta: meta.update(fields=["png"]), "offsets.npy holds"),
        (lambda meta: meta.pop("fields"), "no entry 'fields'"),
        (lambda meta: meta["keys"].update(sha256="0" * 64), "keys.npy has SHA-256"),
        (lambda meta: meta.update(latents=_LATENTS | {"scale": [1.0]}), "scale has 1 numbers, not 4"),
        (lambda meta: meta.update(latents=_LATENTS | {"channels": 0}), "not a positive number"),
        (lambda meta: meta.update(text={}), "no entry 'encoder'"),
        (lambda meta: meta.update(base={"fingerprint": 1}), "fingerprint is 1, not str"),
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


@pytest.mark.parametrize("sample_id", [-1, 50])
def test_a_key_outside_the_set_is_an_index_error(packed: Path, sample_id: int) -> None:
    with pytest.raises(IndexError):
        ShardIndex.open(packed).key(sample_id)


def test_only_the_fields_asked_for_are_read(folder: Path) -> None:
    _flip_payload_byte(folder, 33, 0)
    index = ShardIndex.open(folder)
    assert index.read(33, ("cls",)).keys() == {"cls"} and index.read(33, ()) == {}
    assert index.read(32) == {**index.read(32, ("cls",)), **index.read(32, ("png",))}


@pytest.mark.parametrize("field", [0, 1])
def test_a_zeroed_header_is_reported_with_shard_and_key_although_the_payload_is_whole(folder: Path, field: int) -> None:
    shard = folder / "digits-000001.tar"
    offset = np.load(folder / "offsets.npy")[33, field, 0]
    content = bytearray(shard.read_bytes())
    content[offset - 512 : offset] = bytes(512)
    shard.write_bytes(content)
    with pytest.raises(CorruptShardError, match=re.escape(f"{shard}, key 000000033: ") + "(png|cls) is damaged"):
        ShardIndex.open(folder).read(33)


def test_shards_that_changed_places_are_noticed_at_the_first_read(folder: Path) -> None:
    first, second = folder / "digits-000000.tar", folder / "digits-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())  # of the same size, as all shards of digits are
    second.write_bytes(content)
    with pytest.raises(CorruptShardError, match="digits-000000.tar, key 000000000"):
        ShardIndex.open(folder).read(0)


def test_the_index_of_another_order_is_noticed_at_the_first_read(folder: Path, tmp_path: Path) -> None:
    pack(_FewDigits(), tmp_path / "other", PackSettings(samples_per_shard=20, seed=1))
    for name in ("index.json", "offsets.npy", "keys.npy"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    index = ShardIndex.open(folder)  # the shards of the two have the same sizes
    with pytest.raises(CorruptShardError, match="digits-000000.tar, key 000000000"):
        index.read(0)


def test_offsets_that_are_cut_while_in_use_are_reported(folder: Path) -> None:
    index = ShardIndex.open(folder)
    index.read(0)
    (folder / "offsets.npy").write_bytes((folder / "offsets.npy").read_bytes()[:1000])
    with pytest.raises(CorruptShardError, match="offsets.npy: cut while in use"):
        index.read(49)


def test_what_an_index_holds_does_not_grow_with_the_samples(folder: Path) -> None:
    small = len(pickle.dumps(ShardIndex.open(folder)))
    repeat = 1000
    for name in ("offsets.npy", "keys.npy"):
        np.save(folder / name, np.concatenate([np.load(folder / name)] * repeat))
        sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        _edit(folder, lambda meta, name=name, sha256=sha256: meta[name[:-4]].update(sha256=sha256))  # type: ignore[misc]
    _edit(folder, lambda meta: meta.update(num_samples=50 * repeat))
    _edit(folder, lambda meta: meta["shards"][0].update(num_samples=20 + 50 * (repeat - 1)))
    index = ShardIndex.open(folder)
    assert index.read(3)["png"].startswith(b"\x89PNG") and index.key(50 * repeat - 1) == "000000049"
    arrays = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert arrays == [] and len(pickle.dumps(index)) < small + 100


def _side_folder(base: ShardIndex, out: Path, keys: Callable[[int], str]) -> Path:
    """Latents of ones, beside a base."""
    description = {
        "base": {"fingerprint": base.fingerprint, "keys_sha256": base.meta.keys.sha256},
        "latents": _LATENTS,
    }
    side = ShardFolder(out, [f"latents-{shard:06d}.tar" for shard in range(len(base.shards))], {"command": "a test"})
    side.claim()
    payload = np.ones((1, 8, 2, 2), dtype=np.float16).tobytes()
    for shard, slot in enumerate(side.slots):
        slot.save(write_shard(slot.begin(), ((keys(i), {"latent.npy": payload}) for i in base.samples_of(shard))))
    side.finish(description)
    return out


def test_a_side_folder_belongs_to_its_base_and_to_no_other(packed: Path, tmp_path: Path) -> None:
    base = ShardIndex.open(packed)
    side = ShardIndex.open(_side_folder(base, tmp_path / "latents", base.key))
    side.check_base(base)
    assert side.num_samples == base.num_samples and side.key(33) == base.key(33)
    assert (side.image_size, side.channels, side.num_classes, side.image_fields) == (None, None, 0, ())
    assert side.fields == ("latent.npy",) and side.read(7).keys() == {"latent.npy"}
    assert side.latents is not None and side.latents.scale == (0.18215,) * 4 and side.latents.views == ("plain",)
    pack(_FewDigits(), tmp_path / "other", PackSettings(samples_per_shard=20, seed=1))
    with pytest.raises(UserError, match="data.shards=.*latents: computed from another data set"):
        side.check_base(ShardIndex.open(tmp_path / "other"))
    with pytest.raises(UserError, match="not a side folder"):
        base.check_base(base)


def test_a_side_folder_with_other_keys_is_refused(packed: Path, tmp_path: Path) -> None:
    base = ShardIndex.open(packed)
    side = ShardIndex.open(_side_folder(base, tmp_path / "latents", lambda sample_id: base.key(49 - sample_id)))
    with pytest.raises(UserError, match="its keys are not those of"):
        side.check_base(base)


def test_latents_of_mean_and_standard_deviation_are_refused(packed: Path, tmp_path: Path) -> None:
    base = ShardIndex.open(packed)
    folder = _side_folder(base, tmp_path / "latents", base.key)
    _edit(folder, lambda meta: meta["latents"].update(parametrisation="mean_std"))
    assert "latents are mean_std, this program reads mean_logvar" in _refusal(folder)
