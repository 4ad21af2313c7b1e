"""From a conversation, or the two of a pair, to sequences of tokens with their media at given sizes, and of bounded
length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from duetvl.core.errors import DataError
from duetvl.data.conversation import Conversation
from duetvl.data.draft import Dropped
from duetvl.data.formats.grounding import write_boxes
from duetvl.data.length import Segment, Segments, length, truncate, truncate_pair
from duetvl.data.media.plan import Medium, shrunk
from duetvl.data.template import TURN_START, Piece, render

if TYPE_CHECKING:
    from duetvl.data.encode import EncodeSettings, Processor

Media = dict[int, Medium]  # by the identity of the part
_USUAL_LETTERS: Final = 16  # for a token: fewer are quickly tokenised


class SequenceWriter:
    """Writes the sequences of a conversation, or of a pair, with its media at given sizes."""

    def __init__(
        self, processor: Processor, settings: EncodeSettings, conversations: Sequence[Conversation], prompt: bool
    ) -> None:
        self.processor, self.settings, self.conversations = processor, settings, conversations
        self.family = processor.family
        # Of a pair only the two answers are compared, not what was said before.
        self.mask_history = settings.mask_history or len(conversations) > 1
        self.add_generation_prompt = prompt

    def sequences(self, media: Media) -> list[Segments]:
        """The segments of every conversation."""
        sizes = [(medium.original, medium.size) for medium in media.values() if not medium.is_video]
        written = [write_boxes(item, sizes, self.family.grounding) for item in self.conversations]
        return [self._segments(item, media) for item in written]

    def fitted(self, sequences: list[Segments], media: Media, limit: int) -> tuple[list[Segments], tuple[str, ...]]:
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

    def _shrunk(self, sequences: list[Segments], media: Media, limit: int) -> list[Segments]:
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

    def _scaled(self, media: Media, tokens: int) -> Media | None:
        """The media at the largest common share of their areas that stays within the tokens allowed."""

        def at(scale: float) -> Media:
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

    def _tokens(self, media: Media) -> int:
        geometry = self.family.geometry
        return sum(self.family.placeholder_count(medium.grid(geometry)) for medium in media.values())

    def _segments(self, conversation: Conversation, media: Media) -> Segments:
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

    def _segment(self, piece: Piece, role: str, place: str, media: Media) -> Segment:
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
