"""The reference's log-probabilities of answers, computed once and kept in a directory.

For each reference there is one file, `REFERENCE.logps`: a head of 28 bytes, then 28 bytes for each pair: its digest,
the log-probability of its chosen and of its rejected answer as float32, and the CRC-32 of these. Entries are only
appended; a kill leaves at most one that is cut off, which is found and written again. REFERENCE names the weights by
their content and the dtype they are held in, the digest what the model sees of a pair, so nothing in the file is ever
out of date. A file `REFERENCE-DATA.complete` beside it says that a pass over this data has found or written all pairs.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.batch import Batch
from duetvl.core.errors import CheckpointError, DataError
from duetvl.core.ranks import Ranks
from duetvl.data.pairs import DIGEST_BYTES
from duetvl.models.model_directory import ModelDirectory
from duetvl.storage.files import write_text

_ENTRY = np.dtype([("digest", "u1", (DIGEST_BYTES,)), ("logps", "<f4", (2,)), ("check", "<u4")])
_HEAD = b"duetvl answers' logps v1\n".ljust(_ENTRY.itemsize, b"\0")

Add = Callable[[Sequence[bytes], np.ndarray], None]


def reference_name(model: ModelDirectory, dtype: str, ranks: Ranks) -> str:
    """32 letters that name the weights of a model, held in `dtype`, by their content.

    Reads all of them once, each rank a share. How they are divided into files does not matter.
    """
    stored, sums = model.weights, {}
    for name in sorted(stored.names)[ranks.index :: ranks.count]:
        spec, bits = stored.spec(name), np.ascontiguousarray(stored.view(name)).reshape(-1)
        sums[name] = [spec.dtype, list(spec.shape), zlib.crc32(bits.view(np.uint8).data)]
        stored.release(name)
    everything = {name: found for share in ranks.each(sums) for name, found in share.items()}
    return short_hash([model.config.to_dict(), dtype, everything])


def short_hash(values: Any) -> str:
    """32 hexadecimal digits of a JSON value."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


class ReferenceCache:
    """The log-probabilities of one reference, by pair. One process of a run opens and writes the file; others have a
    copy of this, and learn what it adds."""

    def __init__(self, directory: str | Path, reference: str):
        """Read what there is. Raises CheckpointError where the directory or the file cannot be used."""
        self.directory, self.reference = Path(directory), reference
        self.path = self.directory / f"{reference}.logps"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._known = _index(_sound_entries(self.path))
        except OSError as error:
            raise CheckpointError(f"dpo.cache {self.directory}: cannot be used: {error.strerror or error}") from None

    def __len__(self) -> int:
        """Pairs that are known."""
        return len(self._known)

    def lacks(self, digests: Sequence[bytes]) -> bool:
        """Whether any of these pairs is not known."""
        return any(digest not in self._known for digest in digests)

    def sums(self, batch: Batch) -> np.ndarray:
        """Log-probabilities (S,) float32 of the batch's answers. Raises DataError naming a pair that is not known."""
        for digest, name in zip(batch.digests, batch.sample_ids, strict=True):
            if digest not in self._known:
                self._forget_passes()
                raise DataError(
                    f"sample {name}: its log-probabilities are not in {self.path}, so the data or its pictures have "
                    f"changed since they were computed; start again to compute what is missing"
                )
        return np.concatenate([self._known[digest] for digest in batch.digests])

    @contextmanager
    def filling(self) -> Iterator[Add]:
        """A function that adds pairs: their digests, and the sums (2 * pairs,) of their answers.

        What a call adds is on disk when it returns; pairs that are known stay as they are. BlockingIOError where
        another process fills the same file; what others have written before is known from here on.
        """
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sound = _sound_entries(self.path)
            self._known = _index(sound)
            has_head = file.seek(0, os.SEEK_END) >= len(_HEAD)
            file.truncate(_ENTRY.itemsize * (1 + len(sound)) if has_head else 0)
            if not has_head:
                file.write(_HEAD)

            def add(digests: Sequence[bytes], sums: np.ndarray) -> None:
                file.write(self.learn(digests, sums))
                file.flush()
                os.fsync(file.fileno())

            yield add

    def learn(self, digests: Sequence[bytes], sums: np.ndarray) -> bytes:
        """Know these pairs from here on; the entries of those that are new, for the file."""
        new = {digest: i for i, digest in enumerate(digests) if digest not in self._known}
        entries = _entries(list(new), sums.reshape(-1, 2)[list(new.values())])
        self._known |= _index(entries)
        return entries.tobytes()

    def learn_from(self, other: ReferenceCache) -> None:
        """Know all that another copy knows."""
        self._known |= other._known

    def is_complete(self, data: str) -> bool:
        """Whether a pass over the data of this name has come to its end."""
        return self._mark(data).is_file()

    def set_complete(self, data: str) -> None:
        """Note that one has."""
        write_text(self._mark(data), "")

    def _forget_passes(self) -> None:
        for mark in self.directory.glob(f"{self.reference}-*.complete"):
            mark.unlink(missing_ok=True)

    def _mark(self, data: str) -> Path:
        return self.directory / f"{self.reference}-{data}.complete"


def _sound_entries(path: Path) -> np.ndarray:
    """The entries of a file up to the first that is cut off or damaged."""
    raw = path.read_bytes() if path.is_file() else b""
    if not raw.startswith(_HEAD[: len(raw)]):
        raise CheckpointError(f"{path}: is not a file of log-probabilities; remove it, or give another dpo.cache")
    count = max(0, len(raw) // _ENTRY.itemsize - 1)
    entries = np.frombuffer(raw, _ENTRY, count, len(_HEAD)) if count else np.zeros(0, _ENTRY)
    wrong = np.flatnonzero(_checks(entries) != entries["check"])
    return entries[: wrong[0]] if len(wrong) else entries


def _entries(digests: Sequence[bytes], sums: np.ndarray) -> np.ndarray:
    entries = np.zeros(len(digests), _ENTRY)
    entries["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    entries["logps"] = sums
    entries["check"] = _checks(entries)
    return entries


def _checks(entries: np.ndarray) -> np.ndarray:
    size = _ENTRY.itemsize - 4
    return np.array([zlib.crc32(entry.tobytes()[:size]) for entry in entries], np.uint32)


def _index(entries: np.ndarray) -> dict[bytes, np.ndarray]:
    return {entry["digest"].tobytes(): entry["logps"] for entry in entries}
