"""A look into the local folder of a pretrained model, before anything heavy is imported or loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from diffmoe_dist.errors import UserError


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
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{named}: no config.json that can be read; give the local folder of {wanted}") from None
    kind = config.get(entry) if isinstance(config, dict) else None
    if kind not in kinds:
        raise UserError(f"{named}: is {kind}; give the local folder of {wanted}")
    for patterns in files:
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise UserError(f"{named}: no {' or '.join(patterns)}; fetch it too")
    return str(kind)
