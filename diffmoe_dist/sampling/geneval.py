"""Images in the folders that GenEval's evaluate_images.py reads (github.com/djghosh13/geneval).

    FOLDER/00000/metadata.jsonl             the line of the prompt, as GenEval's file of prompts has it
    FOLDER/00000/samples/0000.png, 0001.png, ...
    FOLDER/00000/grid.png                   the same images in one, for people

Shape legend: N images, H, W image size, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import atomic_file, write_atomically
from diffmoe_dist.sampling.grid import image_grid

_READ_BY_GENEVAL = ("tag", "prompt")


def check_prompts(metadata: Sequence[dict[str, Any]], num_images: int) -> None:
    """Refuse prompts that GenEval could not score, or that do not divide the images among them.

    Raises:
        UserError: a prompt lacks what GenEval reads, or some prompts would have more images than others.
    """
    check_metadata(metadata)
    if num_images % len(metadata):
        raise UserError(
            f"--num {num_images}: GenEval wants as many images of each of the {len(metadata)} prompts; "
            "choose a multiple"
        )


def check_metadata(metadata: Sequence[dict[str, Any]]) -> None:
    """Refuse prompts that GenEval could not score.

    Raises:
        UserError: one of them lacks what GenEval reads.
    """
    for number, described in enumerate(metadata):
        for key in _READ_BY_GENEVAL:
            if key not in described:
                raise UserError(f'--geneval: prompt {number} has no "{key}"; give GenEval\'s evaluation_metadata.jsonl')


def write_geneval(folder: Path, images_NHWC: np.ndarray, metadata: Sequence[dict[str, Any]], copies: int) -> None:
    """Write the folders of all prompts; the same call again writes the same files.

    Each file is complete or not there. A prompt's metadata.jsonl, without which GenEval ends in an error, comes after
    the images of all prompts: it cannot score a part of them unnoticed.

    Args:
        images_NHWC: uint8; image i is of prompt i % P of the P prompts, and their copy i // P.
        metadata: of each prompt, GenEval's object.
        copies: of each prompt; GenEval's own scripts make 4.

    Raises:
        UserError: images and prompts do not fit, a prompt lacks what GenEval reads, or the folder holds others that it
            would read too.
    """
    prompts = len(metadata)
    if len(images_NHWC) != prompts * copies:
        raise UserError(
            f"--geneval: {len(images_NHWC)} images are not {copies} of each of {prompts} prompts; "
            f"sample {prompts * copies}"
        )
    check_metadata(metadata)
    _check_no_others(folder, prompts, copies)

    def write_images(number: int) -> None:
        of_prompt = images_NHWC[number::prompts]
        samples = _samples(folder, number)
        samples.mkdir(parents=True, exist_ok=True)
        for copy, image in enumerate(of_prompt):
            _save(samples / _image_name(copy), image)
        _save(samples.parent / "grid.png", image_grid(of_prompt))

    with ThreadPoolExecutor() as threads:
        list(threads.map(write_images, range(prompts)))
    for number, described in enumerate(metadata):
        path = _samples(folder, number).with_name("metadata.jsonl")
        write_atomically(path, json.dumps(described) + "\n")


def _check_no_others(folder: Path, prompts: int, copies: int) -> None:
    """Refuse folders and images of another job: GenEval reads whatever has a number for a name."""
    ours = {_samples(folder, number) / _image_name(copy) for number in range(prompts) for copy in range(copies)}
    others = sorted(set(folder.glob("[0-9]*/samples/[0-9]*.png")) - ours)
    if others:
        raise UserError(f"--geneval: {others[0]} is none of these {len(ours)} images; remove {folder}")


def _samples(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}" / "samples"


def _image_name(copy: int) -> str:
    return f"{copy:04d}.png"


def _save(path: Path, image: np.ndarray) -> None:
    with atomic_file(path) as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
