"""Which members of a tar are one sample; the same whether the tar is indexed, packed again or read as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from diffmoe_dist.data.format import CAPTION_FIELD, IMAGE_FIELDS, LABEL_FIELD, METADATA_FIELD, split_name

SAMPLE_FIELDS = (LABEL_FIELD, CAPTION_FIELD, METADATA_FIELD)  # beside the image
_Member = TypeVar("_Member")


def group_members(members: Iterable[tuple[str, _Member]]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, member by field) of each sample, of members with their names.

    Neighbours of one key form a sample, as in WebDataset: the key ends at the first dot of the file's name. At the last
    dot, where the members can be samples only so: `img_1.3.png`, `img_1.3.cls`.
    """
    key, group = "", dict[str, tuple[str, _Member]]()
    for name, member in members:
        next_key, field = split_name(name)
        if not next_key:
            continue
        if group and (next_key != key or field in group):
            yield from _split_dotted(key, group)
            group = {}
        key = next_key
        group[field] = name, member
    if group:
        yield from _split_dotted(key, group)


def _split_dotted(key: str, group: dict[str, tuple[str, _Member]]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """The group, or the samples in it whose keys have dots: with an image each, and nothing but such samples.

    `a.jpg`, `a.cls`, `a.mask.png` are one sample with a field more.
    """
    parts: dict[str, dict[str, _Member]] = {}
    kinds: dict[str, set[str]] = {}
    for field, (name, member) in group.items():
        last = field.rpartition(".")[2]
        if last in (*IMAGE_FIELDS, *SAMPLE_FIELDS):
            own_key = name[: -len(last) - 1] if "." in field else key
            parts.setdefault(own_key, {})[last] = member
            kinds.setdefault(own_key, set()).add("image" if last in IMAGE_FIELDS else last)
    plain = kinds.get(key)
    dotted = [found for own_key, found in kinds.items() if own_key != key and "image" in found]
    if dotted and (plain is None or (len(plain) > 1 and all(found == plain for found in dotted))):
        yield from parts.items()
    else:
        yield key, {field: member for field, (_, member) in group.items()}
