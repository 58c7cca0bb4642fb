"""Settings as people write them: YAML files and `key=value` overrides, to nested dictionaries of text.

Nothing is guessed from how a value looks. YAML 1.1 would read `12345_1`, `010` and `1:30` as the numbers 123451, 8 and
90, and `yes` as true. Here a scalar is its text until the setting that it is for says what it means: the value of a
text setting is taken as written, and a number is a number in decimal digits.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from diffmoe_dist.errors import UserError

Given = dict[str, Any]  # by name: text, None, a list, or again such a dictionary

_MOST_VALUES, _MOST_LEVELS = 10_000, 20
_PLACE = re.compile(r"[^.\[\]=]+|\[\d+\]")
_NUMBERS = {
    int: (re.compile(r"[+-]?(0|[1-9][0-9]{0,30})"), "a whole number, such as 8"),
    float: (
        re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?\.?(inf|nan)"),
        "a number, such as 0.5 or 1e-4",
    ),
}
_SCALARS = {kind: meant for kind, (_, meant) in _NUMBERS.items()} | {bool: "true or false", str: "one text"}
_NULL_AND_MERGE = {
    first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _TextLoader(yaml.SafeLoader):
    """YAML whose scalars are text or null, and whose mappings have each key once."""

    yaml_implicit_resolvers = _NULL_AND_MERGE

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if not key.tag.endswith(":merge")]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        found = super().construct_mapping(node, deep)
        return {"null" if key is None else str(key): value for key, value in found.items()}


def read_yaml(path: Path) -> Given:
    """A file of settings.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        found = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise UserError(f"--config {path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: expected a mapping of settings at the top level")
    return found


def parse_yaml(text: str) -> Any:
    """Text, None, lists and dictionaries. Raises YAMLError, and RecursionError for what is nested too deeply."""
    loader = _TextLoader(text)
    try:
        found = loader.get_single_data()
    finally:
        loader.dispose()
    ahead, seen = [(found, 0)], 0
    while ahead:  # aliases can make a few lines as large as they like, and without an end
        here, depth = ahead.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _MOST_LEVELS:
            raise yaml.YAMLError(f"more than {_MOST_VALUES} values or {_MOST_LEVELS} levels")
        below = here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
        ahead += [(value, depth + 1) for value in below]
    return found


