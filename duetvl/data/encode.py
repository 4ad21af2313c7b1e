"""The processor: conversations to samples, samples to batches, token ids to text; and what training makes of it.

There is one way from a conversation to a sample, and it has two halves (`duetvl.data.draft`): the draft has all tokens
and the sizes of all media, from headers; loading decodes the pixels at these sizes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Pair, PatchBytes, Sample
from duetvl.core.errors import DataError, one_line, shown
from duetvl.core.family import Family
from duetvl.data.conversation import Conversation, ImagePart, Preference, VideoPart
from duetvl.data.draft import Draft, MissingMedia
from duetvl.data.excess import SampleTooLong
from duetvl.data.formats.messages import read_messages
from duetvl.data.formats.reading import read_record
from duetvl.data.length import Segments, length
from duetvl.data.media.pixel_files import read_pixel_settings
from duetvl.data.media.pixels import PatchRows, PixelSettings
from duetvl.data.media.plan import MediaSettings, Medium, load, measure
from duetvl.data.sequences import SequenceWriter
from duetvl.data.sources.records import Record
from duetvl.data.sources.spelling import without_scheme
from duetvl.data.tokenizer import TextTokenizer, control_tokens, read_tokenizer

TooLong = Literal["error", "drop", "truncate", "shrink"]


@dataclass(frozen=True)
class EncodeSettings:
    """What is trained of a conversation, and what becomes of one whose sequences have more than `cutoff_len` tokens.

    `system` is the system prompt of those without one; None: the chat template's own.
    """

    train_on_prompt: bool = False
    mask_history: bool = False
    cutoff_len: int | None = None
    too_long: TooLong = "error"
    system: str | None = None


_PLAIN: Final = EncodeSettings()
_NO_NOTES: Final[tuple[str, ...]] = ()


class Processor:
    """Makes samples of conversations, and batches of samples, for one model."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        family: Family,
        image_settings: PixelSettings,
        video_settings: PixelSettings | None = None,
    ) -> None:
        """`video_settings` bound each frame; where none are given a frame is bound like a picture.

        Raises ConfigError when the tokenizer is not that of the model.
        """
        self.tokenizer = tokenizer
        self.family = family
        self.media = MediaSettings(image_settings, image_settings if video_settings is None else video_settings)
        self.control = control_tokens(tokenizer, family)

    @classmethod
    def from_directory(cls, directory: str | Path, family: Family) -> Processor:
        """Read the tokenizer and the pixel settings of a model directory.

        Raises CheckpointError for what is missing or damaged, ConfigError for what does not fit.
        """
        path = Path(directory)
        image, video = read_pixel_settings(path, family.geometry)
        return cls(read_tokenizer(path), family, image, video)

    def __call__(self, messages: Any, *, add_generation_prompt: bool = False, sample_id: str = "") -> Sample:
        """Encode one conversation, see `duetvl.data.formats.messages.read_messages`.

        Labels cover the assistant's turns. Raises DataError.
        """
        draft = self.draft(read_messages(messages), id=sample_id, add_generation_prompt=add_generation_prompt)
        return _single(self.load(draft))

    def encode_record(
        self, record: Mapping[str, Any], *, media_dir: str | Path | None = None, sample_id: str = ""
    ) -> Sample:
        """Encode one record of any layout, see `duetvl.data.formats.reading.read_record`. Raises DataError."""
        found = read_record(record, media_dirs=() if media_dir is None else (Path(media_dir),))
        return _single(self.load(self.draft(found, id=sample_id)))

    def draft(
        self,
        found: Conversation | Preference,
        settings: EncodeSettings = _PLAIN,
        *,
        id: str = "",
        where: str = "",
        add_generation_prompt: bool = False,
    ) -> Draft:
        """Tokens and sizes of a conversation or a pair of answers; no pixel is decoded.

        Raises Dropped where a rule leaves it out, DataError where it is bad.
        """
        conversations = _both(found) if isinstance(found, Preference) else (found,)
        parts = _media_parts(conversations[0])
        for part in parts.values():
            _check_there(part)
        media = {key: measure(part, self.media, self.family.geometry) for key, part in parts.items()}
        writer = SequenceWriter(self, settings, conversations, add_generation_prompt)
        sequences, notes = writer.sequences(media), _NO_NOTES
        if settings.cutoff_len is not None and max(map(length, sequences)) > settings.cutoff_len:
            sequences, notes = writer.fitted(sequences, media, settings.cutoff_len)
        return self._drafted(sequences, id=id, where=where, notes=notes, unread=_unread(conversations))

    def load(self, draft: Draft, *, as_bytes: bool = False) -> Sample | Pair:
        """The sample with its pixels, of exactly the grids of the draft. Raises DataError naming file and cause.

        The pixels are float32, or with `as_bytes` the bytes that packing makes them of, which are moved and kept
        with an eighth of the memory.
        """
        try:
            loaded = [load(medium, self.media, self.family.geometry) for medium in draft.media]
        except DataError as error:
            raise DataError(f"{draft.where}: {error}" if draft.where else str(error)) from None
        self._check(draft, loaded)
        images = len(draft.image_grid_thw)
        pixels, frames = _rows(loaded[:images], as_bytes), _rows(loaded[images:], as_bytes)
        given = _without_pixels(draft)
        if isinstance(given, Pair):
            return Pair(replace(given.chosen, pixel_values=pixels, pixel_values_videos=frames), given.rejected)
        return replace(given, pixel_values=pixels, pixel_values_videos=frames)

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end, see `Family.pack`. Raises DataError naming a wrong sample."""
        return self.family.pack(samples)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def image_settings(self) -> PixelSettings:
        """How pictures are resized."""
        return self.media.image

    @property
    def video_settings(self) -> PixelSettings:
        """How frames of videos are resized."""
        return self.media.video

    @property
    def beyond_vocabulary(self) -> int:
        """How many tokens the tokenizer has that the model has no row for; a text that makes one is an error."""
        return max(0, self.tokenizer.largest_id + 1 - self.family.vocabulary)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ends = (self.control.turn_end, self.control.end_of_text)
        return tuple(number for number in ends if number is not None)

    def _drafted(
        self, sequences: Sequence[Segments], *, id: str, where: str, notes: tuple[str, ...], unread: tuple[str, ...]
    ) -> Draft:
        media = [segment.medium for segment in sequences[0] if segment.medium is not None]
        images = [medium for medium in media if not medium.is_video]
        videos = [medium for medium in media if medium.is_video]
        arrays = [_arrays(segments) for segments in sequences]
        draft = Draft(
            id=id,
            where=where,
            input_ids=arrays[0][0],
            labels=arrays[0][1],
            image_grid_thw=self._grids(images),
            video_grid_thw=self._grids(videos),
            second_per_grid_ts=np.array([medium.seconds for medium in videos], np.float32) if videos else None,
            rejected=arrays[1] if len(arrays) > 1 else None,
            media=(*images, *videos),
            notes=notes,
            unread=unread,
        )
        self.family.check(_without_pixels(draft))
        return draft

    def _grids(self, media: Sequence[Medium]) -> np.ndarray:
        return np.array([medium.grid(self.family.geometry) for medium in media], np.int64).reshape(-1, 3)

    def _check(self, draft: Draft, loaded: Sequence[PatchRows]) -> None:
        """Features and tokens agree, for each medium and for each sequence: the promise that drafts are made for."""
        grids = [tuple(grid) for grid in (*draft.image_grid_thw.tolist(), *draft.video_grid_thw.tolist())]
        assert [rows.grid for rows in loaded] == grids, f"{draft.where}: {[rows.grid for rows in loaded]}, not {grids}"
        special, merged = self.family.special, self.family.geometry.merge**2
        for ids in (draft.input_ids, *([draft.rejected[0]] if draft.rejected else [])):
            for token, of in ((special.image, draft.image_grid_thw), (special.video, draft.video_grid_thw)):
                tokens, features = np.count_nonzero(ids == token), int(of.prod(axis=1).sum()) // merged
                assert tokens == features, f"{draft.where}: {tokens} tokens for {features} features"


def conversation_of(record: Record, *, answered: bool = True) -> Conversation | Preference:
    """What a record of a data set says, read as its source is meant; see `read_record`."""
    reading = record.reading
    return read_record(
        record.values,
        form=reading.format,
        columns=reading.columns,
        tags=reading.tags,
        media_dirs=record.media_dirs,
        boxes=reading.boxes,
        answered=answered,
    )


@dataclass(frozen=True)
class RecordEncoder:
    """From records to samples, as training does it; implements `duetvl.data.draft.Encoder`. Picklable."""

    processor: Processor
    settings: EncodeSettings = _PLAIN

    def draft(self, record: Record) -> Draft:
        """Everything but the pixels. Raises Dropped where a rule leaves it out, DataError where it is bad."""
        try:
            found = conversation_of(record)
            return self.processor.draft(found, self.settings, id=record.id, where=record.where)
        except MissingMedia as error:
            dirs = " and in ".join(str(directory) for directory in record.media_dirs)
            raise MissingMedia(f"{record.where}: {error}; relative paths are looked up in {dirs}") from None
        except SampleTooLong as error:
            raise error.at(record.where) from None
        except DataError as error:
            raise type(error)(f"{record.where}: {error}") from None

    def load(self, draft: Draft) -> Sample | Pair:
        """The sample with its pixels. Raises DataError naming file, line and cause."""
        return self.processor.load(draft, as_bytes=True)

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end."""
        return self.processor.pack(samples)


