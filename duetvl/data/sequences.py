"""From a conversation, or the two of a pair, to sequences of tokens with their media at given sizes, and of bounded
length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from duetvl.data.conversation import Conversation
from duetvl.data.draft import Dropped
from duetvl.data.excess import PICTURES, VIDEOS, DroppedAsTooLong, Excess, SampleTooLong
from duetvl.data.formats.grounding import write_boxes
from duetvl.data.length import Segment, Segments, length, truncate, truncate_pair
from duetvl.data.media.plan import Medium, shrunk, sized
from duetvl.data.template import TURN_START, TemplatePiece, render

if TYPE_CHECKING:
    from duetvl.data.encode import EncodeSettings, Processor

Media = dict[int, Medium]  # by the identity of the part
Smaller = Callable[[int], Media]  # the media at a step; the lower it is, the smaller they are
_SHARES: Final = 2**20  # of an area, as steps
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
        """Sequences of at most `limit` tokens, and how that was done. Raises Dropped or SampleTooLong."""
        policy = self.settings.too_long
        if policy in ("error", "drop"):
            excess = self._excess(sequences, media, limit)
            raise self._too_long(excess.describe(), excess)
        if policy == "shrink":
            return self._shrunk(sequences, media, limit), ("shrunk",)
        if len(sequences) > 1:
            return list(truncate_pair(sequences[0], sequences[1], limit)), ("truncated",)
        return [truncate(sequences[0], limit, keep_last=self.settings.mask_history)], ("truncated",)

    def _too_long(self, found: str, excess: Excess) -> SampleTooLong:
        if self.settings.too_long != "error":
            return DroppedAsTooLong(found, excess)
        return SampleTooLong(f"{found}; {excess.remedies()}", excess)

    def _excess(self, sequences: list[Segments], media: Media, limit: int) -> Excess:
        """What is long, and the bound on pictures, or on videos, that makes it fit: first on that which takes more."""
        kinds = [[medium for medium in media.values() if medium.is_video == video] for video in (False, True)]
        images, videos = ((self._tokens(kind), len(kind)) for kind in kinds)
        ways = [(PICTURES, self._with_pictures(media)), (VIDEOS, self._with_videos(media))]
        bound = None
        for key, way in ways if images >= videos else reversed(ways):
            if bound is None and (fitting := self._fitting(sequences, media, limit, *way)) is not None:
                bound = key, fitting[1] * self.family.geometry.factor**2
        return Excess(limit, max(map(length, sequences)), images, videos, bound)

    def _bounded(self, pieces: list[TemplatePiece], limit: int) -> list[TemplatePiece]:
        """The pieces, where their texts may have no more than `limit` tokens: so long ones are not tokenised in vain,
        which takes a minute and gigabytes for some ten million characters. Raises SampleTooLong."""
        letters = sum(len(piece.text) for piece in pieces)
        if letters <= limit * _USUAL_LETTERS or letters <= limit * self.processor.tokenizer.longest:
            return pieces
        if self.settings.too_long != "truncate":
            found = f"has a text of {letters} characters, which has more tokens, the longest may have {limit}"
            raise self._too_long(found, Excess(limit, None))
        most = limit * self.processor.tokenizer.longest
        return [piece._replace(text=piece.text[:most]) for piece in pieces]

    def _shrunk(self, sequences: list[Segments], media: Media, limit: int) -> list[Segments]:
        """The sequences with all media at one share of their area, the largest that fits."""
        settings, geometry = self.processor.media, self.family.geometry

        def at(share: int) -> Media:
            return {key: shrunk(medium, share / _SHARES, settings, geometry) for key, medium in media.items()}

        if (fitting := self._fitting(sequences, media, limit, at, range(_SHARES + 1))) is not None:
            return fitting[0]
        longest = max(map(length, sequences))
        raise Dropped(
            f"has {longest} tokens, {longest - self._tokens(media.values())} of them text; with its pictures and "
            f"videos at their smallest it exceeds {limit}"
        )

    def _with_pictures(self, media: Media) -> tuple[Smaller, range]:
        """The media by the bound on pictures, in tokens, and all such bounds that are lower than now."""
        settings, geometry = self.processor.media, self.family.geometry
        unit, own = geometry.factor**2, settings.image
        low, high = own.bounds

        def at(bound: int) -> Media:
            lower = replace(settings, image=own.at_most(bound * unit))
            return {key: m if m.is_video else sized(m, lower, geometry) for key, m in media.items()}

        return at, range(-(-low // unit), high // unit + 1)

    def _with_videos(self, media: Media) -> tuple[Smaller, range]:
        """The same by the bound on a whole video."""
        settings, geometry = self.processor.media, self.family.geometry
        unit = geometry.factor**2

        def at(bound: int) -> Media:
            lower = replace(settings, total_pixels=bound * unit)
            return {key: sized(m, lower, geometry) if m.is_video else m for key, m in media.items()}

        return at, range(1, settings.total_pixels // unit + 1)

    def _fitting(
        self, sequences: list[Segments], media: Media, limit: int, at: Smaller, steps: range
    ) -> tuple[list[Segments], int] | None:
        """The sequences of the largest step at which they fit, and the step; None where they fit at none."""
        room, longest, tokens = limit, max(map(length, sequences)), self._tokens(media.values())
        for _ in range(8):  # boxes in pixels get shorter texts, and rarely longer ones: then once more with less room
            step = self._largest(at, steps, room - (longest - tokens))
            if step is None:
                return None
            smaller = at(step)
            sequences = self.sequences(smaller)
            longest, tokens = max(map(length, sequences)), self._tokens(smaller.values())
            if longest <= limit:
                return sequences, step
            room -= longest - limit
        return None

    def _largest(self, at: Smaller, steps: range, tokens: int) -> int | None:
        """The largest step at which the media stay within the tokens allowed."""
        if not steps or self._tokens(at(steps[0]).values()) > tokens:
            return None
        low, high = steps[0], steps[-1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._tokens(at(middle).values()) <= tokens else (low, middle)
        return low

    def _tokens(self, media: Iterable[Medium]) -> int:
        geometry = self.family.geometry
        return sum(self.family.placeholder_count(medium.grid(geometry)) for medium in media)

    def _segments(self, conversation: Conversation, media: Media) -> Segments:
        """The conversation's pieces as tokens, each with its place in its turn."""
        pieces = render(
            conversation,
            train_on_prompt=self.settings.train_on_prompt and len(self.conversations) == 1,
            mask_history=self.mask_history,
            add_generation_prompt=self.add_generation_prompt,
            system=self.settings.system,
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

    def _segment(self, piece: TemplatePiece, role: str, place: str, media: Media) -> Segment:
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
