"""Which reader a source needs, by what lies there or by name."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.coco import CocoSource
from data_tools.digits import DigitsSource
from data_tools.hf_parquet import HfParquetSource, holds_images
from data_tools.idx import IdxSource
from data_tools.ilsvrc import train_source, validation_source
from data_tools.image_folder import ImageFolderSource, Listing, has_classes, list_images
from data_tools.kaggle_imagenet import KaggleImagenetSource, is_kaggle_layout
from data_tools.pairs import PairsSource
from data_tools.shapes import ShapesSource
from data_tools.source import Source, Strings
from data_tools.table import SUFFIXES, Columns, TableSource
from data_tools.tars import TarFile
from data_tools.webdataset_tars import WebDatasetSource, is_tar_name
from diffmoe_dist.data.labels import MAX_LABEL
from diffmoe_dist.errors import UserError
from diffmoe_dist.own_code import import_callable, is_import_path

logger = logging.getLogger("data_tools")


@dataclass(frozen=True)
class SourceOptions:
    """What some readers need beside the path. A reader that does not use an option refuses it."""

    images: Path | None = None
    devkit: Path | None = None
    columns: Columns = Columns()
    split: str | None = None
    max_label: int | None = None

    def __post_init__(self) -> None:
        if self.max_label is not None and not 0 <= self.max_label <= MAX_LABEL:
            raise UserError(
                f"--max-label={self.max_label}: must be from 0 to {MAX_LABEL}; give the number of the last class"
            )


_READERS: dict[str, Callable[[Path, SourceOptions], Source]] = {
    "digits": lambda path, options: DigitsSource(),
    "shapes": lambda path, options: ShapesSource(),
    "image-folder": lambda path, options: ImageFolderSource(path),
    "ilsvrc-train": lambda path, options: train_source(path, options.devkit),
    "ilsvrc-val": lambda path, options: validation_source(path, options.devkit),
    "kaggle-imagenet": lambda path, options: KaggleImagenetSource(path, options.split),
    "coco": lambda path, options: CocoSource(path, options.images),
    "pairs": lambda path, options: PairsSource(path),
    "table": lambda path, options: TableSource(path, options.images, options.columns, options.max_label),
    "webdataset": lambda path, options: WebDatasetSource(path, options.max_label),
    "hf-parquet": lambda path, options: HfParquetSource(path, options.columns, options.split, options.max_label),
    "idx": lambda path, options: IdxSource(path),
}
FORMATS = tuple(_READERS)
_USES_IMAGES = ("coco", "table")
_USES_COLUMNS = ("table", "hf-parquet")
_MADE_HERE = ("digits", "shapes")  # named in the place of a path
_FOLDERS = ("image-folder", "pairs", "kaggle-imagenet")
_FILES = ("ilsvrc-train", "ilsvrc-val", "coco", "table", "idx")
_MEMBERS = ("name", "class_names", "channels", "image_size", "labels", "__len__", "item_name", "part", "read")
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))


def open_source(name: str, source_format: str | None, options: SourceOptions) -> Source:
    """List the items of SOURCE. Raises UserError where it is not what its format says, or not to be guessed."""
    path = Path(name)
    if source_format is not None and source_format not in _READERS:
        return _open_own(name, source_format, options)
    if source_format is None:
        source_format = name if name in _MADE_HERE and not os.path.exists(path) else guess_format(path)
        if source_format not in _MADE_HERE:
            logger.info("SOURCE=%s: read as %s", name, source_format)
    if source_format not in _MADE_HERE:
        _refuse_no_file(path)
    if source_format in _FOLDERS and not path.is_dir():
        raise UserError(f"SOURCE={name}: {source_format} reads a folder; name one, or another --source-format")
    if source_format in _FILES and not path.is_file():
        raise UserError(f"SOURCE={name}: {source_format} reads a file; name one, or another --source-format")
    _refuse_unused(source_format, options)
    return _READERS[source_format](path, options)


def _open_own(name: str, source_format: str, options: SourceOptions) -> Source:
    """By a reader of the user's: `my_package.my_reader`, whose function `open_source` is meant, or module:callable."""
    named = f"--source-format={source_format}"
    module, colon, _ = source_format.partition(":")
    if not colon and not is_import_path(module):
        close = difflib.get_close_matches(source_format, FORMATS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{named}: no reader; {hint}choose from {', '.join(FORMATS)}, or the import path of your own, as "
            "my_package.my_reader"
        )
    _refuse_unused(source_format, options)
    source: Source = import_callable(source_format, named, "open_source")(name)
    missing = [member for member in _MEMBERS if not hasattr(source, member)]
    if missing:
        raise UserError(
            f"{named}: it returned a {type(source).__name__} without {', '.join(missing)}; a source is what "
            "data_tools/source.py says"
        )
    return source