def _media_parts(conversation: Conversation) -> dict[int, ImagePart | VideoPart]:
    """Pictures and videos in order, by their identity."""
    parts = (part for turn in conversation.turns for part in turn.parts)
    return {id(part): part for part in parts if isinstance(part, ImagePart | VideoPart)}


def _unread(conversations: Sequence[Conversation]) -> tuple[str, ...]:
    """What the record and its messages held that is not read, in words."""
    record = {f"the record's key {shown(key)}" for item in conversations for key in item.unread}
    messages = {f"a message's key {shown(key)}" for item in conversations for turn in item.turns for key in turn.unread}
    return tuple(sorted(record | messages))


def _check_there(part: ImagePart | VideoPart) -> None:
    """Raise MissingMedia where a medium is a path at which there is nothing."""
    sources = part.source if isinstance(part.source, list) else [part.source]
    for source in sources:
        if not isinstance(source, str | Path) or str(source).startswith(("data:", "http:", "https:")):
            continue
        path = without_scheme(str(source))
        try:
            os.stat(path)
        except PermissionError:
            continue  # said where it is opened
        except (OSError, ValueError):
            raise MissingMedia(f"{one_line(path, 120)}: no such file") from None


def _both(pair: Preference) -> tuple[Conversation, Conversation]:
    """The two conversations of a pair. Raises DataError where an answer holds a medium: they share the prompt's."""
    for name, turn in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if any(isinstance(part, ImagePart | VideoPart) for part in turn.parts):
            raise DataError(f"the {name} answer contains a picture or video; media belong in the prompt")
    first, second = (replace(pair.prompt, turns=(*pair.prompt.turns, turn)) for turn in (pair.chosen, pair.rejected))
    return first, second


