"""Weights apart from any run: a folder of two files, which other programs can read too.

weights/demo/
    model.safetensors   every parameter and buffer of the model, fp32 but for counters
    config.json         the format, the resolved settings, where the weights come from, SHA-256 sums; what the
                        classes are called, where that is known
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffmoe_dist.config import Config, build_config, load_config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames, read_names_file
from diffmoe_dist.engine.checkpoint import Spread, find_checkpoint, read_checkpoint_model
from diffmoe_dist.engine.ema import stored_average
from diffmoe_dist.engine.sharded_state import EXP_AVG, EXP_AVG_SQ, Fragment
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256, flush_directory, read_json_object, refuse_pointer, write_json
from diffmoe_dist.model.dit import DiT

FORMAT = "diffmoe-weights"
VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def find_model(directory: str | Path) -> Path:
    """What `read_model` can read: a folder of weights, or the checkpoint meant by a run or step folder.

    Raises:
        UserError: there is none.
    """
    directory = Path(directory)
    return directory if is_weights_folder(directory) else find_checkpoint(directory)


def read_model(
    folder: Path,
    device: str | torch.device,
    overrides: Sequence[str] = (),
    spread: Spread | None = None,
    ema_decay: float | None = None,
    ema_length: float | None = None,
) -> tuple[DiT, Config]:
    """The model of a folder of weights, or the averaged one of a checkpoint, in eval mode, and its settings.

    Args:
        overrides: key=value, applied to the settings.
        spread: as in `read_checkpoint_model`.
        ema_decay, ema_length: which average of a checkpoint; default: that of `ema.decay`.

    Raises:
        UserError: the folder is damaged, has no such average, or an override is not possible.
    """
    if is_weights_folder(folder):
        for name, value in {"--ema-decay": ema_decay, "--ema-length": ema_length}.items():
            if value is not None:
                raise UserError(f"{name} {value:g} has no effect with {folder}, one set of weights; leave it out")
        if spread is not None:
            raise UserError(
                f"--checkpoint {folder}: experts of a folder of weights are not sharded; leave out --expert"
            )
        return _read_weights(folder, device, overrides)
    kind = partial(stored_average, decay=ema_decay, length=ema_length)
    return read_checkpoint_model(folder, device, kind, overrides, spread)


def read_settings(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of the model that `read_model` would read; its weights are not looked at.

    Raises:
        UserError: they cannot be read, or an override is not possible.
    """
    if is_weights_folder(folder):
        return _read_settings(folder, overrides)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"checkpoint {folder} is damaged (config.yaml is missing); take another one")
    return load_config(folder / "config.yaml", overrides, stored=True)


def read_class_names(folder: Path) -> ClassNames:
    """What the classes are called of the model that `read_model` would read; none where that is not known.

    `ClassNames.shown` are the names in order.

    Raises:
        UserError: they cannot be read.
    """
    if not is_weights_folder(folder):
        return read_names_file(folder)
    try:
        return ClassNames.from_json(read_record(folder))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}; convert the weights again") from None


def check_out(out: Path) -> None:
    """Refuse a folder to write to that holds something already."""
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    if not free:
        raise UserError(f"--out {out}: exists and is not an empty folder; choose another or remove it")


