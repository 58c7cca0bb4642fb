"""The samples of a tar that is read as a stream, from wherever webdataset can open it; damage is an error.

The tar module takes a damaged header for the end of the archive: half of a shard would be gone without a word.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, cast

from webdataset.gopen import Pipe, gopen

from diffmoe_dist.data.grouping import group_members
from diffmoe_dist.data.index import CorruptShardError

_CHUNK = 1 << 20
_END = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # a block of zeros
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ArithmeticError, LookupError, ValueError)


class StreamDamageError(CorruptShardError):
    """The rest of a shard is lost."""


def stream_samples(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, payloads by field) of each sample, grouped as for an index.

    Raises:
        StreamDamageError: after the samples before the damage, the last of which might not be whole and is left out;
            also where a server breaks off, or a command fails after it has written some.
        CorruptShardError: the shard cannot be read at all.
    """
    last, source = "none", _Source()
    try:
        for key, sample in group_members(_members(url, source)):
            yield key, sample
            last = key
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and not source.num_bytes:
            raise CorruptShardError(f"{url}: cannot be read ({error})") from error
        raise StreamDamageError(f"{url}: damaged after sample {last} ({error}); restore it") from error


class _Source:
    """Where a tar's bytes come from, and how many came."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.file: Any = None

    def read(self, size: int) -> bytes:
        chunk: bytes = self.file.read(size)
        self.num_bytes += len(chunk)
        return chunk


def _members(url: str, source: _Source) -> Iterator[tuple[str, bytes]]:
    with gopen(url) as stream:
        # Of a command's output its pipe itself: webdataset's own drops what it has read once the command has failed,
        # whose exit code is looked at when the stream is closed.
        source.file = stream.stream if isinstance(stream, Pipe) else stream
        with tarfile.open(fileobj=cast(Any, source), mode="r|*", tarinfo=_CheckedHeader) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                if member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
            while chunk := tar.fileobj.read(_CHUNK):
                if chunk.strip(b"\0"):
                    raise tarfile.ReadError("data after the end")


class _CheckedHeader(tarfile.TarInfo):
    """A header, or the mark of the archive's end. Anything else is an error, also after the first member."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except _END:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
