"""The drawn shapes: images, their captions, and the measurement of what an image shows."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.prompt_following import read_folder, wanted
from data_tools.shapes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZE,
    Drawing,
    ShapesSource,
    captions,
    draw,
    drawing_of,
    drawings,
    measure,
    prompts,
    read_caption,
)
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.machine import ROOT, TIME_LIMIT

NOTHING = Drawing(None, None, None)
COUNT = len(ShapesSource())


def _run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    out = tmp_path_factory.mktemp("packed") / "shapes"
    done = _run("data_tools", "pack", "shapes", out)
    assert done.returncode == 0, done.stderr
    return ShardIndex.open(out)


def test_a_pack_has_every_image_and_captions_that_say_what_it_shows(packed: ShardIndex) -> None:
    assert (packed.num_samples, packed.image_size, packed.channels, packed.num_classes) == (COUNT, SIZE, 3, 0)
    shown: Counter[Drawing] = Counter()
    for sample in range(COUNT):
        payloads = packed.read(sample)
        listed = json.loads(payloads["json"])["captions"]
        seen = measure(np.asarray(Image.open(io.BytesIO(payloads["png"]))))
        assert [read_caption(caption) for caption in listed] == [seen] * len(listed)
        assert len(set(listed)) == len(listed) >= 3 and payloads["txt"].decode() == listed[0]
        shown[seen] += 1
    assert set(shown) == set(drawings()) and len(set(shown.values())) == 1


def test_the_images_are_the_same_on_every_machine_and_vary() -> None:
    images = [draw(number).tobytes() for number in range(COUNT)]
    sha256 = hashlib.sha256(b"".join(images)).hexdigest()
    assert sha256 == "4ced4d743ebd4ffa3a27469a9c130109adae018dfca116c4db8e737fc608b4ad"
    assert len(set(images)) > COUNT / 2


def test_a_part_of_the_source_gives_its_own_items() -> None:
    whole, items = ShapesSource(), np.array([7, 2000, 3])
    part = whole.part(items)
    assert len(part) == 3
    for number, item in enumerate(items.tolist()):
        assert part.item_name(number) == whole.item_name(item) and part.read(number) == whole.read(item)


def test_every_image_is_measured_right_also_where_it_is_pale_and_noisy() -> None:
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        image = draw(number).astype(np.float64)
        rough = 0.85 * image + 0.15 * 128 + generator.normal(0, 12, image.shape)
        assert measure(rough.clip(0, 255).astype(np.uint8)) == drawing_of(number)


def test_an_image_without_a_shape_shows_nothing() -> None:
    generator = np.random.default_rng(0)
    for gray in (0, 32, 128, 224, 255):
        assert measure(np.full((SIZE, SIZE, 3), gray, np.uint8)) == NOTHING
    for _ in range(50):
        seen = measure(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        assert (seen.shape, seen.position) == (None, None)


def _square(row: int, column: int, colour: tuple[int, ...]) -> np.ndarray:
    image = np.full((SIZE, SIZE, 3), 32, np.uint8)
    image[row : row + 7, column : column + 7] = colour
    return image


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (_square(1, 1, COLOURS["red"]), Drawing("red", "square", "top left")),
        (_square(1, 9, COLOURS["red"]), Drawing("red", "square", "top right")),
        (_square(1, 1, COLOURS["blue"]), Drawing("blue", "square", "top left")),
        (_square(1, 5, COLOURS["red"]), Drawing("red", "square", None)),  # between top left and top right
        (_square(1, 1, (250, 130, 40)), Drawing(None, "square", "top left")),  # orange
        (_square(1, 1, COLOURS["red"])[::-1], Drawing("red", "square", "bottom left")),
        (np.maximum(_square(1, 1, COLOURS["red"]), _square(9, 9, COLOURS["red"])), Drawing("red", None, None)),  # two
    ],
)
def test_another_colour_place_or_number_of_shapes_is_seen(image: np.ndarray, seen: Drawing) -> None:
    assert measure(image) == seen


def test_a_triangle_upside_down_is_none() -> None:
    number = drawings().index(Drawing("red", "triangle", "centre"))
    assert measure(draw(number)[::-1]) != drawing_of(number)


def test_prompts_are_captions_of_every_combination_once() -> None:
    assert len(prompts()) == len(set(prompts())) == len(COLOURS) * len(SHAPES) * len(POSITIONS)
    assert [read_caption(prompt) for prompt in prompts()] == drawings()
    assert "a red square at the top left" in prompts() and "a cyan cross in the centre" in prompts()


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        ("the red square", Drawing("red", "square", None)),
        ("a red or blue square in the centre", Drawing(None, "square", "centre")),
        ("Bottom right: a Green CROSS", Drawing("green", "cross", "bottom right")),
        ("a scarred cross-section, laptop left", Drawing(None, "cross", None)),
        ("", NOTHING),
    ],
)
def test_a_caption_is_read_word_by_word(caption: str, asked: Drawing) -> None:
    assert read_caption(caption) == asked


def test_the_prompts_of_the_debug_run_are_distinct_and_balanced() -> None:
    lines = (ROOT / "configs" / "t2i" / "shapes_prompts.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 64 and set(lines) <= set(prompts())
    asked = [read_caption(line) for line in lines]
    for names, aspect in ((COLOURS, "colour"), (SHAPES, "shape"), (POSITIONS, "position")):
        counts = Counter(getattr(drawing, aspect) for drawing in asked)
        assert set(counts) == set(names) and max(counts.values()) - min(counts.values()) <= 1


def _samples(folder: Path, numbers: list[int], asked: list[str]) -> Path:
    folder.mkdir()
    np.savez(folder / "samples.npz", arr_0=np.stack([draw(number) for number in numbers]))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    return folder


def test_the_benchmark_counts_what_was_followed_and_shows_it(tmp_path: Path) -> None:
    numbers = list(range(10))
    asked = [captions(drawing_of(number))[number % 3] for number in numbers]
    asked[3] = prompts()[numbers[3] + 5]  # another shape
    folder = _samples(tmp_path / "samples", numbers, asked)
    done = _run("benchmarks.prompt_following", folder, "--at-least", 0.9)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[1:5]]
    assert done.stdout.startswith("10 images of 10 prompts")
    assert [row[-2:] for row in rows] == [["9", "90.0%"], ["10", "100.0%"], ["9", "90.0%"], ["10", "100.0%"]]
    assert Image.open(folder / "prompt_following.png").width > 500
    assert _run("benchmarks.prompt_following", folder, "--at-least", 0.95).returncode == 1


def test_a_folder_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"FOLDER=.*nowhere: no samples.npz; draw from prompts first"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"FOLDER=.*count: 2 images and 1 prompts"):
        read_folder(_samples(tmp_path / "count", [0, 1], prompts()[:1]))
    broken = _samples(tmp_path / "broken", [0], prompts()[:1])
    (broken / "prompts.jsonl").write_text("a red square\n")
    with pytest.raises(UserError, match=r"FOLDER=.*broken: samples.npz or prompts.jsonl cannot be read"):
        read_folder(broken)
    with pytest.raises(UserError, match="prompt 'a red house': does not say one shape"):
        wanted("a red house")
