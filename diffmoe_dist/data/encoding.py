"""What the encoders of images and of captions have in common: fingerprint, loading, exact sums, rounding to fp16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmoe_dist.data.index import text_sha256
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256


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
        UserError: the weights do not load, or some are missing.
    """
    try:
        module, report = architecture.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{named}: does not load ({error}); fetch it again") from error
    if report["missing_keys"]:  # would be random numbers
        raise UserError(f"{named}: lacks weights, as {sorted(report['missing_keys'])[0]}; fetch it again")
    return module.requires_grad_(False).eval()


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
