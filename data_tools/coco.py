"""Source: COCO captions, `captions_*.json` with a folder of images. About five captions an image, all kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.source import IMAGE, Strings, caption_payloads, read_file
from data_tools.table import as_captions
from diffmoe_dist.errors import UserError


class CocoSource:
    """The images of the annotation file, in the order of their ids."""

    name = "coco"
    class_names: Sequence[str] = ()
    channels = 3
    image_size = None
    labels = None

    def __init__(self, annotations: Path, images: Path | None) -> None:
        split = annotations.stem.rpartition("_")[2]
        self._root = images or annotations.parent.parent / split  # where COCO's own archives put them
        if not self._root.is_dir():
            raise UserError(f"--images={self._root}: no such folder; name the folder of the images")
        self._items = Strings(json.dumps(item) for item in _list_items(annotations))

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        return str(json.loads(self._items[item])[0])

    def part(self, items: np.ndarray) -> CocoSource:
        part = copy.copy(self)
        part._items = self._items.take(items)
        return part

    def read(self, item: int) -> dict[str, bytes]:
        file_name, image_id, captions = json.loads(self._items[item])
        captioned = caption_payloads(captions, image_id=image_id, file_name=file_name)
        return {IMAGE: read_file(self._root / file_name), **captioned}


def _list_items(annotations: Path) -> list[tuple[str, int, list[str]]]:
    """(file name, image id, captions) of every image; captions in the order of their ids."""
    try:
        content: dict[str, Any] = json.loads(annotations.read_bytes())
        captions: dict[int, list[str]] = {int(image["id"]): [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda annotation: int(annotation["id"])):
            captions[int(annotation["image_id"])].extend(as_captions(annotation["caption"]))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
    except (KeyError, TypeError, ValueError, OverflowError, OSError, RecursionError) as error:
        raise UserError(
            f"SOURCE={annotations}: not a file of COCO captions ({type(error).__name__}: {error}); name captions_*.json"
        ) from error
    return [(names[image_id], image_id, captions[image_id]) for image_id in sorted(names)]
