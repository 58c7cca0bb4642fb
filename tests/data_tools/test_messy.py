"""A folder as it is found: what is good is packed, what is bad is listed, whoever does the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.stored_images import ImageRules
from data_tools.verify import verify
from diffmoe_dist.data.images import decode_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import BAD, NUM_GOOD, make_messy_folder
from tests.machine import ROOT, TIME_LIMIT, needs_mpirun

ARGUMENTS = ("--samples-per-shard", "10", "--crop", "adm", "--size", "32")


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_messy_folder(tmp_path_factory.mktemp("messy"))


@pytest.fixture(scope="module")
def serial(messy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: resized, packed in this process."""
    out = tmp_path_factory.mktemp("serial") / "out"
    pack(ImageFolderSource(messy), out, PackSettings(samples_per_shard=10, images=ImageRules("adm", 32)))
    return out


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _run(messy: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *(("-m", "mpi4py") if launcher else ()), "-m", "data_tools"]
    return subprocess.run(
        [*launcher, *program, "pack", str(messy), str(out), *ARGUMENTS, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("resized", [False, True])
def test_every_bad_item_is_listed_with_its_reason_and_every_good_one_is_packed(
    messy: Path, tmp_path: Path, resized: bool
) -> None:
    source = ImageFolderSource(messy)
    packed = pack(
        source, tmp_path, PackSettings(samples_per_shard=10, images=ImageRules("adm", 32) if resized else ImageRules())
    )  # fmt: skip
    assert (packed.num_samples, packed.num_bad) == (NUM_GOOD, len(BAD))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["item"]: line["reason"] for line in lines}
    assert set(reasons) == set(BAD)
    assert all(reasons[item].startswith(reason) for item, reason in BAD.items())
    keys = {ShardIndex.open(tmp_path).key(sample) for sample in range(NUM_GOOD)}
    assert keys | {line["key"] for line in lines} == {f"{position:09d}" for position in range(NUM_GOOD + len(BAD))}
    assert verify(ShardIndex.open(tmp_path), full=True).problems == []


def test_files_that_are_not_resized_are_packed_byte_for_byte_with_their_label(messy: Path, tmp_path: Path) -> None:
    pack(ImageFolderSource(messy), tmp_path, PackSettings(samples_per_shard=10))
    index = ShardIndex.open(tmp_path)
    assert (index.image_size, index.channels, index.class_names) == (None, 3, ["cat", "dog"])
    assert index.fields == ("gif", "jpg", "png", "webp", "cls")
    expected = sorted(
        (path.read_bytes(), str(label).encode())
        for label, name in enumerate(("cat", "dog"))
        for path in (messy / name).rglob("*.*")
        if path.relative_to(messy).as_posix() not in BAD
    )
    samples = [index.read(sample) for sample in range(index.num_samples)]
    assert all(len(sample) == 2 for sample in samples)
    found = [
        (next(sample[field] for field in index.image_fields if field in sample), sample["cls"]) for sample in samples
    ]
    assert sorted(found) == expected


def test_resized_images_all_have_one_size_and_plain_webdataset_reads_them(serial: Path) -> None:
    index = ShardIndex.open(serial)
    assert (index.image_size, index.fields) == (32, ("webp", "cls"))
    found = list(webdataset.WebDataset([str(serial / s.name) for s in index.shards], shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [index.key(sample) for sample in range(NUM_GOOD)]
    for number, sample in enumerate(found):
        assert {"webp": sample["webp"], "cls": sample["cls"]} == index.read(number)
        assert np.asarray(decode_image(sample["webp"], 3)).shape == (32, 32, 3)


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_write_the_same_bytes_as_one(messy: Path, serial: Path, tmp_path: Path, workers: int) -> None:
    done = _run(messy, tmp_path / "out", "--workers", str(workers))
    assert done.returncode == 0, done.stderr
    assert _contents(tmp_path / "out") == _contents(serial)


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpi_ranks_write_the_same_bytes_as_one_process(messy: Path, serial: Path, tmp_path: Path, ranks: int) -> None:
    launcher = ("mpirun", "--oversubscribe", "-n", str(ranks))
    done = _run(messy, tmp_path / "out", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"packed {NUM_GOOD} samples into 7 shards") and done.stdout.count("packed") == 1
    assert _contents(tmp_path / "out") == _contents(serial)


@needs_mpirun
def test_a_mistake_under_mpi_is_one_line_and_exit_code_2(messy: Path, tmp_path: Path) -> None:
    done = _run(messy, tmp_path / "out", "--max-bad", "3", launcher=("mpirun", "--oversubscribe", "-n", "2"))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "--max-bad=3: 4 bad items so far" in done.stderr


def test_more_bad_items_than_allowed_stop_the_pack_and_are_listed_and_a_higher_limit_goes_on(
    messy: Path, serial: Path, tmp_path: Path
) -> None:
    source, rules = ImageFolderSource(messy), ImageRules("adm", 32)
    with pytest.raises(UserError, match=r"--max-bad=3: 4 bad items so far, as cat/empty.jpg \(the file is empty\)"):
        pack(source, tmp_path, PackSettings(samples_per_shard=10, images=rules), max_bad=3)
    assert (tmp_path / "quarantine.jsonl").read_bytes() == (serial / "quarantine.jsonl").read_bytes()
    with pytest.raises(UserError, match="index.json is missing"):
        ShardIndex.open(tmp_path)
    pack(source, tmp_path, PackSettings(samples_per_shard=10, images=rules), max_bad=4)
    assert _contents(tmp_path) == _contents(serial)


def test_a_source_of_bad_items_alone_makes_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no sample is left, all 1 items are bad"):
        pack(ImageFolderSource(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_file_that_is_gone_since_the_listing_is_bad_and_a_disk_that_fails_stops_the_pack(
    messy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(messy, tmp_path / "in"))
    source = ImageFolderSource(copied)
    (copied / "cat" / "plain.jpg").unlink()
    pack(source, tmp_path / "out", PackSettings(samples_per_shard=10))
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {"cat/plain.jpg": "no such file"}.items() <= {line["item"]: line["reason"] for line in lines}.items()

    def fail(path: Path, flags: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source.read(3)


def test_other_files_in_the_source_make_another_pack(messy: Path, serial: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(messy, tmp_path / "in"))
    (copied / "cat" / "plain.jpg").rename(copied / "cat" / "renamed.jpg")
    out = Path(shutil.copytree(serial, tmp_path / "out"))
    with pytest.raises(UserError, match="packed before with other arguments"):
        pack(ImageFolderSource(copied), out, PackSettings(samples_per_shard=10, images=ImageRules("adm", 32)))
    assert _contents(out) == _contents(serial)
