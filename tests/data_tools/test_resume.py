"""A pack that was stopped, or whose shards were damaged, goes on where it was and ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import make_messy_folder
from tests.machine import ROOT


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_messy_folder(tmp_path_factory.mktemp("messy"))


@pytest.fixture(scope="module")
def expected(messy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    pack(ImageFolderSource(messy), out, PackSettings(samples_per_shard=4))
    return _contents(out)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _pack(messy: Path, out: Path) -> None:
    pack(ImageFolderSource(messy), out, PackSettings(samples_per_shard=4))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_killed_at_random_moments_ends_in_the_same_bytes(
    messy: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    moments, half_done = random.Random(workers), 0
    for attempt in range(8):
        process = _start(messy, out, workers)
        # At a random moment; every other time at one when a shard or two have just been finished.
        enough = len(list(out.glob("*.tar"))) + moments.randint(1, 2) if attempt % 2 else 99
        deadline = time.monotonic() + (60 if attempt % 2 else moments.uniform(0, 0.15 if workers == 1 else 1.2))
        while process.poll() is None and time.monotonic() < deadline and len(list(out.glob("*.tar"))) < enough:
            time.sleep(0.001)
        if process.poll() is None:
            _kill_session(process)
        if (out / "index.json").exists():
            assert {name: (out / name).read_bytes() for name in expected} == expected
            shutil.rmtree(out)  # it came to its end: begin anew
        else:
            half_done += 0 < len(list(out.glob("*.tar"))) < 16
    assert half_done >= 1
    assert _start(messy, out, workers).wait(60) == 0
    assert _contents(out) == expected


def _start(messy: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Start the command, and return when it has taken the folder and begins with the work."""
    command = [sys.executable, "-m", "data_tools", "pack", str(messy), str(out), "--samples-per-shard", "4"]
    begun = out / ".progress" / "pack.json"
    before = begun.stat().st_mtime_ns if begun.exists() else None
    process = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and (not begun.exists() or begun.stat().st_mtime_ns == before):
        time.sleep(0.001)
    return process


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End the command and the workers it started, all of its own session, without a chance to tidy up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_only_missing_and_damaged_shards_are_written_again(
    messy: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    _pack(messy, tmp_path)
    names = sorted(name for name in expected if name.endswith(".tar"))
    (tmp_path / names[1]).unlink()
    (tmp_path / names[3]).write_bytes(expected[names[3]][:-512])
    flipped = bytearray(expected[names[5]])
    flipped[700] ^= 1
    (tmp_path / names[5]).write_bytes(flipped)
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in names if (tmp_path / name).exists()}
    _pack(messy, tmp_path)
    assert _contents(tmp_path) == expected
    again = {name for name in names if (tmp_path / name).stat().st_mtime_ns != written.get(name)}
    assert again == {names[1], names[3], names[5]}


@pytest.mark.parametrize("name", ["index.json", "offsets.npy", "keys.npy", "quarantine.jsonl"])
def test_a_missing_or_damaged_file_of_the_index_is_made_again(
    messy: Path, expected: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    _pack(messy, tmp_path)
    if name != "index.json":  # without it nothing says whose shards these are
        (tmp_path / name).unlink()
        _pack(messy, tmp_path)
        assert _contents(tmp_path) == expected
        (tmp_path / name).write_bytes(b"damaged")
        _pack(messy, tmp_path)
        assert _contents(tmp_path) == expected
        return
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="holds something else"):
        _pack(messy, tmp_path)


def test_a_whole_pack_stays_a_data_set_while_it_is_checked(
    messy: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    _pack(messy, tmp_path)
    seen = []
    pack(
        ImageFolderSource(messy),
        tmp_path,
        PackSettings(samples_per_shard=4),
        on_shard=lambda n: seen.append(_whole(tmp_path)),
    )
    assert seen == [True] * 16 and _contents(tmp_path) == expected


def _whole(folder: Path) -> bool:
    return ShardIndex.open(folder).num_samples == 60


def test_a_damaged_record_of_a_shard_costs_only_that_shard(
    messy: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    done = []

    def stop(num_items: int) -> None:
        done.append(num_items)
        if len(done) == 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack(ImageFolderSource(messy), tmp_path, PackSettings(samples_per_shard=4), on_shard=stop)
    records = sorted((tmp_path / ".progress").glob("*.tar.json"))
    assert len(records) == 6
    records[0].write_bytes(b"{")
    records[1].write_bytes(b"[]")
    records[2].unlink()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    _pack(messy, tmp_path)
    same = [name for name, moment in sorted(before.items()) if (tmp_path / name).stat().st_mtime_ns == moment]
    assert same == [f"image-folder-{shard:06d}.tar" for shard in (3, 4, 5)]
    assert _contents(tmp_path) == expected


def test_a_bad_item_that_was_repaired_is_taken_up_and_moves_no_other_sample(
    messy: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(messy, tmp_path / "in"))
    _pack(copied, tmp_path / "out")
    assert _contents(tmp_path / "out") == expected
    shutil.copy(copied / "cat" / "plain.jpg", copied / "cat" / "empty.jpg")
    _pack(copied, tmp_path / "out")
    old, new = ShardIndex.open(_restore(expected, tmp_path / "old")), ShardIndex.open(tmp_path / "out")
    assert new.num_samples == old.num_samples + 1
    by_key = {new.key(sample): new.read(sample) for sample in range(new.num_samples)}
    assert {old.key(sample): old.read(sample) for sample in range(old.num_samples)}.items() <= by_key.items()
    assert "cat/empty.jpg" not in (tmp_path / "out" / "quarantine.jsonl").read_text()


def _restore(contents: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder
