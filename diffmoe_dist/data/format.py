"""What `index.json` says, as typed values. docs/data.md, "On disk", describes every entry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

FORMAT = "diffmoe-shards"
VERSION = 2
INDEX_NAME = "index.json"
OFFSETS_NAME = "offsets.npy"
KEYS_NAME = "keys.npy"
QUARANTINE_NAME = "quarantine.jsonl"
TAR_BLOCK = 512  # bytes; a member's payload follows its header block
ABSENT = -1  # the size, and the offset, of a field that a sample lacks
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # formats the tool keeps as they are
LABEL_FIELD = "cls"  # the class, in decimal ASCII
CAPTION_FIELD = "txt"  # UTF-8, the first caption
METADATA_FIELD = "json"  # an object; "captions": all captions
LATENT_FIELD = "latent.npy"
TEXT_FIELD = "text.npy"
POOLED_TEXT_FIELD = "pooled.npy"
MEAN_LOGVAR, MEAN = "mean_logvar", "mean"  # what is stored of a latent
PARAMETRISATIONS = (MEAN_LOGVAR, MEAN)
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's own notes
_T = TypeVar("_T")


def is_hidden(name: str) -> bool:
    """Whether a tar member is hidden: macOS puts a `._NAME` beside each NAME."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def split_name(name: str) -> tuple[str, str]:
    """Key and field of a tar member: `a/b.c.jpg` is the key `a/b` and the field `c.jpg`.

    Both are empty for a member that belongs to no sample.
    """
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    if not field or is_hidden(name) or _META.search(name):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, field.lower()


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its samples, its size in bytes, the SHA-256 of its content."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class File:
    """Another file of the folder, and the SHA-256 of its content."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Base:
    """The folder that a side folder was computed from."""

    fingerprint: str
    keys_sha256: str


@dataclass(frozen=True)
class LatentSpec:
    """What the field `latent.npy` holds: fp16 (V, 2C, h, w), the V views of an image, C means over C log variances.

    Unscaled: a training latent is (z - shift) * scale per channel, with z sampled in fp32 from N(mean, exp(logvar)).
    With the parametrisation `mean` it holds the C means alone, (V, C, h, w), and z is the mean.
    """

    parametrisation: str
    channels: int  # C
    height: int  # h
    width: int  # w
    views: tuple[str, ...]  # ("plain",) or ("plain", "flip")
    scale: tuple[float, ...]  # (C,)
    shift: tuple[float, ...]  # (C,)
    input_range: tuple[float, float]  # of the pixels that the VAE was given
    image_size: int  # of the square images that were encoded, in pixels
    crop: str
    vae_sha256: str

    @property
    def planes(self) -> int:
        """Stored of each view: C or 2C."""
        return self.channels * (2 if self.parametrisation == MEAN_LOGVAR else 1)


@dataclass(frozen=True)
class TextSpec:
    """What `text.npy`, fp16 (valid tokens, D), and `pooled.npy`, fp16 (P,), hold, and the same of an empty caption."""

    encoder: str  # "clip", "t5", a model_type of transformers, or several joined by "+" and "|"
    encoder_sha256: str
    max_length: int  # tokens; a longer caption was cut
    hidden_size: int  # D
    pooled_size: int  # P; 0 where the encoder has no pooled vector
    null: File  # (tokens, D)
    null_pooled: File | None  # (P,)


@dataclass(frozen=True)
class FolderMeta:
    """`index.json` of a folder."""

    packing: dict[str, Any] | None  # what made it; None: tars of another origin
    num_samples: int
    num_classes: int  # 0 where there are no labels
    class_names: tuple[str, ...]
    image_size: int | None  # height and width in pixels; None: they vary, or there are no images
    channels: int | None  # 1 or 3; None: no images
    fields: tuple[str, ...]
    shards: tuple[Shard, ...]
    offsets: File
    keys: File
    quarantine: File | None
    base: Base | None
    latents: LatentSpec | None
    text: TextSpec | None


def parse_meta(meta: dict[str, Any]) -> FolderMeta:
    """Check the type of every entry. Raises KeyError, TypeError or ValueError for one that is missing or wrong."""
    fields, shards = _list(meta, "fields", str), tuple(_shard(entry) for entry in _list(meta, "shards", dict))
    for what, names in (("fields", fields), ("shards", [shard.name for shard in shards])):
        if len(set(names)) != len(names):
            raise ValueError(f"{what} has an entry twice")
    return FolderMeta(
        packing=_optional(meta, "packing", lambda _: _entry(meta, "packing", dict)),
        num_samples=_count(meta, "num_samples"),
        num_classes=_count(meta, "num_classes", at_least=0),
        class_names=_list(meta, "class_names", str),
        image_size=_optional(meta, "image_size", lambda _: _count(meta, "image_size")),
        channels=_optional(meta, "channels", lambda _: _count(meta, "channels")),
        fields=fields,
        shards=shards,
        offsets=_file(_entry(meta, "offsets", dict)),
        keys=_file(_entry(meta, "keys", dict)),
        quarantine=_optional(meta, "quarantine", _file),
        base=_optional(meta, "base", _base),
        latents=_optional(meta, "latents", _latents),
        text=_optional(meta, "text", _text),
    )


def _entry(meta: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = meta[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, not {kind.__name__}")
    return value


def _count(meta: dict[str, Any], name: str, at_least: int = 1) -> int:
    value = _entry(meta, name, int)
    if value < at_least:
        raise ValueError(f"{name} is {value}, not {'a positive number' if at_least else 'a number from 0'}")
    return value


def _list(meta: dict[str, Any], name: str, kind: type[_T]) -> tuple[_T, ...]:
    return tuple(_entry({name: value}, name, kind) for value in _entry(meta, name, list))


def _floats(meta: dict[str, Any], name: str, length: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in _entry(meta, name, list) if not isinstance(value, str | bool))
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} has a number that is not finite")
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} numbers, not {length}")
    return values


def _optional(meta: dict[str, Any], name: str, parse: Callable[[dict[str, Any]], _T]) -> _T | None:
    value = meta[name]
    return None if value is None else parse(value)


def _shard(entry: dict[str, Any]) -> Shard:
    name = _plain_name(_entry(entry, "name", str))
    num_samples, num_bytes = _count(entry, "num_samples", at_least=0), _count(entry, "num_bytes")
    return Shard(name, num_samples, num_bytes, _entry(entry, "sha256", str))


def _file(entry: dict[str, Any]) -> File:
    return File(_plain_name(_entry(entry, "name", str)), _entry(entry, "sha256", str))


def _base(entry: dict[str, Any]) -> Base:
    return Base(_entry(entry, "fingerprint", str), _entry(entry, "keys_sha256", str))


def _latents(entry: dict[str, Any]) -> LatentSpec:
    channels = _count(entry, "channels")
    low, high = _floats(entry, "input_range", 2)
    return LatentSpec(
        parametrisation=_entry(entry, "parametrisation", str),
        channels=channels,
        height=_count(entry, "height"),
        width=_count(entry, "width"),
        views=_list(entry, "views", str),
        scale=_floats(entry, "scale", channels),
        shift=_floats(entry, "shift", channels),
        input_range=(low, high),
        image_size=_count(entry, "image_size"),
        crop=_entry(entry, "crop", str),
        vae_sha256=_entry(entry, "vae_sha256", str),
    )


def _text(entry: dict[str, Any]) -> TextSpec:
    return TextSpec(
        encoder=_entry(entry, "encoder", str),
        encoder_sha256=_entry(entry, "encoder_sha256", str),
        max_length=_count(entry, "max_length"),
        hidden_size=_count(entry, "hidden_size"),
        pooled_size=_count(entry, "pooled_size", at_least=0),
        null=_file(_entry(entry, "null", dict)),
        null_pooled=_optional(entry, "null_pooled", _file),
    )


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or name != Path(name).name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name
