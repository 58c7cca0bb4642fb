"""What the encoders of images and of captions have in common: fingerprint, loading, exact sums, rounding to fp16."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from diffmoe_dist.data.index import text_sha256
from diffmoe_dist.data.model_folder import read_model_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256

# What a folder may hold beside the module that is asked for: the decoder of a T5, the image's tower of a CLIP.
_OTHER_TOWER = re.compile(r"decoder\.|vision_model\.")
_LAYER = re.compile(r"(layers?|blocks?|resnets|attentions)\.\d+\.")
_WIDTHS = (
    "block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "d_ff", "d_kv", "d_model",
    "hidden_size", "intermediate_size", "vocab_size",
)  # fmt: skip


def model_sha256(folder: Path, *patterns: str) -> str:
    """The fingerprint of the files that make a model: of their names and contents."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return text_sha256(part for path in files for part in (path.name, file_sha256(path)))


def load_in_fp32(architecture: Any, folder: str | Path, named: str, **options: Any) -> Any:
    """A pretrained module, in eval mode and without gradients. Nothing is fetched, and nothing is unpickled.

    Args:
        architecture: a class with diffusers' or transformers' `from_pretrained`.
        named: how the user named the folder.
        options: more arguments of `from_pretrained`, that for fp32 among them.

    Raises:
        UserError: the weights do not load, are not those of config.json, or are not finite.
    """
    _check_sizes(Path(folder), named)
    try:
        module, report = architecture.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files make it fail in any way
        raise UserError(f"{named}: does not load ({one_line(error)}); fetch it again") from error
    if report["missing_keys"]:  # would be random numbers
        raise UserError(f"{named}: lacks weights, as {sorted(report['missing_keys'])[0]}; fetch it again")
    own_towers = {tower[0] for name in module.state_dict() if (tower := _OTHER_TOWER.match(name))}

    def is_spare(name: str) -> bool:
        tower = _OTHER_TOWER.match(name)
        return _LAYER.search(name) is not None and (tower is None or tower[0] in own_towers)

    spare = sorted(filter(is_spare, report["unexpected_keys"]))
    if spare:
        raise UserError(f"{named}: config.json says a model without {spare[0]}, which is stored; fetch both again")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{named}: {name} holds numbers that are not finite; fetch it again")
    return module.requires_grad_(False).eval()


def one_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _check_sizes(folder: Path, named: str) -> None:
    """Refuse sizes in config.json that cannot be of the stored weights, before a module of those sizes is made."""
    shapes: list[list[int]] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118, no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{named}: {path.name} is cut or damaged ({error}); fetch it again") from None
    largest = max((size for shape in shapes for size in shape), default=0)
    for name, value in _sizes("", read_model_config(folder, named)):
        limit = largest if name in _WIDTHS else len(shapes)
        if value > limit:
            raise UserError(
                f"{named}: config.json says {name} {value}, the weights say {limit} at most; fetch it again"
            )


def _sizes(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The entries of a configuration that a module's size follows from, and how long its lists are."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _sizes(key, entry)
    elif isinstance(value, list):
        yield f"length of {name}", len(value)
        for entry in value:
            yield from _sizes(name, entry)
    elif isinstance(value, int) and (name in _WIDTHS or "layers" in name):
        yield name, value


@contextmanager
def reproducible_arithmetic() -> Iterator[None]:
    """One thread, no TF32, no choice of algorithm by timing: the same rounding in every process on a kind of device."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # training may allow TF32 for its own products
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def to_fp16(array: np.ndarray, what: str) -> np.ndarray:
    """Round to fp16. Raises UserError where a number does not fit."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{what}: the encoder gives numbers that are not finite in fp16; check its weights")
    return half
