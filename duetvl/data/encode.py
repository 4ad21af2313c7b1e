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
from duetvl.data.draft import Draft, Dropped, MissingMedia
from duetvl.data.formats.grounding import write_boxes
from duetvl.data.formats.messages import read_messages
from duetvl.data.formats.reading import read_record
from duetvl.data.length import Segment, Segments, length, truncate, truncate_pair
from duetvl.data.media.pixel_files import read_pixel_settings
from duetvl.data.media.pixels import PatchRows, PixelSettings
from duetvl.data.media.plan import MediaSettings, Medium, load, measure, shrunk
from duetvl.data.sources.records import Record
from duetvl.data.template import TURN_START, Piece, render
from duetvl.data.tokenizer import TextTokenizer, control_tokens, read_tokenizer

TooLong = Literal["error", "drop", "truncate", "shrink"]
_Media = dict[int, Medium]  # by the identity of the part


@dataclass(frozen=True)
class EncodeSettings:
    """What is trained of a conversation, and what becomes of one whose sequences have more than `cutoff_len` tokens."""

    train_on_prompt: bool = False
    mask_history: bool = False
    cutoff_len: int | None = None
    too_long: TooLong = "error"


_USUAL_LETTERS: Final = 16  # for a token: fewer are quickly tokenised
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
        writer = _Writer(self, settings, conversations, add_generation_prompt)
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
        """How pictures are brought to size."""
        return self.media.image

    @property
    def video_settings(self) -> PixelSettings:
        """How frames of videos are brought to size."""
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


