"""The sentence that refuses one setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffmoe_dist.errors import UserError


def require(section: Any, section_name: str, name: str, accepts: Callable[[Any], bool], rule: str) -> None:
    """Refuse a setting that has a value and not an acceptable one, naming the rule."""
    value = getattr(section, name)
    if value is not None and not accepts(value):
        raise UserError(f"{section_name}.{name}={value} must be {rule}")
