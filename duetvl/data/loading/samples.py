"""From places in files to drafts and samples, with what was wrong as a value: what runs in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Encoder, NotItsFault, Outcome, OutOfMemory
from duetvl.data.sources.records import RecordFile, Ref, describe_os_error

Made = TypeVar("Made")


class SampleMaker:
    """Reads records and encodes them. Picklable. What is wrong with a record is returned, never raised."""

    def __init__(self, files: Sequence[RecordFile], encoder: Encoder):
        self.files, self.encoder = list(files), encoder

    def drafts(self, refs: Sequence[Ref]) -> list[Outcome]:
        """Read and draft records."""
        return [_caught(lambda ref=ref: self._draft(ref), self.where(ref)) for ref in refs]  # type: ignore[misc]

    def load(self, draft: Draft) -> Sample | Pair | DataError:
        """Decode a draft's media."""
        return _caught(lambda: self.encoder.load(draft), draft.where)

    def where(self, ref: Ref) -> str:
        """File and place, for messages."""
        file = self.files[ref.file]
        return f"{file.path}:{ref.number}" if ref.number else f"{file.path}: byte {ref.at}"

    def _draft(self, ref: Ref) -> Draft:
        file = self.files[ref.file]
        try:
            return self.encoder.draft(file.read(ref.at, ref.number))
        except OSError as error:
            raise NotItsFault(describe_os_error(file.path, error)) from None


def _caught(make: Callable[[], Made], where: str) -> Made | DataError:
    """What `make` gives, or what it raised. Whatever a record does to an encoder, it is the record that is named."""
    try:
        return make()
    except DataError as error:
        return error
    except MemoryError:
        return OutOfMemory(f"{where}: memory ran out while it was made")
    except Exception as error:
        return DataError(f"{where}: {type(error).__name__}: {error}")
