"""Whether pictures follow their prompts: colour, shape and position of what was drawn, measured from the pixels.

For models trained on the pictures of `python -m data_tools pack shapes`, with prompts such as those of
configs/t2i/shapes_prompts.txt.

    python -m benchmarks.prompt_following samples/shapes [--at-least 0.8]

A prompt says, in any words, one of red, green, blue, yellow, magenta and cyan; a square, triangle or cross; and top
left, top right, bottom left, bottom right or centre.

The folder is one of diffmoe_dist.sample: samples.npz (arr_0: uint8 NHWC) and prompts.jsonl, of which line i is an
object with the "prompt" of image i. `data_tools.shapes.measure` says what an image shows; nothing of it is learned, and
what cannot be told counts as not followed. Writes prompt_following.png into the folder: every image with its prompt, in
a green frame where it was followed, else in a red one with what was seen instead.

With --at-least the exit code is 1 where fewer images than this share follow their prompt in all three.
"""

from __future__ import annotations

import argparse
import json
import math
import zipfile
from pathlib import Path

import matplotlib
import numpy as np

from data_tools.shapes import SIZE, Drawing, measure, read_caption
from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ASPECTS = ("colour", "shape", "position")
COLUMNS = 8
FOLLOWED, NOT_FOLLOWED = "#2a7f62", "#c0392b"


def read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The images, (N, SIZE, SIZE, 3) uint8, and their prompts."""
    try:
        with np.load(folder / "samples.npz", allow_pickle=False) as samples:
            images = samples["arr_0"]
        lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [str(json.loads(line)["prompt"]) for line in lines]
    except FileNotFoundError as error:
        raise UserError(f"FOLDER={folder}: no {Path(error.filename).name}; draw from prompts first") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"FOLDER={folder}: samples.npz or prompts.jsonl cannot be read ({error})") from None
    if images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
        raise UserError(f"FOLDER={folder}: images of shape {images.shape}; those of shapes are (N, {SIZE}, {SIZE}, 3)")
    if len(images) != len(prompts):
        raise UserError(f"FOLDER={folder}: {len(images)} images and {len(prompts)} prompts; draw them again")
    return images, prompts


def wanted(prompt: str) -> Drawing:
    drawing = read_caption(prompt)
    for aspect in ASPECTS:
        if getattr(drawing, aspect) is None:
            raise UserError(f"prompt '{prompt}': does not say one {aspect} of those that the shapes have; see --help")
    return drawing


def shares(asked: list[Drawing], seen: list[Drawing]) -> dict[str, float]:
    """The share of images that follow their prompt in all, and in each aspect."""
    pairs = list(zip(asked, seen, strict=True))
    followed = {"all three": sum(one == other for one, other in pairs)}
    for aspect in ASPECTS:
        followed[aspect] = sum(getattr(one, aspect) == getattr(other, aspect) for one, other in pairs)
    return {name: count / len(pairs) for name, count in followed.items()}


def save_picture(path: Path, images: np.ndarray, prompts: list[str], asked: list[Drawing], seen: list[Drawing]) -> None:
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.1 * rows), squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for place, image, prompt, one, other in zip(axes.flat, images, prompts, asked, seen, strict=False):
        colour = FOLLOWED if one == other else NOT_FOLLOWED
        place.set_axis_on()
        place.imshow(image, interpolation="nearest")
        place.set_xticks([])
        place.set_yticks([])
        for side in place.spines.values():
            side.set(color=colour, linewidth=3)
        place.set_xlabel("\n".join([*broken(prompt), *differences(one, other)]), fontsize=7, color=colour)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def broken(prompt: str, width: int = 24) -> list[str]:
    """A prompt in lines that fit below an image."""
    lines = [""]
    for word in prompt.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def differences(asked: Drawing, seen: Drawing) -> list[str]:
    """What is seen in the place of what was asked for, in one line, or none."""
    other = [
        getattr(seen, aspect) or f"no {aspect}" for aspect in ASPECTS if getattr(seen, aspect) != getattr(asked, aspect)
    ]
    return [f"seen: {', '.join(other)}"] if other else []


def main() -> int:
    assert __doc__ is not None
    summary, _, details = __doc__.partition("\n\n")
    parser = CommandParser(prog="python -m benchmarks.prompt_following", description=summary, epilog=details)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of diffmoe_dist.sample, drawn from prompts")
    parser.add_argument("--at-least", type=share, metavar="SHARE", help="exit 1 where fewer images follow their prompt")
    arguments = parser.parse_args()
    images, prompts = read_folder(arguments.folder)
    asked, seen = [wanted(prompt) for prompt in prompts], [measure(image) for image in images]
    found = shares(asked, seen)
    print(f"{len(images)} images of {len(set(prompts))} prompts follow them in")
    for name, value in found.items():
        print(f"  {name:9}  {round(value * len(images)):5d}  {value:7.1%}")
    picture = arguments.folder / "prompt_following.png"
    save_picture(picture, images, prompts, asked, seen)
    print(f"each image with its prompt: {picture}")
    return int(arguments.at_least is not None and found["all three"] < arguments.at_least)


def share(text: str) -> float:
    """'0.8' to 0.8."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a share from 0 to 1, such as 0.8")
    return value


if __name__ == "__main__":
    run_command(main)