def apply_overrides(given: Given, overrides: Sequence[str], schema: Any) -> Given:
    """Settings with `key=value` overrides in their order, as `optim.lr=1e-4`, `optim.betas[1]=0.95`.

    Args:
        schema: a dataclass with the defaults; an item of a list that is not given is one of the default's.

    Raises:
        UserError: an override is no such thing, or its place is not there.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        places = _places(key)
        if not equals or places is None:
            raise UserError(f"override '{override}': expected key=value, such as optim.lr=1e-4")
        value = _parsed(text, override, _hint_of(places, schema))
        given = merge(given, _nested(given, places, value, schema, override))
    return given


def merge(lower: Any, upper: Any) -> Any:
    """What `upper` gives wins; dictionaries are merged, everything else is replaced."""
    if not (isinstance(lower, dict) and isinstance(upper, dict)):
        return upper
    return {**lower, **{key: merge(lower.get(key), value) for key, value in upper.items()}}


def check_scalars(given: Any, hint: Any, name: str = "") -> Any:
    """The settings with text where text is meant, `~` expanded, every number in decimal digits, every choice known.

    Args:
        hint: the type of the setting `name`, or an instance of its dataclass.

    Raises:
        UserError: a number is written otherwise, a choice is none, a list is missing, or a home folder is not known.
    """
    kind = _without_none(hint)
    if isinstance(given, (dict, list, tuple)) and isinstance(kind, type) and kind in _SCALARS:
        raise UserError(f"{name}={given}: give {_SCALARS[kind]}")
    if isinstance(given, dict):
        hints = _hints(hint)
        return {key: check_scalars(value, hints.get(key), f"{name}.{key}".lstrip(".")) for key, value in given.items()}
    if isinstance(given, list):
        items = _items(hint, len(given))
        return [
            check_scalars(value, item, f"{name}[{n}]") for n, (value, item) in enumerate(zip(given, items, strict=True))
        ]
    if given is None:
        return None
    if get_origin(kind) in (list, tuple) and not isinstance(given, tuple):
        raise UserError(f"{name}={given}: give a list, such as [1, 2]")
    if get_origin(kind) is Literal:
        return _check_choice(given, get_args(kind), name)
    return _check_text(given, kind, name) if isinstance(given, str) else given


def _check_choice(given: Any, choices: Sequence[Any], name: str) -> Any:
    for choice in choices:
        if str(choice) == str(given):
            return choice
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"{name}={given} is none of the choices; {hint}choose from {', '.join(names)}")


def _check_text(text: str, kind: Any, name: str) -> Any:
    if "${" in text:  # OmegaConf would put another setting or a variable there
        raise UserError(f"{name}={text}: ${{ stands for nothing here; write the value itself")
    if kind in _NUMBERS:
        form, meant = _NUMBERS[kind]
        if not form.fullmatch(text):
            raise UserError(f"{name}={text}: give {meant}, in decimal digits")
        return text.replace(".inf", "inf").replace(".nan", "nan")
    if kind is bool and text.lower() not in ("true", "false"):
        raise UserError(f"{name}={text}: give true or false")
    if kind is str and text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(f"{name}={text}: no such home folder; give the whole path")
        return expanded
    return text


def _places(key: str) -> list[str | int] | None:
    """`data.mixture[0].shards` to its names and numbers; None: it is no key."""
    parts = _PLACE.findall(key)
    if not parts or re.sub(r"\.(?=\[)", "?", key) != "".join(_joined(parts)):
        return None
    return [int(part[1:-1]) if part.startswith("[") else part for part in parts]


def _joined(parts: list[str]) -> Iterator[str]:
    for number, part in enumerate(parts):
        yield part if part.startswith("[") or not number else f".{part}"


def _parsed(text: str, override: str, hint: Any) -> Any:
    kind = _without_none(hint)
    if kind is str or get_origin(kind) is Literal:
        return text if text not in ("", "null") else None
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"override '{override}': not readable as YAML: {_one_line(error)}") from None


def _nested(given: Any, places: Sequence[str | int], value: Any, default: Any, override: str) -> Any:
    """What `merge` takes to put the value there: dictionaries, and of a list the whole."""
    if not places:
        return value
    place, *further = places
    if isinstance(place, str):
        below = given.get(place) if isinstance(given, dict) else None
        return {place: _nested(below, further, value, getattr(default, place, None), override)}
    items = given if isinstance(given, list) else [*(default or ())] if isinstance(default, (list, tuple)) else None
    if items is None or place > len(items):
        raise UserError(f"override '{override}': there is no [{place}]; give the whole list")
    below = items[place] if place < len(items) else None
    return [*items[:place], merge(below, _nested(below, further, value, None, override)), *items[place + 1 :]]


def _hint_of(places: Sequence[str | int], hint: Any) -> Any:
    for place in places:
        hint = _hints(hint).get(place) if isinstance(place, str) else _items(hint, min(place, _MOST_VALUES) + 1)[-1]
    return hint


def _hints(hint: Any) -> dict[str, Any]:
    """The types of the settings below one, by name; of a section that has a default, that default."""
    if isinstance(hint, type) and is_dataclass(hint):
        return get_type_hints(hint)
    if not is_dataclass(hint):
        return {}
    known = get_type_hints(type(hint))
    values = {field.name: getattr(hint, field.name) for field in fields(hint)}
    return {name: values[name] if is_dataclass(values.get(name)) else known[name] for name in values}


def _items(hint: Any, count: int) -> list[Any]:
    """The types of the items of a list or tuple."""
    kind = _without_none(hint)
    arguments = list(get_args(kind)) if get_origin(kind) in (list, tuple) else []
    if get_origin(kind) is list:
        arguments *= count
    return [*arguments, *[None] * count][:count]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    return hint


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
