"""Which reader a source needs, by what lies there or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.coco import CocoSource
from data_tools.digits import DigitsSource
from data_tools.hf_parquet import HfParquetSource, holds_images
from data_tools.idx import IdxSource
from data_tools.ilsvrc import train_source, validation_source
from data_tools.image_folder import ImageFolderSource, image_paths
from data_tools.pairs import PairsSource
from data_tools.shapes import ShapesSource
from data_tools.source import Source
from data_tools.table import SUFFIXES, Columns, TableSource
from data_tools.tars import TarFile
from data_tools.webdataset_tars import WebDatasetSource
from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class SourceOptions:
    """What some readers need beside the path. A reader that does not use an option refuses it."""

    images: Path | None = None
    devkit: Path | None = None
    columns: Columns = Columns()
    split: str | None = None


_READERS: dict[str, Callable[[Path, SourceOptions], Source]] = {
    "digits": lambda path, options: DigitsSource(),
    "shapes": lambda path, options: ShapesSource(),
    "image-folder": lambda path, options: ImageFolderSource(path),
    "ilsvrc-train": lambda path, options: train_source(path),
    "ilsvrc-val": lambda path, options: validation_source(path, options.devkit),
    "coco": lambda path, options: CocoSource(path, options.images),
    "pairs": lambda path, options: PairsSource(path),
    "table": lambda path, options: TableSource(path, options.images, options.columns),
    "webdataset": lambda path, options: WebDatasetSource(path),
    "hf-parquet": lambda path, options: HfParquetSource(path, options.columns, options.split),
    "idx": lambda path, options: IdxSource(path),
}
FORMATS = tuple(_READERS)
_USES_IMAGES = ("coco", "table")
_USES_COLUMNS = ("table", "hf-parquet")
_MADE_HERE = ("digits", "shapes")  # named in the place of a path
_FOLDERS = ("image-folder", "pairs")


def open_source(name: str, source_format: str | None, options: SourceOptions) -> Source:
    """List the items of SOURCE. Raises UserError where it is not what its format says, or not to be guessed."""
    path = Path(name)
    if source_format is None:
        source_format = name if name in _MADE_HERE and not path.exists() else guess_format(path)
    if source_format not in _MADE_HERE and not path.exists():
        raise UserError(f"SOURCE={name}: no such file or folder; give a path, or {' or '.join(_MADE_HERE)}")
    if source_format in _FOLDERS and not path.is_dir():
        raise UserError(f"SOURCE={name}: {source_format} reads a folder; name one, or another --source-format")
    _refuse_unused(source_format, options)
    return _READERS[source_format](path, options)


def guess_format(path: Path) -> str:
    """The format by names alone, and a look at the first members of a tar. Raises UserError where nothing fits."""
    if path.is_dir():
        return _guess_folder(path)
    if not path.exists():
        raise UserError(f"SOURCE={path}: no such file or folder; give a path, or {' or '.join(_MADE_HERE)}")
    if path.suffix == ".tar":
        return _guess_tar(path)
    if "images-idx3" in path.name:
        return "idx"
    if path.suffix == ".parquet" and holds_images(path):
        return "hf-parquet"
    if path.suffix in SUFFIXES:
        return "table"
    if path.suffix == ".json":
        return "coco"
    raise UserError(f"SOURCE={path}: not known by its name; name --source-format, one of {', '.join(FORMATS)}")


def _guess_folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if any(".tar" in name for name in names):
        return "webdataset"
    if any(name.endswith(".parquet") for name in names) or any(path.glob("*/*.parquet")):
        return "hf-parquet"
    first = next(image_paths(path), None)
    if first is None:
        raise UserError(f"SOURCE={path}: holds no images, tars or Parquet files; name --source-format")
    return "pairs" if (path / first).with_suffix(".txt").exists() else "image-folder"


def _guess_tar(path: Path) -> str:
    first = next(TarFile(path).members(), None)
    if first is not None and first.name.endswith(".tar"):
        return "ilsvrc-train"
    return "ilsvrc-val" if first is not None and "ILSVRC2012_val" in first.name else "webdataset"


def _refuse_unused(source_format: str, options: SourceOptions) -> None:
    given = {
        "--images": (options.images, _USES_IMAGES),
        "--devkit": (options.devkit, ("ilsvrc-val",)),
        "--split": (options.split, ("hf-parquet",)),
        "--image-column": (options.columns.image, _USES_COLUMNS),
        "--caption-column": (options.columns.caption, _USES_COLUMNS),
        "--label-column": (options.columns.label, _USES_COLUMNS),
    }
    for option, (value, users) in given.items():
        if value is not None and source_format not in users:
            raise UserError(f"{option}={value}: {source_format} does not use it, only {', '.join(users)}; leave it out")
