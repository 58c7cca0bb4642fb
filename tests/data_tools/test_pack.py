from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.digits import DigitsSource
from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.stored_images import ImageRules
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from tests.machine import ROOT, TIME_LIMIT


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(DigitsSource(), out)
    return out


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return 50


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _pack_few(out: Path, samples_per_shard: int = 20, seed: int = 0) -> dict[str, bytes]:
    pack(_FewDigits(), out, PackSettings(samples_per_shard=samples_per_shard, seed=seed))
    return _contents(out)


def test_packing_twice_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    pack(DigitsSource(), tmp_path)
    first = _contents(packed)
    assert sorted(first) == [f"digits-{shard:06d}.tar" for shard in range(4)] + [
        "index.json",
        "keys.npy",
        "offsets.npy",
    ]
    assert _contents(tmp_path) == first
    pack(DigitsSource(), tmp_path)
    assert _contents(tmp_path) == first


def test_another_seed_gives_another_order_of_the_same_samples(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1):
        _pack_few(tmp_path / str(seed), seed=seed)
        index = ShardIndex.open(tmp_path / str(seed))
        orders.append([tuple(index.read(sample).values()) for sample in range(50)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_plain_webdataset_reads_the_same_samples(packed: Path) -> None:
    index = ShardIndex.open(packed)
    shards = [str(packed / shard.name) for shard in index.shards]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(found) == index.num_samples == 1797
    for sample_id, sample in enumerate(found):
        assert sample["__key__"] == f"{sample_id:09d}"
        assert {"png": sample["png"], "cls": sample["cls"]} == index.read(sample_id)


def test_the_packed_digits_are_those_of_scikit_learn(packed: Path) -> None:
    source, index = DigitsSource(), ShardIndex.open(packed)
    expected = Counter(tuple(source.read(item).values()) for item in range(len(source)))
    assert Counter(tuple(index.read(sample).values()) for sample in range(1797)) == expected


def test_classes_are_mixed_in_every_shard(packed: Path) -> None:
    index = ShardIndex.open(packed)
    labels = [int(index.read(sample)["cls"]) for sample in range(index.num_samples)]
    for start in range(0, index.num_samples, 512):
        shard = labels[start : start + 512]
        counts = np.bincount(shard, minlength=10) / len(shard)
        assert counts.min() > 0.05 and counts.max() < 0.15  # a tenth each, give or take


def test_the_index_describes_the_files(packed: Path) -> None:
    meta = json.loads((packed / "index.json").read_text())
    assert (meta["format"], meta["version"], meta["image_size"], meta["channels"]) == ("diffmoe-shards", 2, 8, 1)
    assert (meta["packing"]["source"], meta["packing"]["seed"]) == ("digits", 0)
    for name in ("offsets", "keys"):
        assert meta[name] == {"name": f"{name}.npy", "sha256": file_sha256(packed / f"{name}.npy")}
    assert [shard["num_samples"] for shard in meta["shards"]] == [512, 512, 512, 261]
    for shard in meta["shards"]:
        path = packed / shard["name"]
        assert (shard["num_bytes"], shard["sha256"]) == (path.stat().st_size, file_sha256(path))
    offsets = np.load(packed / "offsets.npy", allow_pickle=False)
    assert offsets.shape == (1797, 2, 3) and offsets.dtype == np.int64


def test_nothing_of_the_machine_enters_a_tar(packed: Path) -> None:
    with tarfile.open(packed / "digits-000000.tar") as tar:
        found = {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in tar}
    assert found == {(0, 0, 0, "root", "root", 0o644)}


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"OUT=.*something else \(thesis.tex\)"):
        _pack_few(tmp_path)
    assert _contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"samples_per_shard": 10}, {"samples_per_shard": 18}])
