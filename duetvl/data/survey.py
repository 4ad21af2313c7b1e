"""What a walk over all records finds: how many are good, how long they are, what is left out and why."""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from duetvl.data.draft import Draft, Dropped, MediaTally, NotItsFault, Outcome, Unread
from duetvl.data.excess import Excesses, SampleTooLong
from duetvl.data.media.plan import Medium
from duetvl.storage.files import write_bytes, write_text

_BINS = 12
_BAR = 40  # characters of the longest bar
_EXAMPLES = 5  # records named on the terminal for each kind of finding
_LISTED = 100_000  # records named in the file of them


_TITLES = {"dropped": "left out", "bad": "bad"}


@dataclass
class Survey:
    """Sums over drafts; memory is four bytes a record, and the words about those that are left out."""

    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0
    images: int = 0
    videos: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    bad: int = 0
    examples: dict[str, list[str]] = field(default_factory=lambda: {"dropped": [], "bad": []})
    left_out: list[str] = field(default_factory=list)
    unread: Unread = field(default_factory=Unread)
    excesses: Excesses = field(default_factory=Excesses)
    tally: MediaTally = field(default_factory=MediaTally)
    roots: Counter[str] = field(default_factory=Counter)  # directory -> media that were found in it by relative paths

    def add(self, outcome: Outcome, merge: int) -> None:
        """Take in one record: its draft, or why there is none. `merge` patches along a side make a token.

        Raises NotItsFault, which no run passes over.
        """
        if isinstance(outcome, NotItsFault):
            raise outcome
        self.tally.add(outcome)
        if isinstance(outcome, SampleTooLong) and outcome.excess is not None:
            self.excesses.add(outcome.excess)
        if not isinstance(outcome, Draft):
            kind = "dropped" if isinstance(outcome, Dropped) else "bad"
            setattr(self, kind, getattr(self, kind) + 1)
            if len(self.examples[kind]) < _EXAMPLES:
                self.examples[kind].append(str(outcome))
            if len(self.left_out) < _LISTED:
                self.left_out.append(f"{_TITLES[kind]}: {outcome}")
            return
        self.lengths.append(outcome.tokens)
        self.trained_tokens += outcome.trained_tokens
        sequences = 2 if outcome.rejected else 1  # the two answers of a pair have the prompt's media each
        self.images += len(outcome.image_grid_thw)
        self.videos += len(outcome.video_grid_thw)
        self.image_tokens += sequences * int(outcome.image_grid_thw.prod(axis=1).sum()) // merge**2
        self.video_tokens += sequences * int(outcome.video_grid_thw.prod(axis=1).sum()) // merge**2
        self.notes.update(outcome.notes)
        self.notes.update(["without a trained token"] if not outcome.trained_tokens else [])
        self.unread.add(outcome)
        self.roots.update(str(m.part.root) for m in outcome.media if isinstance(m, Medium) and m.part.root is not None)

    @property
    def records(self) -> int:
        """Records seen, good or not."""
        return len(self.lengths) + self.dropped + self.bad

    def lines(self) -> Iterator[str]:
        """The findings, for a terminal."""
        all_of_them = f"{self.records} record{'s' * (self.records != 1)}"
        yield f"{all_of_them}: {len(self.lengths)} good, {self.dropped} left out, {self.bad} bad"
        if self.lengths:
            yield from self._lengths()
        if self.excesses.count:
            yield self.excesses.propose(self.records)
        for note, count in sorted(self.notes.items()):
            yield f"{note}: {count} samples"
        yield from (f"media: {n} found in {root}" for root, n in sorted(self.roots.items()))
        yield from self.unread.values()
        for kind, title in _TITLES.items():
            yield from (f"  {title}: {text}" for text in self.examples[kind])
            more = getattr(self, kind) - len(self.examples[kind])
            if more > 0:
                yield f"  {title}: and {more} more"

    def _lengths(self) -> Iterator[str]:
        lengths = np.frombuffer(self.lengths, np.int32)
        total = int(lengths.sum(dtype=np.int64))
        middle, high = np.percentile(lengths, [50, 95])
        yield (
            f"tokens: {total} in total, mean {total / len(lengths):.0f}, median {middle:.0f}, 95% quantile {high:.0f}, "
            f"longest {lengths.max()}"
        )
        yield (
            f"shares: images {self.image_tokens / total:.1%} ({self.images}), videos "
            f"{self.video_tokens / total:.1%} ({self.videos}), text {self._text_share(total):.1%}; "
            f"trained {self.trained_tokens / total:.1%}"
        )
        yield from histogram(lengths)

    def _text_share(self, total: int) -> float:
        return (total - self.image_tokens - self.video_tokens) / total

    def list_left_out(self, target: Path) -> bool:
        """Name every record that is left out or bad, a line each, in a text file; without any there is no file."""
        if not self.left_out:
            target.unlink(missing_ok=True)
            return False
        more = self.dropped + self.bad - len(self.left_out)
        lines = [*self.left_out, *([f"and {more} more"] if more else [])]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(f"{line}\n" for line in lines))
        return True

    def draw(self, target: Path) -> None:
        """A PNG of the lengths, which appears whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.hist(np.frombuffer(self.lengths, np.int32), bins=60)
        axes.set_xlabel("tokens of a sample")
        axes.set_ylabel("samples")
        axes.grid(alpha=0.3)
        target.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(content := io.BytesIO())
        write_bytes(target, content.getvalue())


def survey(outcomes: Iterable[Outcome], merge: int) -> Survey:
    """Sum up what became of every record."""
    found = Survey()
    for outcome in outcomes:
        found.add(outcome, merge)
    return found


def histogram(lengths: Sequence[int] | np.ndarray) -> Iterator[str]:
    """Bars of text, at most a dozen, over bins with round edges."""
    lengths = np.asarray(lengths)
    step = _round_step((int(lengths.max()) - int(lengths.min()) + 1) / _BINS)
    first = int(lengths.min()) // step
    counts = np.bincount(lengths // step - first)
    width = len(str((first + len(counts)) * step))
    for number, count in enumerate(counts, start=first):
        bar = "#" * max(round(_BAR * count / counts.max()), int(count > 0))
        yield f"  {number * step:>{width}} to {(number + 1) * step - 1:>{width}} tokens  {bar:<{_BAR}} {count}"


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not less."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10
