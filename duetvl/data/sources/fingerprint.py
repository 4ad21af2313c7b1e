"""Whether all ranks of a run read the same data files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from duetvl.core.errors import DataError


class FileFacts(NamedTuple):
    """What tells a data file from another one in its place: `records` is None where they have not been counted."""

    path: str
    bytes: int
    records: int | None

    def __str__(self) -> str:
        counted = "" if self.records is None else f" and {self.records} records"
        return f"{self.path} with {self.bytes} bytes{counted}"


Fingerprint = tuple[FileFacts, ...]


def check_same_data(found: Sequence[Fingerprint], hosts: Sequence[str]) -> None:
    """Raise DataError, with the same words for all, unless every rank has found what rank 0 has.

    `found` holds the fingerprint of each rank (`DataSets.fingerprint`) and `hosts` where it runs, in their order.
    """
    for rank, other in enumerate(found):
        for ours, theirs in _different(found[0], other):
            raise DataError(
                f"rank {rank} ({hosts[rank]}) has found {theirs or 'no further data file'}, where rank 0 ({hosts[0]}) "
                f"has {ours or 'no further data file'}; give every node the same data files"
            )


def _different(first: Fingerprint, other: Fingerprint) -> Iterator[tuple[FileFacts | None, FileFacts | None]]:
    """The files that differ, in their order."""
    for place in range(max(len(first), len(other))):
        ours, theirs = (files[place] if place < len(files) else None for files in (first, other))
        if ours != theirs:
            yield ours, theirs
