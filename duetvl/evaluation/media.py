"""Where the files of a benchmark lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from duetvl.core.errors import DataError, shown
from duetvl.data.sources.spelling import on_disk


def find_medium(name: str, directories: Sequence[Path]) -> Path:
    """The file of a picture or video that data call by a path of somebody else's machine.

    Looked for under each directory by the whole path, then by ever less of its beginning: of
    `data/textvqa/train_images/a.jpg` also `train_images/a.jpg` and `a.jpg`. Raises DataError where it is nowhere.
    """
    parts = Path(name.replace("\\", "/")).parts
    for start in range(len(parts)):
        for directory in directories:
            place = on_disk(directory / Path(*parts[start:]))
            if place is not None and place.is_file():
                return place
    tried = ", ".join(str(directory.resolve()) for directory in dict.fromkeys(directories))
    raise DataError(f"{shown(name)}: no such file under {tried}")


def data_file(path: Path, name: str) -> Path:
    """The file that a user means who names it, or the directory that it lies in. Raises DataError."""
    place = path / name if path.is_dir() else path
    if not place.is_file():
        hint = f"; expected {name}, or the directory that it lies in" if place.name != name else ""
        raise DataError(f"{place}: no such file{hint}")
    return place
