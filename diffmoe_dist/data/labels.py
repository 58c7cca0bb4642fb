"""Classes as people and their tools write them: `3`, ` 3 `, and `3.0` where pandas met a gap in a column of numbers."""

from __future__ import annotations

import re
from decimal import Decimal

MAX_LABEL = 1_000_000  # a class is an entry of an embedding, and a name in the index
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,4})?")


def is_number(text: str) -> bool:
    """Whether a label is a number, whatever number, and not a name."""
    return _NUMBER.fullmatch(text.strip()) is not None


def label_number(text: str, largest: int = MAX_LABEL) -> int:
    """The class that a number says. Raises ValueError for what is no number, or none of a class."""
    text = text.strip()
    if not is_number(text):
        raise ValueError(f"label {text[:20]!r} is not a number")
    number = Decimal(text)
    if not 0 <= number <= largest or number != int(number):
        raise ValueError(f"label {text[:20]} is not a whole number from 0 to {largest}")
    return int(number)


def label_in_payload(payload: bytes, largest: int = MAX_LABEL) -> int:
    """The class of a `cls` member. Raises ValueError where it is none."""
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"label {payload[:20]!r} is not a number") from None
    return label_number(text, largest)
