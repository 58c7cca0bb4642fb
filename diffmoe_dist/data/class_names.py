"""What classes are called: in a data set, in the checkpoints and weights made from it, and on the command line.

A folder of shards names its classes in its index. Where those are codes, as ImageNet's WordNet ids, words for people
can stand beside them in `class_words.txt`, a line `n01440764 tench, Tinca tinca` for each: Kaggle's
LOC_synset_mapping.txt is such a file. It is no part of the data's fingerprint, so it can be put there later.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import read_json_object, refuse_irregular

WORDS_NAME = "class_words.txt"  # in a folder of shards
NAMES_NAME = "class_names.json"  # in a checkpoint
_NEAREST = 3  # names that a message offers
_NUMBER = re.compile(r"[+-]?[0-9]+")
logger = logging.getLogger("diffmoe_dist.data")


@dataclass(frozen=True)
class ClassNames:
    """The names of class 0, 1, ...: the first one of each is shown, and by all of them it is found."""

    of_class: tuple[tuple[str, ...], ...] = ()  # empty: not known

    def __bool__(self) -> bool:
        return bool(self.of_class)

    @property
    def shown(self) -> list[str]:
        return [names[0] for names in self.of_class]

    def to_json(self) -> dict[str, list[Any]]:
        return {"class_names": self.shown, "other_class_names": [list(names[1:]) for names in self.of_class]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ClassNames:
        """Of a record without names: none. Raises ValueError where they are no names."""
        shown = record.get("class_names", [])
        if not isinstance(shown, list):
            raise ValueError("class_names is no list")
        others = record.get("other_class_names", [[]] * len(shown))
        if not isinstance(others, list) or len(others) != len(shown):
            raise ValueError("other_class_names are not those of class_names")
        rows = [[first, *rest] if isinstance(rest, list) else [] for first, rest in zip(shown, others, strict=True)]
        if not all(row and all(isinstance(name, str) and name for name in row) for row in rows):
            raise ValueError("class_names holds what is no name")
        return cls(tuple(map(tuple, rows)))

    def find(self, name: str) -> list[int]:
        """The classes that are called so: exactly, else whatever the case, underscores, and spaces at commas."""
        return self._exact.get(name.strip()) or self._loose.get(_loose(name), [])

    def numbers(self, text: str, num_classes: int, option: str = "--classes") -> tuple[int, ...]:
        """The classes of a list such as `golden retriever,7`: names and numbers, with commas between them.

        A number is a number, also where a class has one for a name. Names may have commas in them. A class that is
        given twice, as by two of its names, is taken once, which is told.

        Raises:
            UserError: there is no such class, or several; with the nearest names.
        """
        found = tuple(self._numbers(text, num_classes, option))
        if not all(_NUMBER.fullmatch(part.strip()) for part in text.split(",")):
            logger.info("%s %s: %s", option, text, ", ".join(f"{label} ({self.shown[label]})" for label in found))
        return taken_once(found, option)

    def _numbers(self, text: str, num_classes: int, option: str) -> Iterator[int]:
        parts, place = text.split(","), 0
        while place < len(parts):
            joined = [",".join(parts[place : place + many]) for many in range(1 + self._most_commas, 1, -1)]
            named = next((name for name in joined if len(self.find(name)) == 1), None)
            if named is None:
                yield self._number(parts[place].strip(), num_classes, option)
                place += 1
            else:
                yield self.find(named)[0]
                place += 1 + named.count(",")

    def _number(self, part: str, num_classes: int, option: str) -> int:
        found = self.find(part)
        if _NUMBER.fullmatch(part):
            label = int(part)
            if 0 <= label < max(num_classes, 1):
                if found and label not in found:
                    logger.warning(
                        "%s %s: taken for the number of a class, which is called %r; the class that is called so has "
                        "number %d", option, part, self.shown[label], found[0],
                    )  # fmt: skip
                return label
            if len(found) != 1:
                raise UserError(f"{option} {part}: this model knows the classes 0 to {num_classes - 1}")
        if len(found) == 1:
            return found[0]
        raise UserError(f"{option} {part}: {self.why_not(found, part, num_classes)}")

    def why_not(self, found: Sequence[int], name: str, num_classes: int) -> str:
        """Why a name means no class, where `find` has found none or several, for a message."""
        if not self:
            return f"the names of this model's classes are not known; give numbers, 0 to {num_classes - 1}"
        if found:
            which = ", ".join(f"{label} ({self.shown[label]})" for label in found)
            return f"several classes are called so: {which}; give the number"
        nearest = self.nearest(name)
        if nearest:
            return f"this model has no class of that name; the nearest are {', '.join(map(repr, nearest))}"
        some = ", ".join(map(repr, self.shown[:_NEAREST]))
        return f"this model has no class of that name; it has {some}{' ...' if len(self.of_class) > _NEAREST else ''}"

    def nearest(self, name: str) -> list[str]:
        """A few names that are like this one, or have it as a part; as they are shown."""
        wanted = _loose(name)
        close = difflib.get_close_matches(wanted, self._loose, _NEAREST)
        close += [known for known in self._loose if wanted and wanted in known]
        labels = dict.fromkeys(self._loose[known][0] for known in close)
        return [self.shown[label] for label in labels][:_NEAREST]

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        return self._by(lambda name: name)

    @cached_property
    def _loose(self) -> dict[str, list[int]]:
        return self._by(_loose)

    def _by(self, key: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for label, names in enumerate(self.of_class):
            for name in dict.fromkeys(map(key, names)):
                found.setdefault(name, []).append(label)
        return found

    @cached_property
    def _most_commas(self) -> int:
        return max((name.count(",") for names in self.of_class for name in names), default=0)


NO_NAMES = ClassNames()


def names_of_data(class_names: Sequence[str], folder: Path) -> ClassNames:
    """The names of a folder of shards: those of its index, and the words for them where its file has some.

    Raises:
        UserError: the file is no text, or has words for none of the classes.
    """
    path = folder / WORDS_NAME
    try:
        lines = refuse_irregular(path).read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore or remove it") from None
    rows = (line.strip().split("\t" if "\t" in line else " ", 1) for line in lines if line.strip())
    words = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    if path.exists() and not words.keys() & set(class_names):
        raise UserError(
            f"{path}: has words for none of the {len(class_names)} classes, such as {class_names[:1]}; a line is "
            "`NAME words`"
        )
    synonyms = [_parts(words.get(name, "")) for name in class_names]
    times = Counter(of_class[0] for of_class in synonyms if of_class)
    named: list[tuple[str, ...]] = []
    for name, of_class in zip(class_names, synonyms, strict=True):
        whole = words.get(name, "")
        first = of_class[0] if of_class else name or str(len(named))
        shown = f"{first} ({name})" if times[first] > 1 else first
        named.append(tuple(dict.fromkeys(one for one in (shown, name, whole, *of_class, *_parts(name)) if one)))
    return ClassNames(tuple(named))


def taken_once(labels: Sequence[int], option: str) -> tuple[int, ...]:
    once = Counter(labels)
    if len(once) < len(labels):
        twice = ", ".join(str(label) for label, times in once.items() if times > 1)
        logger.warning("%s: given more than once, and taken once: class %s", option, twice)
    return tuple(once)


def label_texts(names: ClassNames, num_classes: int) -> list[str]:
    """The names of each class with commas between them, as diffusers' DiT has them; `class N` where it has none."""
    if not names:
        return [f"class {label}" for label in range(num_classes)]
    return [", ".join(dict.fromkeys(part for name in of_class for part in _parts(name))) for of_class in names.of_class]


def names_of_texts(texts: Sequence[str]) -> ClassNames:
    """What `label_texts` undoes."""
    if list(texts) == label_texts(NO_NAMES, len(texts)):
        return NO_NAMES
    return ClassNames(tuple(tuple(_parts(text)) or (f"class {label}",) for label, text in enumerate(texts)))


def read_names_file(folder: Path) -> ClassNames:
    """The names in a checkpoint; none where it has none. Raises UserError where they are damaged."""
    path = folder / NAMES_NAME
    if not path.exists():
        return NO_NAMES
    try:
        return ClassNames.from_json(read_json_object(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); take another checkpoint") from None


def _parts(words: str) -> list[str]:
    """The synonyms in `tench, Tinca tinca`."""
    return [part.strip() for part in words.split(",") if part.strip()]


def _loose(name: str) -> str:
    return ", ".join(" ".join(part.split()) for part in name.casefold().replace("_", " ").split(","))