def test_a_pack_made_with_other_arguments_is_refused_and_left_alone(tmp_path: Path, arguments: dict[str, int]) -> None:
    before = _pack_few(tmp_path)
    with pytest.raises(UserError, match="OUT="):
        _pack_few(tmp_path, **arguments)
    assert _contents(tmp_path) == before


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="OUT=.*cannot be used as a folder"):
        _pack_few(tmp_path / "file")


def test_an_interrupted_pack_is_no_data_set_and_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _pack_few(tmp_path / "whole")
    out = tmp_path / "interrupted"
    _pack_few(out)
    (out / "digits-000001.tar.partial").write_bytes(b"left by a killed process")
    (out / "digits-000000.tar").unlink()

    def interrupt(num_samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(_FewDigits(), out, PackSettings(samples_per_shard=20), on_shard=interrupt)
    with pytest.raises(UserError, match="index.json is missing"):
        ShardIndex.open(out)
    assert _pack_few(out) == expected


def test_a_reader_that_fails_leaves_no_half_written_shard(tmp_path: Path) -> None:
    class Failing(_FewDigits):
        def read(self, item: int) -> dict[str, bytes]:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        pack(Failing(), tmp_path, PackSettings(samples_per_shard=20))
    assert _contents(tmp_path) == {}  # nothing but the note of what was begun


def test_every_file_takes_its_name_after_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(partial: Path, path: Path) -> Path:
        events.append(path.name)
        return replace(partial, path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    _pack_few(tmp_path)
    shards = [f"digits-{shard:06d}.tar{kind}" for shard in range(3) for kind in ("", ".json")]
    names = ["pack.json", *shards, "quarantine.jsonl", "offsets.npy", "keys.npy", "index.json"]
    assert events == [event for name in names for event in ("file", name, "folder")]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


@pytest.mark.slow
def test_the_command_packs_a_folder_that_opens(tmp_path: Path) -> None:
    done = _run("pack", "digits", str(tmp_path), "--samples-per-shard", "1000")
    assert done.returncode == 0 and "error" not in done.stderr  # a busy machine may show the progress
    assert done.stdout.startswith("packed 1797 samples into 2 shards") and f"data.shards={tmp_path}" in done.stdout
    assert ShardIndex.open(tmp_path).num_samples == 1797


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("pack", "digits"), "OUT"), (("pack", "digits", "unused", "--samples-per-shard", "0"), "--samples-per-shard=0")],
)
def test_a_bad_argument_ends_in_one_line_and_exit_code_2(arguments: tuple[str, ...], said: str) -> None:
    done = _run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr


def test_two_packs_into_one_folder_are_refused_by_naming_the_other(tmp_path: Path) -> None:
    _pack_few(tmp_path)
    (tmp_path / ".progress").mkdir()
    program = "import sys; from pathlib import Path; from data_tools.folder import lock_progress as take; "
    program += f"take(Path({str(tmp_path)!r}), 'OUT'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        with pytest.raises(UserError, match=f"OUT=.*process {other.pid} on .* writes it now; wait for its end"):
            _pack_few(tmp_path)
        other.communicate(timeout=TIME_LIMIT)
    _pack_few(tmp_path)
    with pytest.raises(UserError, match=r"packed before with other arguments .*\(--seed 0, now 3\)"):
        _pack_few(tmp_path, seed=3)


def test_of_another_pack_in_the_folder_only_the_options_that_differ_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "a.png")
    source, out = ImageFolderSource(tmp_path / "in"), tmp_path / "out"
    pack(source, out)
    other = PackSettings(shuffled=False, images=ImageRules("adm", 8, upright=True))
    said = "--order shuffled, now listed; --crop none, now adm; --size not given, now 8; --upright not given, now given"
    with pytest.raises(UserError, match=re.escape(f" ({said}); name")):
        pack(source, out, other)
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "b.png")
    with pytest.raises(UserError, match=re.escape(" (num_items 1, now 2); name")):
        pack(ImageFolderSource(tmp_path / "in"), out)
