"""The numbers of a run, where they are kept: metrics.jsonl, samples.jsonl, trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.storage.files import write_text
from duetvl.training.watching.trackers import Guarded, Tracker

Row = dict[str, Any]
METRICS = "metrics.jsonl"
ANSWERS = "samples.jsonl"
# What the trainer itself writes; what else it has written in a run, as an objective's values, is reserved in that run.
RESERVED = frozenset({
    "step", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "micro_batches", "tokens_per_s",
    "tokens_per_sample", "step_s", "data_wait", "peak_memory", "mfu", "loss_scale", "total_tokens", "total_skipped",
    "eval_loss", "eval_tokens",
})  # fmt: skip


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl; a last line that a kill has cut off is left out."""
    return read_rows(run / METRICS)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file of JSON lines: objects with a `step`. A line that is cut off or something else is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> Row | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


class JsonLines:
    """A file of rows, one JSON object a line, that outlives kills and full disks.

    What cannot be written is kept, and written before the next row.
    """

    def __init__(self, file: Path, *, after: int = 0, history: Path | None = None):
        """Start after step `after`: rows of later steps, from a run that was killed, are removed.

        `history` is the file whose rows up to there are taken over, where it is not this one.
        """
        self.path = file
        kept = [row for row in read_rows(history or file) if row["step"] <= after]
        write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(file, "ab", buffering=0)  # noqa: SIM115  closed by `close`
        self._waiting = b""

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, on disk as soon as the system writes. OSError where they have to wait."""
        self._waiting += b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        while self._waiting:  # a disk that fills up takes a part
            count = self._file.write(self._waiting)
            self._waiting = self._waiting[count:]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog:
    """Writes the rows of a run to all its places. A row is a mapping with `step`, the number of updates done."""

    def __init__(
        self,
        run: Path,
        *,
        after: int = 0,
        history: Path | None = None,
        trackers: Sequence[Tracker] = (),
        say: Callable[[str], None] = print,
    ):
        """Start after step `after`, see `JsonLines`; `history` is the run whose rows are taken over.

        `trackers` get the rows as well; `say` is called with what cannot be written, once for each place.
        """
        self.run, self._after, self._history, self._say = run, after, history, say
        self._files = {METRICS: self._open(METRICS)}
        if (history or run).joinpath(ANSWERS).exists():
            self._files[ANSWERS] = self._open(ANSWERS)
        self._failing: set[str] = set()
        self._trackers = [Guarded(tracker, say) for tracker in trackers]

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that are not finite become null. ConfigError for what is no JSON."""
        clean = _clean(row)
        self._append(METRICS, [clean])
        numbers = {key: value for key, value in clean.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.call("write", numbers)

    def write_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append generated answers to samples.jsonl."""
        if ANSWERS not in self._files:
            self._files[ANSWERS] = self._open(ANSWERS)
        self._append(
            ANSWERS, [{"step": step, **{key: _plain(key, value) for key, value in row.items()}} for row in rows]
        )
        for tracker in self._trackers:
            tracker.call("write_texts", step, rows)

    def close(self) -> None:
        """Close the files and the trackers. Rows that still cannot be written are lost, with a warning."""
        for name, file in self._files.items():
            try:
                file.write([])
            except OSError as error:
                self._say(f"warning: the last rows of {self.run / name} are lost: {error.strerror or error}")
            file.close()
        for tracker in self._trackers:
            tracker.call("close")

    def _open(self, name: str) -> JsonLines:
        history = None if self._history is None else self._history / name
        return JsonLines(self.run / name, after=self._after, history=history)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A full disk does not end a run: what was computed is worth more than its log."""
        try:
            self._files[name].write(rows)
            self._failing.discard(name)
        except OSError as error:
            if name not in self._failing:
                self._failing.add(name)
                reason = error.strerror or error
                self._say(f"warning: {self.run / name} cannot be written: {reason}; its rows are kept for later")


def check_own(row: Mapping[str, Any], reserved: Collection[str] = RESERVED) -> None:
    """Raise ConfigError where a callback logs under a name that is the trainer's."""
    if taken := [key for key in row if key in reserved]:
        raise ConfigError(
            f"a callback logs {taken[0]!r}, which the trainer itself writes; choose another name, such as "
            f"'my_{taken[0]}'"
        )


def _clean(row: Mapping[str, Any]) -> Row:
    return {key: _plain(key, value) for key, value in row.items()}


def _plain(key: str, value: Any) -> Any:
    """A value as metrics.jsonl takes it: numpy's and tensors' numbers as Python's, null for what is not finite."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the value logged as {key!r} is not a JSON value: {error}") from None
    return value
