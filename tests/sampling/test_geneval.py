"""GenEval's folders, read as its evaluate_images.py reads them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import PARTIAL
from diffmoe_dist.sampling import geneval
from diffmoe_dist.sampling.geneval import check_prompts, write_geneval

METADATA: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [], "prompt": "a photo of two dögs"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
]


def images(num: int, channels: int = 3) -> np.ndarray:
    """Image i is of value 10 * i everywhere, (N, 8, 8, C)."""
    return np.broadcast_to(10 * np.arange(num, dtype=np.uint8)[:, None, None, None], (num, 8, 8, channels))


def read_as_geneval(folder: Path) -> list[tuple[str, dict[str, Any], str, int]]:
    """(folder, metadata, image, its value) of everything that GenEval scores."""
    found = []
    for subfolder in os.listdir(folder):
        if not (folder / subfolder).is_dir() or not subfolder.isdigit():
            continue
        with open(folder / subfolder / "metadata.jsonl") as file:
            metadata = json.load(file)
        for name in os.listdir(folder / subfolder / "samples"):
            path = folder / subfolder / "samples" / name
            if path.is_file() and re.match(r"\d+\.png", name):
                (value,) = np.unique(np.asarray(Image.open(path).convert("RGB")))
                found.append((subfolder, metadata, name, int(value)))
    return sorted(found, key=lambda row: row[::2])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("channels", [1, 3])
def test_geneval_finds_every_image_with_its_prompt(tmp_path: Path, channels: int) -> None:
    write_geneval(tmp_path, images(6, channels), METADATA, copies=2)
    # Images 0, 1, 2 are the first copies of the prompts 0, 1, 2, and 3, 4, 5 the second.
    assert read_as_geneval(tmp_path) == [
        ("00000", METADATA[0], "0000.png", 0), ("00000", METADATA[0], "0001.png", 30),
        ("00001", METADATA[1], "0000.png", 10), ("00001", METADATA[1], "0001.png", 40),
        ("00002", METADATA[2], "0000.png", 20), ("00002", METADATA[2], "0001.png", 50),
    ]  # fmt: skip
    names = {"metadata.jsonl", "grid.png", "samples/0000.png", "samples/0001.png"}
    assert set(contents(tmp_path)) == {f"0000{number}/{name}" for number in range(3) for name in names}
    assert (tmp_path / "00001/metadata.jsonl").read_text().count("\n") == 1


def test_four_copies_stand_in_a_square(tmp_path: Path) -> None:
    write_geneval(tmp_path, images(4), METADATA[:1], copies=4)
    grid = np.asarray(Image.open(tmp_path / "00000/grid.png"))
    height, width, _ = grid.shape
    corners = [grid[y, x, 0] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert height == width and corners == [0, 10, 20, 30]


@pytest.mark.parametrize("stop", range(9))
def test_an_interrupted_writing_is_finished_by_the_same_call_and_scored_by_nobody_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Three prompts of two images and a grid: nine image files, of which `stop` are written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_geneval(whole, images(6), METADATA, copies=2)
    save = geneval._save
    written: list[Path] = []

    def save_some(path: Path, image: np.ndarray) -> None:
        if len(written) >= stop:
            path.with_name(path.name + PARTIAL).write_bytes(b"half an image")
            raise KeyboardInterrupt
        written.append(path)
        save(path, image)

    with monkeypatch.context() as patched:
        patched.setattr(geneval, "_save", save_some)
        with pytest.raises(KeyboardInterrupt):
            write_geneval(cut, images(6), METADATA, copies=2)
    with pytest.raises(FileNotFoundError, match="metadata.jsonl"):
        read_as_geneval(cut)
    for _ in range(2):
        write_geneval(cut, images(6), METADATA, copies=2)
        assert contents(cut) == contents(whole)


def test_images_that_do_not_fit_the_prompts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--geneval: 7 images are not 2 of each of 3 prompts; sample 6"):
        write_geneval(tmp_path / "out", images(7), METADATA, copies=2)
    plain: list[dict[str, Any]] = [METADATA[0], {"prompt": "a dog"}]
    with pytest.raises(UserError, match='prompt 1 has no "tag"; give GenEval\'s evaluation_metadata.jsonl'):
        write_geneval(tmp_path / "out", images(2), plain, copies=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("prompts", "copies"), [(3, 2), (2, 3)])
def test_the_folder_of_a_larger_job_is_refused(tmp_path: Path, prompts: int, copies: int) -> None:
    write_geneval(tmp_path, images(prompts * copies), METADATA[:prompts], copies=copies)
    with pytest.raises(UserError, match="png is none of these 4 images; remove"):
        write_geneval(tmp_path, images(4), METADATA[:2], copies=2)


def test_a_number_of_images_that_does_not_divide_over_the_prompts_is_refused() -> None:
    metadata = [{"tag": "colors", "prompt": str(number)} for number in range(3)]
    check_prompts(metadata, 6)
    with pytest.raises(UserError, match="--num 7: GenEval wants as many images of each of the 3 prompts; choose a mul"):
        check_prompts(metadata, 7)
