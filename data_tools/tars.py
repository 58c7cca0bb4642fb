"""Tar files in place: where each member lies, and whether the archive is whole."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmoe_dist.data.format import TAR_BLOCK, is_hidden
from diffmoe_dist.errors import UserError

_CHUNK = 1 << 20


class TarDamageError(UserError):
    """A tar that is cut or damaged; names the file and the place."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


class TarFile:
    """An uncompressed tar on the disk. Can be pickled and copied; a copy opens the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def members(self, start: int = 0, size: int | None = None) -> Iterator[Member]:
        """All regular files, in order; with `start` and `size` those of a tar that is a member of this one.

        Hidden ones are left out: macOS puts a `._NAME` beside each NAME.

        The tar module takes a damaged header for the end of the archive. Here the end must look like one, with
        nothing but zeros after it.
        Raises TarDamageError.
        """
        end = self.path.stat().st_size if size is None else start + size
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # it keeps all it has seen
                        if member.offset_data + member.size > end:
                            raise self._damage(member.offset, "a member ends after the archive")
                        if member.issparse():
                            raise self._damage(member.offset, "a sparse file; write it without --sparse")
                        if member.isreg() and not is_hidden(member.name):
                            yield Member(member.name, member.offset_data, member.size)
                    self._check_end(file, tar.offset, end)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from error
        except (
            tarfile.TarError,
            ArithmeticError,
            LookupError,
            ValueError,
        ) as error:  # the tar module's, on odd headers
            raise self._damage(start, str(error)) from error

    def read(self, offset: int, size: int) -> bytes:
        """Raises TarDamageError where the file ends before."""
        if self._file is None:
            self._file = io.FileIO(self.path)
        payload = os.pread(self._file.fileno(), size, offset)
        if len(payload) != size:
            raise self._damage(offset, f"{len(payload)} of {size} bytes are there")
        return payload

    def _check_end(self, file: Any, offset: int, end: int) -> None:
        if end - offset < TAR_BLOCK:
            raise self._damage(offset, "cut, the mark of the end is missing")
        file.seek(offset)
        while offset < end:
            chunk = file.read(min(_CHUNK, end - offset))
            if not chunk or chunk.strip(b"\0"):
                raise self._damage(offset, "a damaged header, or data after the end")
            offset += len(chunk)

    def _damage(self, offset: int, problem: str) -> TarDamageError:
        return TarDamageError(f"{self.path}: damaged near byte {offset} ({problem}); restore it")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}
