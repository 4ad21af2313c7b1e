"""Benchmarks in VLMEvalKit's TSV files: a question a row, its picture in the row or in another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from duetvl.core.errors import DataError, shown
from duetvl.data.sources.catalog import open_source
from duetvl.data.sources.records import Record
from duetvl.data.sources.tables import TsvFile
from duetvl.evaluation.media import find_medium
from duetvl.evaluation.profiles import Medium
from duetvl.evaluation.rows import MISSING_IN_PANDAS, Row, cluster_of, decoded, listed_texts, require_unique

_LONGEST_REFERENCE: Final = 64  # characters; a longer cell is a picture


class TsvRows:
    """The rows of a file, looked through once; pictures are read again when they are asked for.

    `image` is the column of pictures in base64, of several as a list; one of at most 64 characters is the index of the
    row that has the picture. Where it is empty, or not there, `image_path` is read. None: rows have no pictures.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], *, image: str | None = "image", index: str | None = "index"
    ) -> None:
        """`columns` must be there. Rows without an `index` are numbered from 1. Raises DataError."""
        self.path, self._image, self._index = path, image, index
        self._file = _open_tsv(path)
        self._places: list[tuple[int, int]] = []
        self._rows: list[Row] = []
        references: dict[int, str] = {}
        for number, (place, record) in enumerate(self._file.records()):
            if not number:
                self.columns = tuple(record.values)
                self._check_columns(columns)
            picture = record.values.pop(image, "") if image else ""
            if 0 < len(picture) <= _LONGEST_REFERENCE and picture not in MISSING_IN_PANDAS:
                references[number] = picture
            self._places.append((place, record.number))
            self._rows.append(self._row(record, picture, number))
        if not self._rows:
            raise DataError(f"{path}: no records")
        self._numbers = require_unique((row.id, row.where) for row in self._rows)
        self._holders = {number: self._holder(number, references) for number in references}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        """A row; where its picture is in another one, both have the same cluster."""
        row, holder = self._rows[number], self._holders.get(number)
        return row if holder is None else replace(row, cluster=self._rows[holder].cluster)

    def pictures(self, number: int) -> tuple[Medium, ...]:
        """See `Rows`."""
        if self._image is None:
            return ()
        record = self._file.read(*self._places[self._holders.get(number, number)])
        cell = record.values.get(self._image, "")
        if cell not in MISSING_IN_PANDAS:
            entries = listed_texts(cell)
            return tuple(decoded(entry, record.where) for entry in ((cell,) if entries is None else entries))
        paths = self._rows[number].texts("image_path")
        if not any(paths):
            raise DataError(f"{record.where}: has no picture")
        around = (self.path.parent, self.path.parent / "images", Path())
        return tuple(find_medium(path, around) for path in paths)

    def _check_columns(self, columns: Sequence[str]) -> None:
        own = f"its columns are {', '.join(self.columns)}"
        for name in (self._index, *columns):
            if name is not None and name not in self.columns:
                raise DataError(f"{self.path}: has no column {name!r}; {own}")
        if self._image is not None and not {self._image, "image_path"} & {*self.columns}:
            raise DataError(f"{self.path}: has neither a column {self._image!r} nor 'image_path'; {own}")

    def _row(self, record: Record, picture: str, number: int) -> Row:
        cells = {name: value for name, value in record.values.items() if value != ""}
        row_id = str(number + 1) if self._index is None else cells.get(self._index, "")
        return Row(row_id, record.where, cells, cluster_of(picture or cells.get("image_path", "") or record.where))

    def _holder(self, number: int, references: Mapping[int, str]) -> int:
        """The row that has the picture of this one. Raises DataError where there is none."""
        passed = {number}
        where = self._rows[number].where
        while number in references:
            target = references[number]
            if target not in self._numbers:
                raise DataError(f"{where}: its picture is said to be in the row {shown(target)}, which is not there")
            number = self._numbers[target]
            if number in passed:
                raise DataError(f"{where}: its picture is said to be in the row {shown(target)}, which leads back here")
            passed.add(number)
        return number


def _open_tsv(path: Path) -> TsvFile:
    (file,) = open_source(path)
    if not isinstance(file, TsvFile):
        raise DataError(f"{path}: expected VLMEvalKit's table, with the suffix .tsv")
    return file
