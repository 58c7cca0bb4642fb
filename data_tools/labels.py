"""The labels of a column: numbers stay numbers, names become their ranks, and what is neither is a bad item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.source import BadItemError, label_payload
from data_tools.table_files import UnreadableCell, is_missing
from diffmoe_dist.data.labels import MAX_LABEL, is_number, label_number
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import is_utf8

_QUOTED = 40  # characters of a label in a message


@dataclass(frozen=True)
class Labels:
    """Of items numbered from 0."""

    class_names: Sequence[str]
    numbers: np.ndarray  # (items,) int64; -1: none
    problems: Mapping[int, str]  # why an item has none

    def part(self, items: np.ndarray) -> Labels:
        """Those of some items, renumbered; without the names."""
        places = enumerate(items.tolist())
        problems = {place: self.problems[item] for place, item in places if item in self.problems}
        return Labels((), self.numbers[items], problems)

    def payload(self, item: int) -> bytes:
        """The field `cls`. Raises BadItemError where the item has no label."""
        if item in self.problems:
            raise BadItemError(self.problems[item])
        return label_payload(self.numbers[item])


def number_labels(values: Sequence[Any], known: Sequence[str] = (), largest: int | None = None) -> Labels | None:
    """Labels of the cells of a column; None where every one is missing or negative, as in test sets.

    They are numbers where most of the different ones are, else names, whose label is their rank. `known` names of
    classes are numbered already: a text is one of them, a number stays.
    Raises UserError for a `largest` label of classes that have names.
    """
    texts = [_as_text(value) for value in values]
    different = {text for text in texts if text is not None and not isinstance(text, UnreadableCell)}
    if all(text is None or (text in different and _is_negative(text)) for text in texts):
        return None
    named = {text for text in different if not is_number(text)}
    counted = {text for text in different - named if not _is_negative(text)}
    if known or len(counted) <= len(named):
        refuse_max_label(largest, "the classes have names")
    largest = MAX_LABEL if largest is None else largest
    names: Sequence[str] = known
    if known:
        rank = {name.strip(): label for label, name in enumerate(known)} if _holds_text(values) else {}
        of_text = {text: rank[text] if text in rank else _known_number(text, known) for text in different}
    elif len(counted) > len(named):
        of_text = {text: _number(text, largest) for text in different}
        names = [
            str(label) for label in range(1 + max((n for n in of_text.values() if isinstance(n, int)), default=-1))
        ]
    else:
        names = sorted(text for text in different if not _is_negative(text))
        of_text = {text: _number(text, largest) for text in different - set(names)}
        of_text.update((name, label) for label, name in enumerate(names))
    found = [of_text[text] if text in different else text or "no label" for text in texts]
    labels = np.array([one if isinstance(one, int) else -1 for one in found], dtype=np.int64)
    return Labels(names, labels, {item: str(one) for item, one in enumerate(found) if not isinstance(one, int)})


def refuse_max_label(largest: int | None, problem: str) -> None:
    """Raises UserError where --max-label is given to data that it changes nothing of."""
    if largest is not None:
        raise UserError(f"--max-label={largest}: {problem}, so it would change nothing; leave it out")


def _as_text(value: Any) -> str | UnreadableCell | None:
    """A label as it would stand in a text file; None: missing."""
    if is_missing(value):
        return None
    if isinstance(value, UnreadableCell):
        return value
    if isinstance(value, float) and math.isinf(value):
        return UnreadableCell(f"label {value} is not a whole number")
    if isinstance(value, (list, tuple, dict, set)):
        return UnreadableCell(f"label {str(value)[:_QUOTED]} is not one class")
    text = str(value).strip("\ufeff \t\r\n")
    if not is_utf8(text) or "\0" in text:
        return UnreadableCell(f"label {text[:_QUOTED]!r} is not text in UTF-8")
    return text or None


def _holds_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _is_negative(text: str) -> bool:
    return text.startswith("-") and is_number(text)


def _number(text: str, largest: int) -> int | str:
    """A label, or why there is none."""
    try:
        return label_number(text, largest)
    except ValueError as error:
        return str(error)


def _known_number(text: str, known: Sequence[str]) -> int | str:
    if not is_number(text):
        return f"label {text[:_QUOTED]!r} is none of the {len(known)} named classes"
    return _number(text, len(known) - 1)
