"""pack --hold-out: a second folder whose samples are chosen by their keys alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack, pack_and_hold_out
from data_tools.pack_plan import plan_pack
from data_tools.sources import SourceOptions, open_source
from data_tools.verify import verify
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture
from tests.data_tools.tar_files import write_tar
from tests.machine import ROOT, TIME_LIMIT, needs_mpirun


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return 300


def _samples(folder: Path) -> dict[str, dict[str, bytes]]:
    index = ShardIndex.open(folder)
    assert verify(index, full=True).problems == []
    return {index.key(sample): dict(index.read(sample)) for sample in range(index.num_samples)}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shuffled", [True, False])
def test_held_out_are_the_keys_of_the_smallest_sums_and_both_folders_together_are_the_whole_pack(
    tmp_path: Path, shuffled: bool
) -> None:
    pack(_FewDigits(), tmp_path / "whole", PackSettings(shuffled=shuffled))
    pack_and_hold_out(_FewDigits(), tmp_path / "out", PackSettings(shuffled=shuffled, hold_out=97))
    whole, trained_on = _samples(tmp_path / "whole"), _samples(tmp_path / "out")
    held_out = _samples(tmp_path / "out-held-out")
    assert set(held_out) == set(sorted(whole, key=lambda key: hashlib.sha256(key.encode()).digest())[:97])
    assert not held_out.keys() & trained_on.keys() and held_out | trained_on == whole
    assert len({sample["cls"] for sample in held_out.values()}) == 10  # of every class, whatever the order
    pack_and_hold_out(_FewDigits(), tmp_path / "more", PackSettings(shuffled=shuffled, hold_out=98))
    assert held_out.keys() < _samples(tmp_path / "more-held-out").keys()


def test_a_bad_item_moves_no_sample_and_an_interrupted_pack_goes_on_in_both_folders(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "in" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(picture(20, 20, number)))
    source = open_source(str(tmp_path / "in"), None, SourceOptions())
    settings = PackSettings(samples_per_shard=8, hold_out=10)
    pack_and_hold_out(source, tmp_path / "good", settings)
    good = _samples(tmp_path / "good"), _samples(tmp_path / "good-held-out")
    for number in range(20):
        (tmp_path / "in" / "ab"[number % 2] / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="--max-bad=19: 20 bad items so far"):
        pack_and_hold_out(source, tmp_path / "out", settings, max_bad=19)
    packed = pack_and_hold_out(source, tmp_path / "out", settings, max_bad=20)
    assert sum(folder.num_bad for folder in packed) == 20
    for folder, before in zip((tmp_path / "out", tmp_path / "out-held-out"), good, strict=True):
        left = _samples(folder)
        bad = [json.loads(line)["key"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert left == {key: sample for key, sample in before.items() if key not in bad}
    for number in range(20):  # repaired
        (tmp_path / "in" / "ab"[number % 2] / f"{number}.jpg").write_bytes(encoded(picture(20, 20, number)))
    pack_and_hold_out(source, tmp_path / "out", settings)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "good")


def test_both_folders_have_the_classes_and_the_image_size_of_all_items(tmp_path: Path) -> None:
    # Tars tell their labels only when they are read; the one image of the last class lands in one of the folders.
    items = {f"{number:03d}": (number // 10, 20 + number % 2) for number in range(31)}
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for key, (label, size) in items.items():
        members += [(f"{key}.jpg", encoded(picture(size, size, int(key)))), (f"{key}.cls", str(label).encode())]
    write_tar(tmp_path / "in" / "a.tar", members)
    source = open_source(str(tmp_path / "in"), None, SourceOptions())
    pack_and_hold_out(source, tmp_path / "out", PackSettings(hold_out=1))
    indexes = [ShardIndex.open(folder) for folder in (tmp_path / "out", tmp_path / "out-held-out")]
    assert [(index.num_samples, index.num_classes, index.image_size) for index in indexes] == [
        (30, 4, None), (1, 4, None),
    ]  # fmt: skip


def test_holding_out_nothing_is_the_pack_as_it_was_and_another_number_is_another_pack(tmp_path: Path) -> None:
    pack(DigitsSource(), tmp_path / "out", PackSettings(hold_out=0))
    packing = ShardIndex.open(tmp_path / "out").meta.packing
    assert packing is not None and "hold_out" not in packing
    for hold_out in (-1, 1797):
        with pytest.raises(UserError, match=f"--hold-out={hold_out}: must be from 0 to 1796"):
            pack_and_hold_out(DigitsSource(), tmp_path / "out", PackSettings(hold_out=hold_out))
    with pytest.raises(UserError, match="OUT=.*out: packed before with other arguments"):
        pack_and_hold_out(DigitsSource(), tmp_path / "out", PackSettings(hold_out=5))
    assert plan_pack(DigitsSource(), PackSettings(hold_out=97)).num_items == 1700


@needs_mpirun
@pytest.mark.slow
def test_ranks_write_the_same_two_folders_as_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpi4py", "-m", "data_tools", "pack", "digits", str(tmp_path / "ranks")]
    done = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", "3", *command, "--hold-out", "97"],
        cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"data.shards={tmp_path}/ranks\n" in done.stdout
    assert f"validation.shards={tmp_path}/ranks-held-out\n" in done.stdout
    pack_and_hold_out(DigitsSource(), tmp_path / "one", PackSettings(hold_out=97))
    for name in ("ranks", "ranks-held-out"):
        assert _contents(tmp_path / name) == _contents(tmp_path / name.replace("ranks", "one"))