def _arrays(segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels (T,) int64."""
    ids = np.array([number for segment in segments for number in segment.ids], np.int64)
    trained = np.repeat([segment.trained for segment in segments], [len(segment) for segment in segments])
    return ids, np.where(trained, ids, IGNORE)


def _without_pixels(draft: Draft) -> Sample | Pair:
    """The sample, or the pair, of a draft before its pixels are there."""
    sample = Sample(
        input_ids=draft.input_ids,
        labels=draft.labels,
        image_grid_thw=draft.image_grid_thw,
        video_grid_thw=draft.video_grid_thw,
        second_per_grid_ts=draft.second_per_grid_ts,
        id=draft.id,
    )
    if draft.rejected is None:
        return sample
    ids, labels = draft.rejected
    return Pair(sample, replace(sample, input_ids=ids, labels=labels))


def _rows(media: Sequence[PatchRows], as_bytes: bool) -> np.ndarray | PatchBytes | None:
    """Patch rows of all media of one kind; a single one is not copied."""
    if not media:
        return None
    rows = PatchBytes.joined([medium.rows for medium in media])
    assert rows is not None, "media of one kind have the same settings"
    return rows if as_bytes else np.asarray(rows)


def _single(sample: Sample | Pair) -> Sample:
    if isinstance(sample, Pair):
        raise DataError("the record is a pair of answers; one answer is expected here")
    return sample