def write_weights(
    out: Path,
    tensors: Mapping[str, Tensor],
    config: Config,
    source: Mapping[str, Any],
    class_names: ClassNames = NO_NAMES,
) -> None:
    """Write a folder of weights; it has its name only when it is complete and on the disk.

    Settings that are places of this machine (`run_dir`, `data.*` and such) stay out.

    Args:
        source: where the weights come from, for `config.json`.

    Raises:
        UserError: `out` holds something already, or cannot be written.
    """
    with complete_folder(out) as folder:
        _write_files(folder, tensors, config, source, class_names)


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which has the name `out` when all is written, and is gone where something fails.

    Raises:
        UserError: `out` holds something already, or cannot be written.
    """
    check_out(out)
    out = out.resolve()
    unfinished = out.with_name(f".unfinished-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
        unfinished.mkdir()
        yield unfinished
        os.rename(unfinished, out)
        flush_directory(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written ({error}); choose another") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def fill_fragments(folder: Path, fragments: Sequence[Fragment], anew: Collection[str] = ()) -> None:
    """Start a run's weights, their averages and its buffers from a folder; AdamW's moments stay, and tensors `anew`.

    Of a stack of experts only the rows are read that hold the fragment.
    """
    with _open_file(folder) as file:
        for fragment in fragments:
            kind, _, name = fragment.name.partition(".")
            if kind not in (EXP_AVG, EXP_AVG_SQ) and name not in anew:
                fragment.data.copy_(_read(file, name, fragment))


def _write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Config,
    source: Mapping[str, Any],
    class_names: ClassNames,
) -> None:
    weights = folder / WEIGHTS_NAME
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    record = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": {WEIGHTS_NAME: file_sha256(weights)},
        "source": dict(source),
        **(class_names.to_json() if class_names else {}),
        "settings": portable_settings(config),
    }
    write_json(folder / CONFIG_NAME, record)
    shutil.copymode(folder / CONFIG_NAME, weights)  # safetensors leaves it to its owner alone
    flush_directory(folder)


def portable_settings(config: Config) -> dict[str, Any]:
    """The resolved settings but for places of this machine."""
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config))
    settings["run_dir"] = settings["train"]["initial_weights"] = settings["sample"]["decoder"] = None
    for section in ("data", "validation", "fid"):
        del settings[section]
    return settings


def is_weights_folder(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or (folder / WEIGHTS_NAME).is_file()


def _read_weights(folder: Path, device: str | torch.device, overrides: Sequence[str]) -> tuple[DiT, Config]:
    config = _read_settings(folder, overrides)
    with torch.device("meta"):
        model = DiT(config)
    with open_tensors(folder, model.state_dict()) as file:
        expected, found = read_record(folder)["sha256"][WEIGHTS_NAME], file_sha256(folder / WEIGHTS_NAME)
        if found != expected:
            raise UserError(
                f"{folder / WEIGHTS_NAME} has SHA-256 {found[:12]}..., {CONFIG_NAME} records {str(expected)[:12]}...; "
                "convert or copy the weights again"
            )
        model.to_empty(device="cpu")
        for name, tensor in model.state_dict().items():
            tensor.copy_(file.get_tensor(name))
    return model.to(device).eval().requires_grad_(False), config


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        record = read_json_object(path)
        found, _ = (record["format"], record["version"]), (record["settings"], record["sha256"][WEIGHTS_NAME])
    except FileNotFoundError:
        raise UserError(f"{path} is missing; convert or copy the weights again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not the one of a folder of weights ({reason}); convert them again") from None
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{path}: format {found[0]}, version {found[1]}, but this program reads {FORMAT}, version {VERSION}; "
            "convert the weights again"
        )
    return record


def _read_settings(folder: Path, overrides: Sequence[str] = ()) -> Config:
    settings = read_record(folder)["settings"]
    if not isinstance(settings, dict):
        raise UserError(f"{folder / CONFIG_NAME}: settings is no mapping; convert the weights again")
    try:
        return build_config(settings, overrides=overrides, training=False, stored=True)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}") from None


@contextmanager
def _open_file(folder: Path) -> Iterator[Any]:
    path = folder / WEIGHTS_NAME
    refuse_pointer(path)
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; convert or copy the weights again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); convert or copy the weights again") from None
    with opened as file:
        yield file


@contextmanager
def open_tensors(folder: Path, needed: Mapping[str, Tensor]) -> Iterator[Any]:
    """The open file, whose tensors have the names, shapes and types of those needed."""
    with _open_file(folder) as file:
        names = set(file.keys())
        for name, tensor in needed.items():
            stored = file.get_slice(name) if name in names else None
            found = "none" if stored is None else f"{stored.get_dtype()} {list(stored.get_shape())}"
            expected = f"{'I64' if tensor.dtype == torch.int64 else 'F32'} {list(tensor.shape)}"
            if found != expected:
                raise UserError(
                    f"{folder / WEIGHTS_NAME}: {name} is {found}, but its settings need {expected}; "
                    "convert the weights again"
                )
        extra = sorted(names - set(needed))
        if extra:
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {extra[0]} has no place in the model of its settings; convert them again"
            )
        yield file


def _read(file: Any, name: str, fragment: Fragment) -> Tensor:
    """The elements of a fragment; of a tensor of several rows, only the rows that have some are read."""
    stored = file.get_slice(name)
    shape, start, length = stored.get_shape(), fragment.start, len(fragment.data)
    if not shape:
        return file.get_tensor(name).view(1)[start : start + length]
    columns = fragment.columns
    row = math.prod(shape[1:]) if columns is None else columns.count
    first, end = start // row, -(-(start + length) // row)
    rows = stored[first:end] if columns is None else stored[first:end, columns.first : columns.first + columns.count]
    return rows.flatten()[start - first * row :][:length]
