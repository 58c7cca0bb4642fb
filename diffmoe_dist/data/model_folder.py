"""A look into the local folder of a pretrained model, before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import read_json_object, refuse_pointer


def check_model_folder(
    folder: Path,
    named: str,
    wanted: str,
    kinds: Collection[str],
    *,
    entry: str = "model_type",
    files: Sequence[Sequence[str]] = (("*.safetensors",),),
) -> str:
    """What kind of model a folder holds: what its config.json says in `entry`, which must be one of `kinds`.

    Args:
        named: how the user named the folder, as `--vae=FOLDER`.
        wanted: what belongs there, with its article, for the remedy.
        files: of each group of patterns, one must match a file.

    Raises:
        UserError: no config.json, another kind of model, or a file that is missing.
    """
    config = read_model_config(folder, named, f"give the local folder of {wanted}")
    kind = config.get(entry)
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{named}: is {kind}; give the local folder of {wanted}")
    refuse_pointers(folder, named, [pattern for patterns in files for pattern in patterns])
    for patterns in files:
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise UserError(f"{named}: no {' or '.join(patterns)}; fetch it too")
    return str(kind)


def read_model_config(folder: Path, named: str, remedy: str = "fetch it again") -> dict[str, Any]:
    """What config.json holds. Raises UserError where it cannot be read, or holds no object."""
    try:
        return read_json_object(folder / "config.json")
    except (OSError, ValueError):
        raise UserError(f"{named}: no config.json that can be read; {remedy}") from None


def refuse_pointers(folder: Path, named: str, patterns: Sequence[str]) -> None:
    """Refuse a folder where files that match are what Git leaves in their place, or no regular files.

    Raises:
        UserError: names the first.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        refuse_pointer(path, named)
