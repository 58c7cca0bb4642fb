"""Captioned images with their captions encoded by a tiny encoder, and a model that is conditioned on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.text import TextSettings, encode_text
from tests.data.encoders import save_encoder
from tests.data.folders import png, random_images, write_folder

CAPTIONS = [["a red square", "a square"], ["blue circle on a red square"], [], ["a circle"]]  # one after another
MODEL = {
    "input_size": 8, "in_channels": 3, "condition": "text", "num_classes": 0, "text_hidden_size": 16,
    "text_max_length": 16, "text_pooled_size": 16,
}  # fmt: skip


def save_captioned(folder: Path, images: int = 30, kind: str = "clip") -> Path:
    """Write FOLDER/shards, FOLDER/encoder and FOLDER/text."""
    samples = []
    for number, image in enumerate(random_images(images, 8)):
        captions = CAPTIONS[number % len(CAPTIONS)]
        sample = {"png": png(image)}
        if captions:
            sample |= {"txt": captions[0].encode(), "json": json.dumps({"captions": captions}).encode()}
        samples.append(sample)
    base = write_folder(folder / "shards", samples, [images // 3, images - images // 3], class_names=[])
    encode_text(base, folder / "text", TextSettings(save_encoder(folder / "encoder", kind), max_length=16))
    return folder


def text_settings(folder: Path, run: str) -> dict[str, Any]:
    return {
        "run_dir": str(folder / run),
        "data": {"shards": str(folder / "shards"), "text": str(folder / "text")},
        "model": MODEL,
        "moe": {"inference": "threshold"},
        "train": {"label_dropout": 0.2, "steps": 20},
    }