@dataclass(frozen=True)
class RecordEncoder:
    """From records to samples, as training does it; implements `duetvl.data.draft.Encoder`. Picklable."""

    processor: Processor
    settings: EncodeSettings = _PLAIN

    def draft(self, record: Record) -> Draft:
        """Everything but the pixels. Raises Dropped where a rule leaves it out, DataError where it is bad."""
        reading = record.reading
        try:
            found = read_record(
                record.values,
                form=reading.format,
                columns=reading.columns,
                tags=reading.tags,
                media_dirs=record.media_dirs,
                boxes=reading.boxes,
            )
            return self.processor.draft(found, self.settings, id=record.id, where=record.where)
        except MissingMedia as error:
            dirs = " and in ".join(str(directory) for directory in record.media_dirs)
            raise MissingMedia(f"{record.where}: {error}; relative paths are looked for in {dirs}") from None
        except DataError as error:
            raise type(error)(f"{record.where}: {error}") from None

    def load(self, draft: Draft) -> Sample | Pair:
        """The sample with its pixels. Raises DataError naming file, line and cause."""
        return self.processor.load(draft, as_bytes=True)

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end."""
        return self.processor.pack(samples)


class _Writer:
    """Writes the sequences of a conversation, or of a pair, with its media at given sizes."""

    def __init__(
        self, processor: Processor, settings: EncodeSettings, conversations: Sequence[Conversation], prompt: bool
    ) -> None:
        self.processor, self.settings, self.conversations = processor, settings, conversations
        self.family = processor.family
        # Of a pair only the two answers are compared, not what was said before.
        self.mask_history = settings.mask_history or len(conversations) > 1
        self.add_generation_prompt = prompt

    def sequences(self, media: _Media) -> list[Segments]:
        """The segments of every conversation."""
        sizes = [(medium.original, medium.size) for medium in media.values() if not medium.is_video]
        written = [write_boxes(item, sizes, self.family.grounding) for item in self.conversations]
        return [self._segments(item, media) for item in written]

    def fitted(self, sequences: list[Segments], media: _Media, limit: int) -> tuple[list[Segments], tuple[str, ...]]:
        """Sequences of at most `limit` tokens, and how that was done. Raises Dropped or DataError."""
        policy, longest = self.settings.too_long, max(map(length, sequences))
        if policy in ("error", "drop"):
            raise self._too_long(f"has {longest} tokens", limit)
        if policy == "shrink":
            return self._shrunk(sequences, media, limit), ("shrunk",)
        if len(sequences) > 1:
            return list(truncate_pair(sequences[0], sequences[1], limit)), ("truncated",)
        return [truncate(sequences[0], limit, keep_last=self.settings.mask_history)], ("truncated",)

    def _too_long(self, found: str, limit: int) -> DataError:
        if self.settings.too_long != "error":
            return Dropped(f"{found}, the longest may have {limit}")
        return DataError(
            f"{found}, the longest may have {limit}; raise data.cutoff_len (such a sample is a micro-batch of its own "
            f"where it exceeds data.pack_tokens), or say with data.too_long what becomes of it"
        )

    def _bounded(self, pieces: list[Piece], limit: int) -> list[Piece]:
        """The pieces, where their texts may have no more than `limit` tokens: so long ones are not tokenised in vain,
        which takes a minute and gigabytes for some ten million characters. Raises Dropped or DataError."""
        letters = sum(len(piece.text) for piece in pieces)
        if letters <= limit * _USUAL_LETTERS or letters <= limit * self.processor.tokenizer.longest:
            return pieces
        if self.settings.too_long != "truncate":
            raise self._too_long(f"has a text of {letters} characters, which has more tokens", limit)
        most = limit * self.processor.tokenizer.longest
        return [piece._replace(text=piece.text[:most]) for piece in pieces]

    def _shrunk(self, sequences: list[Segments], media: _Media, limit: int) -> list[Segments]:
        """The sequences with all media at one share of their area, the largest that fits."""
        room, longest = limit, max(map(length, sequences))
        pictures = self._tokens(media)
        for _ in range(8):  # boxes in pixels get shorter texts, and rarely longer ones: then once more with less room
            text = longest - pictures
            smaller = self._scaled(media, room - text)
            if smaller is None:
                break
            sequences = self.sequences(smaller)
            longest, pictures = max(map(length, sequences)), self._tokens(smaller)
            if longest <= limit:
                return sequences
            room -= longest - limit
        raise Dropped(
            f"has {longest} tokens, {longest - pictures} of them text; with its pictures and videos at their smallest "
            f"it exceeds {limit}"
        )

    def _scaled(self, media: _Media, tokens: int) -> _Media | None:
        """The media at the largest common share of their areas that makes at most so many tokens."""

        def at(scale: float) -> _Media:
            settings, geometry = self.processor.media, self.family.geometry
            return {key: shrunk(medium, scale, settings, geometry) for key, medium in media.items()}

        low, high = 0.0, 1.0
        best = at(low)
        if self._tokens(best) > tokens:
            return None
        for _ in range(20):
            middle = (low + high) / 2
            made = at(middle)
            low, high, best = (middle, high, made) if self._tokens(made) <= tokens else (low, middle, best)
        return best

    def _tokens(self, media: _Media) -> int:
        geometry = self.family.geometry
        return sum(self.family.placeholder_count(medium.grid(geometry)) for medium in media.values())

    def _segments(self, conversation: Conversation, media: _Media) -> Segments:
        """The conversation's pieces as tokens, each with its place in its turn."""
        pieces = render(
            conversation,
            train_on_prompt=self.settings.train_on_prompt and len(self.conversations) == 1,
            mask_history=self.mask_history,
            add_generation_prompt=self.add_generation_prompt,
        )
        made: Segments = []
        role, place = "", "outside"
        listed, limit = list(pieces), self.settings.cutoff_len
        listed = listed if limit is None else self._bounded(listed, limit)
        for at, piece in enumerate(listed):
            if piece.kind == "control":
                place = "start" if piece.text == TURN_START else "end"
            else:
                place = {"start": "header", "header": "body", "end": "outside"}.get(place, place)
            if place == "start":  # the next piece begins with the line that names the role
                role = listed[at + 1].text.partition("\n")[0]
            made.append(self._segment(piece, role, place, media))
        return made

    def _segment(self, piece: Piece, role: str, place: str, media: _Media) -> Segment:
        processor = self.processor
        answer = role == "assistant" and place not in ("start", "header")
        if piece.kind == "control":
            control = processor.control
            ids = [control.turn_start if place == "start" else control.turn_end]
            return Segment(ids, piece.trained, role, answer, starts=place == "start")
        if piece.medium is not None:
            medium = media[id(piece.medium)]
            special = self.family.special
            count = self.family.placeholder_count(medium.grid(self.family.geometry))
            pads = [special.video if medium.is_video else special.image] * count
            ids = [special.vision_start, *pads, special.vision_end]
            return Segment(ids, piece.trained, role, answer, medium=medium)
        kept: int | None = None
        if role != "system" and place == "body":
            kept = 0
        elif role == "user" and place == "header":
            kept = len(processor.tokenizer.encode(f"{role}\n"))
        return Segment(processor.tokenizer.encode(piece.text), piece.trained, role, answer, kept=kept)


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
        path = str(source).removeprefix("file://")
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
            raise DataError(f"the {name} answer holds a picture or video; they belong into the prompt")
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
    rows = media[0].rows
    if len(media) > 1:
        values = [medium.rows.values for medium in media]
        most = max(part.shape[2] for part in values)  # a video of one frame has one, where others have two
        values = [part if part.shape[2] == most else np.repeat(part, most, axis=2) for part in values]
        rows = replace(rows, values=np.concatenate(values))
    return rows if as_bytes else np.asarray(rows)


def _single(sample: Sample | Pair) -> Sample:
    if isinstance(sample, Pair):
        raise DataError("the record is a pair of answers; one answer is expected here")
    return sample
