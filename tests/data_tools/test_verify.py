"""No damage to a folder of shards is silent."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.verify import verify
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, make_messy_folder, picture

SHARD = "image-folder-000002.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(
        ImageFolderSource(make_messy_folder(tmp_path_factory.mktemp("messy"))), out, PackSettings(samples_per_shard=10)
    )
    return out


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def _place(folder: Path, field: str = "cls") -> tuple[int, str]:
    """Payload offset and key of the third sample of the shard."""
    index = ShardIndex.open(folder)
    sample = index.samples_of(2)[2]
    offset = next(offset for name, offset, _, _ in index.entries(sample) if name == field)
    return offset, index.key(sample)


def _change(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _first_error_in_training(folder: Path) -> str:
    """What training says: at its start, or at the first read of the damaged sample."""
    try:
        index = ShardIndex.open(folder)
        for sample in range(index.num_samples):
            index.read(sample)
    except (CorruptShardError, UserError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_folder_has_no_problems(packed: Path, full: bool) -> None:
    verified = verify(ShardIndex.open(packed), full=full)
    assert (verified.num_samples, verified.num_shards, verified.problems) == (60, 7, [])


@pytest.mark.parametrize("cut", [1, 512, 4096])
def test_a_cut_shard_is_named(folder: Path, cut: int) -> None:
    _change(folder / SHARD, lambda content: content.__delitem__(slice(-cut, None)))
    with pytest.raises(UserError, match=f"{SHARD} has"):
        verify(ShardIndex.open(folder), full=False)
    assert f"{SHARD} has" in _first_error_in_training(folder)


def test_a_flipped_byte_is_named_with_shard_and_key(folder: Path) -> None:
    offset, key = _place(folder)
    _change(folder / SHARD, lambda content: content.__setitem__(offset, content[offset] ^ 1))
    problems = verify(ShardIndex.open(folder), full=True).problems
    assert [SHARD in problem for problem in problems] == [True, True]
    assert "SHA-256" in problems[0] and f"key {key}: cls is damaged" in problems[1]
    assert f"{SHARD}, key {key}: cls is damaged" in _first_error_in_training(folder)


def test_a_flipped_byte_between_the_members_is_named_by_verify(folder: Path) -> None:
    offset, _ = _place(folder)
    _change(folder / SHARD, lambda content: content.__setitem__(offset + 100, 1))  # a label is one byte
    problems = verify(ShardIndex.open(folder), full=True).problems
    assert len(problems) == 1 and SHARD in problems[0] and "SHA-256" in problems[0]


def test_a_zeroed_header_is_named(folder: Path) -> None:
    offset, key = _place(folder)
    _change(folder / SHARD, lambda content: content.__setitem__(slice(offset - 512, offset), bytes(512)))
    problems = verify(ShardIndex.open(folder), full=True).problems
    assert any(f"{SHARD}: damaged near byte {offset - 512}" in problem for problem in problems)
    assert any(f"key {key}: cls is damaged" in problem for problem in problems)
    assert f"{SHARD}, key {key}: cls is damaged" in _first_error_in_training(folder)


def test_a_missing_member_is_named(folder: Path) -> None:
    """The tar is written again without one member, and filled up to its old size."""
    _, key = _place(folder)
    rewritten = io.BytesIO()
    with (
        tarfile.open(folder / SHARD) as old,
        tarfile.open(fileobj=rewritten, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old:
            if member.name != f"{key}.cls":
                new.addfile(member, old.extractfile(member))
    size = (folder / SHARD).stat().st_size
    (folder / SHARD).write_bytes(rewritten.getvalue().ljust(size, b"\0")[:size])
    problems = verify(ShardIndex.open(folder), full=True).problems
    assert any(f"key {key}: cls is" in problem and "in the tar" in problem for problem in problems), problems
    assert f"{SHARD}, key " in _first_error_in_training(folder)


def test_a_member_too_many_is_named(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    with tarfile.open(folder / SHARD, "a") as tar:
        info = tarfile.TarInfo("stranger.jpg")
        tar.addfile(info)
    index["shards"][2]["num_bytes"] = (folder / SHARD).stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    assert any(
        "member stranger.jpg is not in the index" in problem
        for problem in verify(ShardIndex.open(folder), full=True).problems
    )


@pytest.mark.parametrize(
    "names", [("index.json",), ("offsets.npy",), ("keys.npy",), ("index.json", "offsets.npy", "keys.npy")]
)
def test_a_swapped_index_is_named(folder: Path, packed: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """The index, or a part of it, of the same images in another order."""
    source = ImageFolderSource(make_messy_folder(tmp_path / "messy"))
    pack(source, tmp_path / "other", PackSettings(samples_per_shard=10, seed=1))
    for name in names:
        shutil.copy(tmp_path / "other" / name, folder / name)
    with pytest.raises(UserError, match="data.shards=.*(SHA-256|has .* bytes)"):
        verify(ShardIndex.open(folder), full=False)
    assert str(folder) in _first_error_in_training(folder)


def test_swapped_shards_of_one_size_are_named_by_the_quick_look(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{number}.bmp").write_bytes(encoded(picture(20, 20, number), "BMP"))
    out = tmp_path / "out"
    pack(ImageFolderSource(tmp_path / "in"), out, PackSettings(samples_per_shard=2))
    first, second = out / "image-folder-000000.tar", out / "image-folder-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    problems = verify(ShardIndex.open(out), full=False).problems
    assert any("image-folder-000000.tar, key 000000000" in problem for problem in problems)


def test_a_damaged_or_missing_quarantine_list_is_named(folder: Path) -> None:
    with (folder / "quarantine.jsonl").open("ab") as file:
        file.write(b"\n")
    assert "quarantine.jsonl: not the one" in verify(ShardIndex.open(folder), full=False).problems[0]
    (folder / "quarantine.jsonl").unlink()
    assert "quarantine.jsonl: missing" in verify(ShardIndex.open(folder), full=False).problems[0]


def test_samples_that_contradict_the_index_are_named(tmp_path: Path) -> None:
    class Wrong:
        """Stored as read: an image of another size, one that is none, a label out of range."""

        name, class_names, channels, image_size, labels = "wrong", ("a", "b"), 3, 8, None

        def __len__(self) -> int:
            return 3

        def item_name(self, item: int) -> str:
            return str(item)

        def part(self, items: np.ndarray) -> Wrong:
            return self

        def read(self, item: int) -> dict[str, bytes]:
            right = encoded(picture(8, 8), "PNG")
            images = [encoded(picture(8, 9), "PNG"), b"none", right]
            return {"png": images[item], "cls": b"5" if item == 2 else b"1"}

    pack(Wrong(), tmp_path, PackSettings(shuffled=False))  # type: ignore[arg-type]
    problems = verify(ShardIndex.open(tmp_path), full=True).problems
    said = ["8x9 pixels, the index says 8", "png: not an image", "label b'5' is not a number below 2"]
    assert [said[n] in problem and f"key {n:09d}" in problem for n, problem in enumerate(problems)] == [True] * 3


def test_verify_finds_the_same_over_processes(folder: Path) -> None:
    from data_tools.parallel import make_workers

    offset, _ = _place(folder)
    _change(folder / SHARD, lambda content: content.__setitem__(offset, content[offset] ^ 1))
    with make_workers(2) as workers:
        assert workers is not None
        assert verify(ShardIndex.open(folder), full=True, workers=workers) == verify(ShardIndex.open(folder), full=True)
