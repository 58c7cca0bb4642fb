"""Whatever lies in a tar: what is read of it is right, what is not read is listed, or the tar is refused."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.index_tars import index_tars
from data_tools.pack import PackSettings, pack
from data_tools.verify import verify
from data_tools.webdataset_tars import WebDatasetSource
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.data.streamed_tar import stream_samples
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture
from tests.data_tools.tar_files import write_tar

FUZZ = settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
JPEG, PNG = encoded(picture(8, 8)), encoded(picture(8, 8), "PNG")
KEYS = st.sampled_from(
    ["a", "b", "c", "d/a", "./a", "._a", ".a", "__MACOSX/a", "__meta__", "é", "n\udcff", "k" * 120, ""]
)
FIELDS = st.sampled_from(["jpg", "png", "JPG", "cls", "txt", "json", "seg.png", "tar", "npy", "", "\udcfe"])
CONTENTS = st.sampled_from(
    [
        JPEG, PNG, JPEG[:-60], b"", b"0", b"1", b" 2\n", b"-1", b"3.0", b"9" * 20, b"9" * 5000, b"a cat",
        b"\xff\xfe", "ein Löwe".encode(), "\ufeffcat".encode(), b"{}", b'{"caption": "x"}', b"[" * 50_000, b"NaN",
        b"9" * 4301, b"\0",
    ]
)  # fmt: skip
KINDS = st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


@st.composite
def _members(draw: st.DrawFn) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Samples as they should be, and members as they come."""
    good = [(f"{key}.{field}", {"jpg": JPEG, "cls": b"1"}[field]) for key in "xyz" for field in ("jpg", "cls")]
    odd = draw(st.lists(st.tuples(st.builds("{}.{}".format, KEYS, FIELDS), CONTENTS, KINDS), max_size=8))
    members: list[tuple[Any, ...]] = [(*member, tarfile.REGTYPE) for member in good]
    at = draw(st.integers(0, len(members)))
    found = []
    for name, payload, kind in [*members[:at], *odd, *members[at:]]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "x.jpg"
        found.append((info, payload if kind == tarfile.REGTYPE else b""))
    return found


def _check_samples(folder: Path, payloads: set[bytes]) -> None:
    """All is right that is read, and what is not read is listed."""
    index = ShardIndex.open(folder)
    assert verify(index, full=True).problems == []
    for sample in range(index.num_samples):
        fields = index.read(sample)
        assert sum(field in index.image_fields for field in fields) == 1
        assert all(content in payloads or field == "cls" for field, content in fields.items())
        json.loads(fields.get("json", b"{}"))
        fields.get("txt", b"").decode()
    for line in (folder / "quarantine.jsonl").read_text().splitlines() if index.meta.quarantine else []:
        assert json.loads(line)["reason"]


@FUZZ
@given(members=_members())
def test_any_members_are_read_rightly_or_listed_or_refused(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    payloads = {payload for _, payload in members}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tar(Path(scratch) / "in" / "t.tar", members).parent
        try:
            pack(WebDatasetSource(folder), Path(scratch) / "out", PackSettings(samples_per_shard=3))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            _check_samples(Path(scratch) / "out", payloads)
        try:
            index_tars(folder)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            _check_samples(folder, payloads)


@FUZZ
@given(
    members=_members(),
    place=st.integers(0, 1 << 15),
    removed=st.integers(0, 2000),
    added=st.one_of(
        st.binary(max_size=30), st.sampled_from([bytes(512), bytes(1024), b"9" * 12, b"-1", b"\x80" + b"\xff" * 11])
    ),
)
def test_an_edited_tar_is_read_rightly_or_refused(
    members: list[tuple[tarfile.TarInfo, bytes]], place: int, removed: int, added: bytes
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = write_tar(Path(scratch) / "in" / "t.tar", members)
        content = path.read_bytes()
        at = place % len(content)
        path.write_bytes(content[:at] + added + content[at + (len(added) if removed % 2 else removed) :])
        try:
            index_tars(path.parent)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert verify(ShardIndex.open(path.parent), full=True).problems == []
        try:
            assert all(key and sample for key, sample in stream_samples(str(path)))
        except CorruptShardError as error:
            assert str(path) in str(error)
