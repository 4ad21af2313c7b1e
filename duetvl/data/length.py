"""Samples that are too long: what a text may lose, and when a sample is left out.

A sample is a list of segments. Control tokens, role lines and media are whole or not there: only what users and
assistants wrote is cut, from its end. How much each side of a turn loses follows LLaMA-Factory's proportions, but its
cut goes through headers and pictures, and this one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from duetvl.data.draft import Dropped
from duetvl.data.media.plan import Medium


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens that are trained or not. The first `kept` of them cannot be cut; None: none can.

    `role` is that of the turn it belongs to, and `answer` says that an assistant's turn has begun: its content, end
    and line end. `starts` is the first segment of its turn.
    """

    ids: list[int]
    trained: bool
    role: str
    answer: bool = False
    starts: bool = False
    kept: int | None = None
    medium: Medium | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def cuttable(self) -> int:
        """Tokens that may be cut from its end."""
        return 0 if self.kept is None else max(0, len(self) - self.kept)

    def cut(self, tokens: int) -> Segment:
        """The segment without its last `tokens` tokens."""
        return replace(self, ids=self.ids[: len(self) - tokens])


Segments = list[Segment]


def length(segments: Sequence[Segment]) -> int:
    """Tokens of all segments."""
    return sum(len(segment) for segment in segments)


def truncate(segments: Segments, limit: int, *, keep_last: bool = False) -> Segments:
    """At most `limit` tokens of a conversation: whole exchanges, and a part of the first that does not fit.

    An exchange is what is said to the assistant, and its answer. They are kept from the front, or with `keep_last`,
    for conversations of which only the last answer is trained, from the back; the system turn always. Raises Dropped
    where not one exchange is left, or no trained token.
    """
    system, exchanges = _exchanges(segments)
    room = limit - length(system)
    kept: list[Segments] = []
    for exchange in reversed(exchanges) if keep_last else exchanges:
        if length(exchange) > room:
            fitted = _fit(exchange, room)
            kept += [fitted] if fitted else []
            break
        kept.append(exchange)
        room -= length(exchange)
    if not kept:
        raise Dropped(f"its first exchange without its texts does not fit into {limit} tokens")
    made = system + [segment for exchange in (reversed(kept) if keep_last else kept) for segment in exchange]
    _check_trained(segments, made, limit)
    return made


def truncate_pair(chosen: Segments, rejected: Segments, limit: int) -> tuple[Segments, Segments]:
    """The same for two answers to one prompt: each sequence gets at most `limit` tokens, and both the same prompt."""
    prompt = chosen[: _last_answer(chosen)]
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    wanted_prompt, wanted_answer = proportions(length(prompt), max(map(length, answers)), limit)
    short = _cut_prompt(prompt, length(prompt) - wanted_prompt)
    room = min(max(wanted_answer, 0), limit - length(short))
    made = tuple(short + _head(answer, room) for answer in answers)
    for whole, part in zip((chosen, rejected), made, strict=True):
        _check_trained(whole, part, limit)
    return made[0], made[1]


def proportions(source: int, target: int, limit: int) -> tuple[int, int]:
    """Tokens of a source and its target within `limit`: LLaMA-Factory's `infer_seqlen`.

    The longer side is cut where the other takes less than half of the room; both by their share where none does.
    """
    if target * 2 < limit:
        most = limit
    elif source * 2 < limit:
        most = limit - source
    else:
        most = int(limit * (target / (source + target)))
    target = min(most, target)
    return min(max(limit - target, 0), source), target


def _exchanges(segments: Segments) -> tuple[Segments, list[Segments]]:
    system = [segment for segment in segments if segment.role == "system"]
    exchanges: list[Segments] = []
    for segment in segments[len(system) :]:
        begins = segment.starts and segment.role != "assistant"
        if not exchanges or (begins and exchanges[-1][-1].role == "assistant"):
            exchanges.append([])
        exchanges[-1].append(segment)
    return system, exchanges


def _fit(exchange: Segments, room: int) -> Segments | None:
    """A part of an exchange; None where its headers and media alone take too much, or nothing is left to answer."""
    at = _last_answer(exchange)
    source, target = exchange[:at], exchange[at:]
    wanted_source, _ = proportions(length(source), length(target), room)
    short = _cut_prompt(source, length(source) - wanted_source)
    answer = _head(target, room - length(short))
    return short + answer if length(short) < room and answer else None


def _last_answer(segments: Segments) -> int:
    """Where the last answer begins: behind the header of its turn."""
    starts = [at for at, segment in enumerate(segments) if segment.answer and not (at and segments[at - 1].answer)]
    return starts[-1] if starts else len(segments)


def _cut_prompt(source: Segments, tokens: int) -> Segments:
    """The source without up to `tokens` tokens of what users wrote, taken from the end."""
    made: Segments = []
    for segment in reversed(source):
        cut = min(tokens, segment.cuttable) if not segment.answer else 0
        tokens -= cut
        made.append(segment.cut(cut) if cut else segment)
    return made[::-1]


def _head(answer: Segments, room: int) -> Segments:
    """The first tokens of an answer; it ends before a segment that cannot be cut and does not fit."""
    made: Segments = []
    for segment in answer:
        cut = max(0, len(segment) - room)
        if cut > segment.cuttable or cut == len(segment):
            break
        made.append(segment.cut(cut) if cut else segment)
        room -= len(segment) - cut
        if cut:
            break
    return made


def _check_trained(whole: Sequence[Segment], part: Sequence[Segment], limit: int) -> None:
    if any(s.trained and s.ids for s in whole) and not any(s.trained and s.ids for s in part):
        raise Dropped(f"none of its trained tokens is left when it is cut to {limit} tokens")
