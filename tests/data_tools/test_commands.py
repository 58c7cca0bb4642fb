"""plan, stats, verify and index from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.pack_plan import plan_pack
from data_tools.stats import count, describe, image_grid
from data_tools.stored_images import ImageRules
from data_tools.webdataset_tars import WebDatasetSource
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import BAD, encoded, make_messy_folder
from tests.data_tools.messy import picture as one_picture
from tests.machine import ROOT, TIME_LIMIT


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_messy_folder(tmp_path_factory.mktemp("messy"))


@pytest.fixture(scope="module")
def packed(messy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(ImageFolderSource(messy), out, PackSettings(samples_per_shard=10))
    return out


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


@pytest.mark.parametrize("rules", [ImageRules(), ImageRules("adm", 32)])
def test_a_plan_foretells_counts_classes_sizes_and_bad_items_and_writes_nothing(
    messy: Path, tmp_path: Path, rules: ImageRules
) -> None:
    before = sorted(messy.rglob("*"))
    plan = plan_pack(ImageFolderSource(messy), PackSettings(10, images=rules))
    packed = pack(ImageFolderSource(messy), tmp_path / "out", PackSettings(samples_per_shard=10, images=rules))
    assert (plan.num_items, plan.num_shards, plan.num_classes) == (64, packed.num_shards, 2)
    assert (plan.smallest_class, plan.largest_class) == (("dog", 30), ("cat", 34))
    assert {item for item, _ in plan.bad} == set(BAD)  # 64 items: all of them were looked at
    padding = packed.num_shards * 10_240 + 1024  # ends of the tars
    assert plan.num_bytes <= packed.num_bytes <= plan.num_bytes + padding
    assert plan.seconds(4) == pytest.approx(plan.seconds(1) / 4) and plan.seconds(1) > 0
    assert sorted(messy.rglob("*")) == before


def test_the_plan_command_says_it_in_a_few_lines(messy: Path) -> None:
    done = _run("plan", str(messy), "--samples-per-shard", "10")
    assert done.returncode == 0
    assert done.stderr == f"SOURCE={messy}: read as image-folder\n{messy}: 64 images in 2 classes (cat, dog)\n"
    assert "image-folder: 64 items, 7 shards" in done.stdout and "2 classes, from 30 items (dog)" in done.stdout
    assert "bad: cat/empty.jpg: the file is empty" in done.stdout


def test_stats_count_samples_classes_and_sizes(packed: Path) -> None:
    index = ShardIndex.open(packed)
    stats = count(index)
    assert stats.labels == {0: 32, 1: 28}
    assert {name: sizes.count for name, sizes in stats.bytes_of.items()} == {
        "gif": 1, "jpg": 51, "png": 7, "webp": 1, "cls": 60,
    }  # fmt: skip
    sizes = [size for sample in range(60) for name, _, size, _ in index.entries(sample) if name == "jpg" and size >= 0]
    found = stats.bytes_of["jpg"]
    assert (found.low, found.high, found.total) == (min(sizes), max(sizes), sum(sizes))
    assert stats.pixels.total() == 60 and stats.pixels[12_000, 50] == 1 and stats.pixels[1, 1] == 1
    assert "classes      2, from 28 samples (dog) to 32 (cat)" in describe(index, stats, packed)


def test_stats_measure_captions(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, caption in enumerate(("one", "one two three", "one two")):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(encoded(one_picture(20, 20)))
        (tmp_path / "in" / f"{number}.txt").write_text(caption)
    from data_tools.pairs import PairsSource

    pack(PairsSource(tmp_path / "in"), tmp_path / "out")
    stats = count(ShardIndex.open(tmp_path / "out"))
    words = stats.caption_words
    assert (words.count, words.low, words.high, words.total, stats.empty_captions) == (3, 1, 3, 6, 0)
    assert not stats.labels


def test_the_picture_shows_random_samples_and_the_same_every_time(packed: Path) -> None:
    index = ShardIndex.open(packed)
    grid = image_grid(index, 16)
    assert grid.size == (128, 128) and grid == image_grid(index, 16)
    pixels = np.asarray(grid).reshape(8, 16, 8, 16, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert len(np.unique(pixels, axis=0)) > 40  # of 60 samples, the rest of the grid is white
    assert (pixels[60:] == 255).all()


def test_the_commands_run_one_after_the_other(messy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _run("pack", str(messy), str(out), "--crop", "center", "--size", "24", "--encoding", "png")
    assert done.returncode == 0, done.stderr
    num_bytes = (out / "image-folder-000000.tar").stat().st_size
    bad = [json.loads(line)["reason"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert done.stdout == (
        f"packed 60 samples into 1 shards, {num_bytes} bytes: data.shards={out}\n"
        f'left out 4 bad items (1 "{bad[0]}", 1 "{bad[1]}", 1 "{bad[2]}", ...): {out / "quarantine.jsonl"}\n'
    )
    for how, said in (("--quick", "sizes and two samples of each shard"), ("--full", "every byte")):
        done = _run("verify", str(out), how)
        assert (done.returncode, done.stdout) == (0, f"60 samples in 1 shards are whole ({said})\n")
    done = _run("stats", str(out), "--picture", str(tmp_path / "grid.png"))
    assert done.returncode == 0 and "60 samples in 1 shards" in done.stdout
    assert Image.open(tmp_path / "grid.png").size == (768, 768)
    for name in ("index.json", "offsets.npy", "keys.npy", "quarantine.jsonl"):
        (out / name).unlink()
    done = _run("index", str(out))
    assert (done.returncode, done.stdout) == (0, f"indexed 60 samples in 1 tars: data.shards={out}\n")
    index = ShardIndex.open(out)
    assert (index.image_size, index.num_classes, index.meta.packing) == (24, 2, None)


def test_reasons_of_one_kind_are_counted_together_and_the_commonest_told_first(tmp_path: Path) -> None:
    labels = ["0", "x", "7", "y", "z", "0", "1", "2", "3"]
    rows = [f"{'no' if label == '1' else 'a'}.jpg,{label}\n" for label in labels]
    (tmp_path / "a.jpg").write_bytes(encoded(one_picture(20, 20)))
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(rows))
    done = _run("pack", str(tmp_path / "t.csv"), str(tmp_path / "out"), "--order", "listed", "--max-label", "6")
    reasons = '''3 "label 'x' is not a number", 1 "label 7 is not a whole number from 0 to 6", 1 "no such file"'''
    assert f"left out 5 bad items ({reasons}): {tmp_path / 'out'}" in done.stdout, done


def test_verify_names_the_damage_and_ends_with_exit_code_2(packed: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(packed, tmp_path / "out"))
    content = bytearray((folder / "image-folder-000000.tar").read_bytes())
    content[512] ^= 1  # the first label
    (folder / "image-folder-000000.tar").write_bytes(content)
    done = _run("verify", str(folder), "--workers", "2")
    assert done.returncode == 2 and "image-folder-000000.tar, key 000000000" in done.stdout
    assert done.stderr.count("\n") == 1 and "damaged in 2 places" in done.stderr


def test_listed_order_is_the_order_of_the_source(messy: Path, tmp_path: Path) -> None:
    pack(ImageFolderSource(messy), tmp_path, PackSettings(samples_per_shard=10, shuffled=False))
    labels = [int(ShardIndex.open(tmp_path).read(sample)["cls"]) for sample in range(60)]
    assert labels == sorted(labels)
    names = [WebDatasetSource(tmp_path).item_name(item) for item in (0, 59)]
    assert names[0] == "image-folder-000000.tar:000000000"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pack", "digits", "OUT", "--crop", "adm", "--size", "4"), "--crop=adm: digits has images of 8 pixels"),
        (("pack", "digits", "OUT", "--size", "4"), "--crop=none, --size=4"),
        (("pack", "digits", "OUT", "--crop", "oval"), "invalid choice: 'oval'"),
        (("plan", "digits", "--source-format", "imagenet"), "--source-format=imagenet: no reader"),
        (("pack", "digits", "OUT", "--workers", "0"), "--workers=0"),
        (("pack", "digits", "OUT", "--order", "listed", "--seed", "1"), "--seed=1: --order=listed permutes nothing; "),
        (("verify", "nowhere"), "FOLDER=nowhere: no such folder"),
        (("index", "nowhere"), "FOLDER=nowhere: not a folder"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = _run(*(str(tmp_path / "out") if one == "OUT" else one for one in arguments))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_without_items_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="holds no items"):
        pack(ImageFolderSource.__new__(_Empty), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Empty(ImageFolderSource):
    def __len__(self) -> int:
        return 0


def test_names_that_are_not_utf8_are_told_by_plan_pack_stats_and_index(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a/x\udcff.jpg", "b\udcfe/y.jpg"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(encoded(one_picture(20, 20)))
    (folder / "a" / "bad\udcfd.jpg").write_bytes(b"")
    for arguments, said in [
        (("plan", str(folder)), "bad: a/bad\\udcfd.jpg: the file is empty"),
        (("pack", str(folder), str(out)), "packed 2 samples"),
        (("stats", str(out)), "b\\udcfe"),
    ]:
        done = _run(*arguments)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("x\udcff.jpg", "y.jpg"):
            tar.add(folder / "b\udcfe" / "y.jpg", name)
    done = _run("index", str(tmp_path / "tars"))
    assert done.returncode == 0 and "indexed 2 samples" in done.stdout, done.stderr
