"""A folder of shards that was edited, sums and all, is refused, or gives what was packed."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.verify import verify
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.errors import UserError
from tests.data.folders import png, random_images, write_folder

Edit = Callable[[Path], None]
FUZZ = settings(derandomize=True, deadline=None, max_examples=60)
NUMBERS = st.one_of(
    st.integers(-3, 15),
    st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63), 10**12]),
    st.integers(-(2**63), 2**63 - 1),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.just(10**400), st.floats(), st.text(max_size=8))
    | st.sampled_from(["..", ".", "a\0", "test-000000.tar", "offsets.npy", "png", "cls", "json", "/etc/passwd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "shards"
    samples = [{"png": png(image), "cls": b"%d" % (n % 2)} for n, image in enumerate(random_images(9, 8))]
    write_folder(out, samples, [4, 0, 5])
    return out


def _sealed(folder: Path, name: str) -> None:
    """Give a changed file its right sum and size in the index."""
    meta = json.loads((folder / "index.json").read_text())
    content = (folder / name).read_bytes()
    entries = [meta["offsets"], meta["keys"], *meta["shards"]]
    entry = next(entry for entry in entries if entry["name"] == name)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    if "num_bytes" in entry:
        entry["num_bytes"] = len(content)
    (folder / "index.json").write_text(json.dumps(meta))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


@st.composite
def _index_edits(draw: st.DrawFn) -> Edit:
    place, value, removed = draw(st.integers(0, 200)), draw(VALUES), draw(st.booleans())

    def edit(folder: Path) -> None:
        meta = json.loads((folder / "index.json").read_text())
        places = list(_places(meta))
        container, key = places[place % len(places)]
        if removed:
            del container[key]
        else:
            container[key] = value
        (folder / "index.json").write_text(json.dumps(meta))

    return edit


@st.composite
def _array_edits(draw: st.DrawFn) -> Edit:
    place, value = draw(st.integers(0, 53)), draw(NUMBERS)

    def edit(folder: Path) -> None:
        array = np.load(folder / "offsets.npy")
        array.reshape(-1)[place] = value
        np.save(folder / "offsets.npy", array)
        _sealed(folder, "offsets.npy")

    return edit


@st.composite
def _byte_edits(draw: st.DrawFn) -> Edit:
    names = ["index.json", "offsets.npy", "keys.npy", "test-000000.tar", "test-000002.tar"]
    name, sealed = draw(st.sampled_from(names)), draw(st.booleans())
    place, removed, added = draw(st.integers(0, 1 << 14)), draw(st.integers(0, 600)), draw(st.binary(max_size=20))

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        at = place % len(content)
        removed_here = len(added) if removed % 2 else removed  # often of the same length
        (folder / name).write_bytes(content[:at] + added + content[at + removed_here :])
        if sealed and name != "index.json":
            _sealed(folder, name)

    return edit


def _check(folder: Path, edit: Edit) -> None:
    original = ShardIndex.open(folder)
    with tempfile.TemporaryDirectory() as scratch:
        edited = Path(shutil.copytree(folder, Path(scratch) / "shards"))
        edit(edited)
        try:
            index = ShardIndex.open(edited)
            problems = verify(index, full=True).problems
        except (CorruptShardError, UserError) as error:
            assert "shards" in str(error)
            return
        for sample in range(index.num_samples):
            try:
                payloads = index.read(sample)
            except CorruptShardError:
                assert problems
                continue
            expected = original.read(sample)
            assert payloads == expected or (payloads.items() <= expected.items() and problems)


@FUZZ
@given(edit=_index_edits())
def test_an_edited_index_is_refused_or_reads_what_was_packed(folder: Path, edit: Edit) -> None:
    _check(folder, edit)


@FUZZ
@given(edit=_array_edits())
def test_edited_offsets_are_refused_or_read_what_was_packed(folder: Path, edit: Edit) -> None:
    _check(folder, edit)


@FUZZ
@given(edit=_byte_edits())
def test_edited_bytes_are_refused_or_read_what_was_packed(folder: Path, edit: Edit) -> None:
    _check(folder, edit)


@pytest.mark.parametrize("name", ["index.json", "offsets.npy", "keys.npy"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_special_file_in_the_place_of_an_index_file_is_refused(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    import os

    edited = Path(shutil.copytree(folder, tmp_path / "shards"))
    (edited / name).unlink()
    if kind == "pipe":
        os.mkfifo(edited / name)
    else:
        (edited / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is damaged .not a regular file"):
        ShardIndex.open(edited)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"format": ' + b"9" * 5000 + b"}"])
def test_an_index_that_is_nested_deeply_or_has_a_long_number_is_refused(
    folder: Path, tmp_path: Path, content: bytes
) -> None:
    edited = Path(shutil.copytree(folder, tmp_path / "shards"))
    (edited / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index.json is damaged"):
        ShardIndex.open(edited)


@pytest.mark.parametrize("shape", ["(1000000000000, 2, 3)", "(-9, 2, 3)", "(" * 200, "(9, 2, 3", "9 ** 9", "\n\t x"])
def test_a_header_of_offsets_that_lies_is_refused(folder: Path, tmp_path: Path, shape: str) -> None:
    edited = Path(shutil.copytree(folder, tmp_path / "shards"))
    header = ("{'descr': '<i8', 'fortran_order': False, 'shape': " + shape + "}").encode().ljust(374) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(9 * 2 * 3 * 8)
    (edited / "offsets.npy").write_bytes(content)
    _sealed(edited, "offsets.npy")
    with pytest.raises(UserError, match="offsets.npy (is damaged|holds)"):
        ShardIndex.open(edited)