def guess_format(path: Path) -> str:
    """The format by names alone: of all files in a folder, of all members of a tar.

    Raises UserError where nothing fits, and where several formats do.
    """
    _refuse_no_file(path)
    if path.is_dir():
        return _guess_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _guess_tar(path)
    if "images-idx3" in path.name:
        return "idx"
    if suffix == ".parquet" and holds_images(path):
        return "hf-parquet"
    if suffix in SUFFIXES:
        return "table"
    if suffix == ".json":
        return "coco"
    raise UserError(f"SOURCE={path}: not known by its name; name --source-format, one of {', '.join(FORMATS)}")


def _refuse_no_file(path: Path) -> None:
    if not os.path.exists(path):
        raise UserError(f"SOURCE={path}: no such file or folder; give a path, or {' or '.join(_MADE_HERE)}")
    if not path.is_file() and not path.is_dir():
        raise UserError(f"SOURCE={path}: neither a regular file nor a folder; copy it to one")


def _guess_folder(path: Path) -> str:
    if is_kaggle_layout(path):
        return "kaggle-imagenet"
    listing = list_images(path)
    tars = [name for name in listing.top_files if is_tar_name(name)]
    stems = {name.partition(".")[0] for name in tars}
    of_tars = [name for name in listing.top_files if name.endswith(".parquet") and Path(name).stem in stems]
    num_parquet = listing.others[".parquet"] - len(of_tars)  # img2dataset writes 00000.parquet beside 00000.tar
    tables = [name for name in listing.top_files if name.lower().endswith(SUFFIXES) and name not in of_tars]
    counts = {"tars": len(tars), "images": len(listing.paths), ".parquet files": num_parquet}
    found = [f"{number} {kind}" for kind, number in counts.items() if number]
    if not found:
        raise UserError(f"SOURCE={path}: holds no images, tars or Parquet files; name --source-format")
    if len(found) > 1 or (len(listing.paths) and tables):
        table = f"SOURCE={path / tables[0]} for the table, or " if tables else ""
        raise UserError(
            f"SOURCE={path}: holds {' and '.join([*found, *tables[:1]])}; name {table}--source-format for the folder"
        )
    if tars:
        return "webdataset"
    return "hf-parquet" if num_parquet else _guess_images(path, listing)


def _guess_images(path: Path, listing: Listing) -> str:
    if listing.num_top == 0:
        if _SPLITS.issuperset(folder.lower() for folder in listing.top_folders):
            raise UserError(
                f"SOURCE={path}: {', '.join(listing.top_folders)} are splits, not classes; name one of them, or "
                "--source-format"
            )
        return "image-folder"
    texts, images = listing.num_texts, len(listing.paths)
    if not texts or has_classes(path, listing):
        return "image-folder"
    if 2 * texts > images:
        return "pairs"
    raise UserError(
        f"SOURCE={path}: {texts} of {images} images have a text file; --source-format=pairs takes these alone, "
        "image-folder all, the others without a caption"
    )


def _guess_tar(path: Path) -> str:
    names = Strings(member.name for member in TarFile(path).members())
    num_tars = sum(name.endswith(".tar") for name in names)
    num_validation = sum("ILSVRC2012_val" in name for name in names)
    for number, source_format in ((num_tars, "ilsvrc-train"), (num_validation, "ilsvrc-val")):
        if number == len(names) > 0:
            return source_format
        if number:
            raise UserError(
                f"SOURCE={path}: {number} of its {len(names)} files are those of {source_format}; name --source-format"
            )
    return "webdataset"


def _refuse_unused(source_format: str, options: SourceOptions) -> None:
    given = {
        "--images": (options.images, _USES_IMAGES),
        "--devkit": (options.devkit, ("ilsvrc-val", "ilsvrc-train")),
        "--split": (options.split, ("hf-parquet", "kaggle-imagenet")),
        "--max-label": (options.max_label, (*_USES_COLUMNS, "webdataset")),
        "--image-column": (options.columns.image, _USES_COLUMNS),
        "--caption-column": (options.columns.caption, _USES_COLUMNS),
        "--label-column": (options.columns.label, _USES_COLUMNS),
    }
    for option, (value, users) in given.items():
        if value is not None and source_format not in users:
            raise UserError(f"{option}={value}: {source_format} does not use it, only {', '.join(users)}; leave it out")
