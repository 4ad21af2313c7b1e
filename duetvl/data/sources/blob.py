"""Bytes that lie inside a larger file, read when they are needed."""

from __future__ import annotations

import os
from dataclasses import dataclass

from duetvl.core.errors import DataError


@dataclass(frozen=True)
class Blob:
    """A member of a tar shard: `size` bytes at `offset` of the file `path`. `name` is what it is called there."""

    path: str
    offset: int
    size: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def read(self) -> bytes:
        """The bytes. Raises DataError where the file is missing, or ends before them."""
        try:
            with open(self.path, "rb") as file:
                found = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from None
        if len(found) < self.size:
            raise DataError("lies beyond the end of the file, which is cut off")
        return found
