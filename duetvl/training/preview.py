"""`duetvl data preview`: samples of a recipe as the model sees them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import ConfigError, DataError
from duetvl.data.draft import Draft, Dropped, NotItsFault, Unread
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.preview import PLAIN, contact_sheet, text_view
from duetvl.data.sources.records import with_line
from duetvl.storage.files import write_bytes
from duetvl.training.feed import DataSets
from duetvl.training.recipe.sections import Recipe
from duetvl.training.sft import recipe_processor, record_encoder
from duetvl.training.train import read_recipe


def preview(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    count: int = 3,
    marks: tuple[str, str] = PLAIN,
    sheet: Path | None = None,
) -> Iterator[str]:
    """The first samples of training, each as a text of several lines; what is trained stands between `marks`.

    Their pictures and frames after processing are drawn into the PNG file `sheet`, where there are any. Records that
    the recipe leaves out are named, and keys of records that are not read. Raises DataError for a bad one, unless
    those are skipped, ConfigError where the sheet cannot be written.
    """
    if count < 1:
        raise ConfigError(f"{count} samples: expected at least 1")
    given = read_recipe(recipe, overrides)
    sets = DataSets(given.data)
    processor = recipe_processor(given)
    shown: list[Sample | Pair] = []
    unread = Unread()
    for found in _first(sets, SampleMaker(sets.files, record_encoder(given)), count, unread):
        if isinstance(found, DataError):
            fatal = given.data.on_bad_sample == "error" and not isinstance(found, Dropped)
            if fatal or isinstance(found, NotItsFault):
                raise found
            yield f"{'left out' if isinstance(found, Dropped) else 'bad'}: {found}"
        else:
            shown.append(found)
            yield text_view(found, processor, marks) + "\n"
    yield from (f"warning: {with_line(words)}" for words in unread.values())
    picture = contact_sheet(shown, processor) if sheet is not None else None
    if sheet is not None and picture is not None:
        picture.save(content := io.BytesIO(), format="png")
        try:
            write_bytes(sheet, content.getvalue())
        except OSError as error:
            raise ConfigError(f"{sheet}: cannot be written: {error.strerror or error}") from None
        yield f"pixels drawn: {sheet}"


def _first(sets: DataSets, maker: SampleMaker, count: int, unread: Unread) -> Iterator[Sample | Pair | DataError]:
    """The first `count` samples in the order of training, within one epoch, and what is wrong with those between.

    Keys that are not read are put into `unread`.
    """
    cursor, total = sets.cursor(), sets.train_count
    seen = 0
    while count and (total is None or seen < total) and cursor.epoch == 0:
        refs = cursor.take(1)
        if total is None and cursor.epoch:  # the stream had ended before it
            return
        (outcome,) = maker.drafts(refs)
        seen += 1
        if isinstance(outcome, Draft):
            unread.add(outcome)
        sample = outcome if isinstance(outcome, DataError) else maker.load(outcome)
        count -= not isinstance(sample, DataError)
        yield sample
