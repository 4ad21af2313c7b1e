"""From answers to scores: each answer is marked by its task's rule, and marks are summed up, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

from duetvl.evaluation.profiles import Profile
from duetvl.evaluation.question import Question, Score, Task
from duetvl.evaluation.statistics import interval

Row = Mapping[str, Any]
Verdict = Literal["right", "partly", "wrong", "unparsed", "unanswered"]
VERDICTS: Final[tuple[Verdict, ...]] = ("right", "partly", "wrong", "unparsed", "unanswered")


@dataclass(frozen=True)
class Marked:
    """A question without its pictures, the answer to it, and what that is worth.

    value: 0 to 1, None where there is no answer; `problem` says why. parsed: what was read in the answer, None for
    nothing. others: the values by other rules. truncated: the answer was cut off at its most tokens. judged: it was a
    judge that read the answer.
    """

    index: int
    id: str
    prompt: str
    truths: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""
    notes: tuple[str, ...] = ()
    answer: str | None = None
    value: float | None = None
    parsed: str | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False
    judged: bool = False
    problem: str = ""

    @property
    def verdict(self) -> Verdict:
        """What became of the question, in one word."""
        if self.value is None:
            return "unanswered"
        if self.parsed is None:
            return "unparsed"
        return "right" if self.value == 1 else "partly" if self.value > 0 else "wrong"

    def as_row(self) -> dict[str, Any]:
        """It as JSON."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_row(cls, row: Row) -> Marked:
        """What `as_row` gave, read again. TypeError for something else."""
        known = {item.name: row[item.name] for item in fields(cls) if item.name in row}
        return cls(**known | {name: tuple(known.get(name, ())) for name in ("truths", "notes")})


@dataclass(frozen=True)
class Tally:
    """The score of some questions, in percent, with its 95% interval; None where none of them has an answer.

    n: questions that have a score. unparsed, truncated: of them. unanswered: questions besides, that have none.
    clusters: pictures or videos that the n questions are about. others: the scores by other rules. method: of the
    interval.
    """

    score: float | None
    low: float | None
    high: float | None
    n: int
    unparsed: int
    truncated: int
    unanswered: int
    clusters: int
    method: str = ""
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The whole's tally, and those of its groups: `groups["split"]["validation"]`."""

    whole: Tally
    groups: Mapping[str, Mapping[str, Tally]]


Judge = Callable[[Question, str], str | None]


def mark(
    task: Task, profile: Profile, questions: Iterable[Question], rows: Mapping[int, Row], judge: Judge | None = None
) -> Iterator[Marked]:
    """Every question with its answer, of `rows` by index.

    An answer in which nothing can be read is shown to the `judge`, which gives the option that it means, or None.
    """
    for question in questions:
        yield _marked(task, profile, question, rows.get(question.index), judge)


def summarize(marked: Sequence[Marked], names: Sequence[str]) -> Summary:
    """Scores of the whole, and by each of the fields `names` of the questions' groups, in the order they come in."""
    groups: dict[str, dict[str, Tally]] = {}
    for name in names:
        members: dict[str, list[Marked]] = {}
        for one in marked:
            if one.groups.get(name):
                members.setdefault(one.groups[name], []).append(one)
        if members:
            groups[name] = {value: tally(some) for value, some in members.items()}
    return Summary(tally(marked), groups)


def tally(marked: Sequence[Marked]) -> Tally:
    """The score of some questions."""
    scored = [one for one in marked if one.value is not None]
    clusters = [one.cluster or f"question {one.index}" for one in scored]
    counts: dict[str, Any] = {
        "n": len(scored),
        "unparsed": sum(one.parsed is None for one in scored),
        "truncated": sum(one.truncated for one in scored),
        "unanswered": len(marked) - len(scored),
        "clusters": len(set(clusters)),
    }
    if not scored:
        return Tally(None, None, None, **counts)
    spread = interval([value for one in scored if (value := one.value) is not None], clusters)
    rules = dict.fromkeys(name for one in scored for name in one.others)
    others = {name: _percent(sum(one.others.get(name, 0.0) for one in scored) / len(scored)) for name in rules}
    low, high = _percent(spread.low), _percent(spread.high)
    return Tally(_percent(spread.mean), low, high, **counts, method=spread.method, others=others)


def _percent(value: float) -> float:
    return round(100 * value, 4)


def _marked(task: Task, profile: Profile, question: Question, row: Row | None, judge: Judge | None) -> Marked:
    common: dict[str, Any] = {
        "index": question.index,
        "id": question.id,
        "prompt": prompt_text(question),
        "truths": question.truths,
        "options": dict(question.options),
        "groups": dict(question.groups),
        "cluster": question.cluster,
        "notes": question.notes,
    }
    text = None if row is None else row.get("text")
    if row is None or text is None:
        reason = question.problem or (row or {}).get("error") or "it was not asked"
        return Marked(**common, problem=str(reason))
    score, judged = _judged(task, profile, question, text, judge)
    return Marked(
        **common,
        answer=text,
        value=float(score.value),
        parsed=score.parsed,
        others=dict(score.others),
        truncated=row.get("finish_reason") == "length",
        judged=judged,
    )


def _judged(task: Task, profile: Profile, question: Question, text: str, judge: Judge | None) -> tuple[Score, bool]:
    """The score of an answer, and whether a judge read it."""
    score = task.score(question, text, profile)
    if score.parsed is not None or judge is None or not question.options:
        return score, False
    letter = judge(question, text)
    return (score, False) if letter is None else (task.score(question, letter, profile), True)


def prompt_text(question: Question) -> str:
    """The words of a question; `<image>` and `<video>` stand for its media."""
    marks = {"ImagePart": "<image>", "VideoPart": "<video>"}
    parts = [part for turn in question.conversation.turns for part in turn.parts]
    return "".join(part if isinstance(part, str) else marks.get(type(part).__name__, "") for part in parts)
