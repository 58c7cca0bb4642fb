"""Source: ILSVRC2012 (ImageNet-1k) as Kaggle distributes it, extracted: ILSVRC/Data/CLS-LOC and the LOC_* tables."""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.ilsvrc import WNID
from data_tools.image_folder import list_images
from data_tools.source import IMAGE, BadItemError, label_payload, read_file
from diffmoe_dist.errors import UserError

IMAGES = Path("ILSVRC/Data/CLS-LOC")
SPLITS = ("train", "val")
_CLASSES, _SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"


class KaggleImagenetSource:
    """The images of one split. A label is the rank of the WordNet id by name, as in the original archives.

    Raises UserError where folders, tables and images do not have the same classes and names.
    """

    name = "kaggle-imagenet"
    channels = 3
    image_size = None

    def __init__(self, root: Path, split: str | None) -> None:
        if split not in SPLITS:
            raise UserError(
                f"--split={split}: the images of {root} with labels are {' and '.join(SPLITS)}; name one of them"
            )
        self._folder = root / IMAGES / split
        self.class_words = _read_classes(root / _CLASSES)
        wnids = sorted(self.class_words)
        self.class_names: Sequence[str] = wnids
        listing = list_images(self._folder)
        self._paths = listing.paths
        rank = {wnid: label for label, wnid in enumerate(wnids)}
        wnid_of = (path.partition("/")[0] for path in self._paths)
        if split == "val":
            solution = _read_solution(root / _SOLUTION, rank)
            names = [Path(path).stem for path in self._paths]
            _check_same(f"{self._folder}: images", names, f"{_SOLUTION}", solution)
            wnid_of = (solution[name] for name in names)
        else:
            _check_same(f"{self._folder}: folders", listing.top_folders, f"{_CLASSES}", rank)
        try:
            self.labels = np.array([rank[wnid] for wnid in wnid_of], dtype=np.int64)
        except KeyError as error:
            raise UserError(
                f"SOURCE={root}: {error.args[0]} in {split} lies in no folder of a class; move it"
            ) from None
        listing.tell(f"{self._folder}: {len(self)} images in {len(wnids)} classes")

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        return self._paths[item]

    def part(self, items: np.ndarray) -> KaggleImagenetSource:
        part = copy.copy(self)
        part._paths, part.labels = self._paths.take(items), self.labels[items]
        part.class_names, part.class_words = (), {}
        return part

    def read(self, item: int) -> dict[str, bytes]:
        return {IMAGE: read_file(self._folder / self._paths[item]), "cls": label_payload(self.labels[item])}


def _check_same(found: str, names: Sequence[str], table: str, expected: Mapping[str, object]) -> None:
    different = sorted(set(names) ^ set(expected))
    if different or len(names) != len(expected):
        first = f", {different[0]} in one alone" if different else ""
        raise UserError(
            f"SOURCE={found} and rows of {table} differ ({len(names)} and {len(expected)}{first}); extract both again"
        )


def _read_classes(path: Path) -> dict[str, str]:
    """The words of each WordNet id, by `WNID words` a line."""
    rows = [line.strip().partition(" ") for line in _read_text(path).splitlines() if line.strip()]
    wnids = [wnid for wnid, _, _ in rows]
    wrong = [wnid for wnid in wnids if not WNID.fullmatch(wnid)]
    if wrong or not wnids or len(set(wnids)) < len(wnids):
        what = f"{wrong[0]!r} for a WordNet id (n01440764)" if wrong else "a class twice, or none"
        raise UserError(f"SOURCE={path}: has {what}; restore it")
    return {wnid: words.strip() for wnid, _, words in rows}


def _read_solution(path: Path, known: Mapping[str, int]) -> dict[str, str]:
    """The WordNet id of each validation image. A row lists boxes, `WNID x y x y` each, all of one class."""
    found: dict[str, str] = {}
    rows = csv.reader(_read_text(path).splitlines())
    if next(rows, None) != ["ImageId", "PredictionString"]:
        raise UserError(f"SOURCE={path}: does not begin with ImageId,PredictionString; restore it")
    for line, row in enumerate(rows, start=2):
        boxes = row[1].split() if len(row) == 2 else []
        classes = set(boxes[::5])
        if len(classes) != 1 or len(boxes) % 5 or not classes <= known.keys() or row[0] in found:
            raise UserError(f"SOURCE={path}: line {line} is no image with boxes of one known class; restore it")
        found[row[0]] = classes.pop()
    return found


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")
    except (BadItemError, UnicodeDecodeError) as error:
        raise UserError(f"SOURCE={path}: {error}; it comes with Kaggle's archive, restore it") from None


def is_kaggle_layout(root: Path) -> bool:
    return (root / IMAGES).is_dir()
