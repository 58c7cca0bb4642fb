"""Ranks that disagree: a stale clone or data folder on one node, another setting on one rank.

Each rank would compute without an error, and the curve would be nobody's. So the first thing that ranks do together is
to compare what they are about to do.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffmoe_dist.errors import UserError

_MOST_NAMED = 8  # ranks in a message


def check_agreement(values: Mapping[str, Any], remedy: str, own_code: str | None = None) -> None:
    """Refuse ranks with other values than the first one's, and ranks with another version of this code or of torch.

    Collective.

    Args:
        values: by name, what must be the same on every rank.
        own_code: a module of the user's own that has been imported, whose sources must be the same, too.

    Raises:
        UserError: on every rank, naming the first value that differs, and the ranks.
    """
    mine = {"the code of diffmoe_dist": code_sha256(), "torch": torch.__version__, **values}
    if own_code is not None:
        mine[f"the code of {own_code}"] = code_sha256(own_code)
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first = everyone[0]
    for name in {name: None for of_rank in everyone for name in of_rank}:
        others = [rank for rank, of_rank in enumerate(everyone) if of_rank.get(name) != first.get(name)]
        if others:
            ranks = ", ".join(map(str, others[:_MOST_NAMED])) + (", ..." if len(others) > _MOST_NAMED else "")
            raise UserError(
                f"{name}={_short(first.get(name))} on rank 0, but {_short(everyone[others[0]].get(name))} on rank"
                f"{'s' if len(others) > 1 else ''} {ranks}; {remedy}"
            )


@cache
def code_sha256(module: str = "diffmoe_dist") -> str:
    """The fingerprint of the sources of an imported module, or of the whole package that it is of."""
    package = sys.modules[module.partition(".")[0]]
    digest = hashlib.sha256()
    for root in map(Path, getattr(package, "__path__", [])):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    if not hasattr(package, "__path__"):
        digest.update(Path(str(package.__file__)).read_bytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 or "/" in text else f"{text[:12]}..."
