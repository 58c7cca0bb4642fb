"""The samples of a tar that is read as a stream, from wherever webdataset can open it; damage is an error.

The tar module takes a damaged header for the end of the archive: half of a shard would be gone without a word.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from webdataset.gopen import gopen

from diffmoe_dist.data.format import split_name
from diffmoe_dist.data.index import CorruptShardError

_CHUNK = 1 << 20
_END = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # a block of zeros


class TarDamageError(CorruptShardError):
    """The rest of a shard is lost."""


def stream_samples(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, payloads by field) of each sample: neighbours of one key, as in WebDataset.

    Raises:
        TarDamageError: after the samples before the damage, the last of which might not be whole and is left out.
        CorruptShardError: the shard cannot be read at all.
    """
    key, sample = "", dict[str, bytes]()
    try:
        for name, payload in _members(url):
            next_key, field = split_name(name)
            if not next_key:
                continue
            if sample and (next_key != key or field in sample):
                yield key, sample
                sample = {}
            key = next_key
            sample[field] = payload
    except OSError as error:
        raise CorruptShardError(f"{url}: cannot be read ({error})") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ArithmeticError, LookupError, ValueError) as error:
        raise TarDamageError(f"{url}: damaged after sample {key or 'none'} ({error}); restore it") from error
    if sample:
        yield key, sample


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedHeader) as tar:
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
