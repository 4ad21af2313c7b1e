"""Two runs on the same questions: which is better, by how much, how sure that is, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.evaluation.answers import read_run
from duetvl.evaluation.report import read_results, table
from duetvl.evaluation.scoring import Marked
from duetvl.evaluation.statistics import Difference, difference
from duetvl.storage.files import write_text

COMPARISON: Final = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """Run B less run A over the questions that both have answered; differences are of values from 0 to 1.

    pairs: those questions, as A and as B answered them. left_out: questions that only one of them has an answer to.
    warnings: what makes the two hard to compare.
    """

    names: tuple[str, str]
    pairs: Sequence[tuple[Marked, Marked]]
    whole: Difference
    groups: dict[str, dict[str, Difference]]
    left_out: int
    warnings: Sequence[str]

    @property
    def different(self) -> list[tuple[Marked, Marked]]:
        """The pairs of different values, the largest loss of B first."""
        return sorted((pair for pair in self.pairs if pair[0].value != pair[1].value), key=lambda pair: gain(*pair))


def gain(a: Marked, b: Marked) -> float:
    """What B's answer is worth more than A's."""
    return (b.value or 0.0) - (a.value or 0.0)


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare two directories of `duetvl eval`. ConfigError where they are none, or have no question in common."""
    runs = [read_run(directory) for directory in (first, second)]
    tasks = [run["settings"].get("task") for run in runs]
    if tasks[0] != tasks[1]:
        raise ConfigError(
            f"--compare: {first} is a run of {tasks[0]}, {second} of {tasks[1]}; they must be of one task"
        )
    a, b = ({one.id: one for one in read_results(directory)} for directory in (first, second))
    pairs = [(one, b[name]) for name, one in a.items() if name in b and _answered(one) and _answered(b[name])]
    if not pairs:
        raise ConfigError(f"--compare: {first} and {second} have no question in common that both have answered")
    fields = dict.fromkeys(field for one, _ in pairs for field in one.groups)
    groups = {field: _by_group(pairs, field) for field in fields}
    left_out = len(a.keys() | b.keys()) - len(pairs)
    return Comparison((str(first), str(second)), pairs, _of(pairs), groups, left_out, list(_warnings(runs, pairs)))


def write_comparison(comparison: Comparison, directory: Path) -> None:
    """Write comparison.json: differences in percent, and the questions where the two differ."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "a": comparison.names[0],
        "b": comparison.names[1],
        "unit": "percent",
        **_percent(comparison.whole),
        "groups": {
            field: {value: _percent(one) for value, one in values.items()}
            for field, values in comparison.groups.items()
        },
        "left_out": comparison.left_out,
        "warnings": list(comparison.warnings),
        "different": [
            {"id": a.id, "index": a.index, "prompt": a.prompt, "truths": a.truths, "a": _side(a), "b": _side(b)}
            for a, b in comparison.different
        ],
    }
    write_text(directory / COMPARISON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def comparison_lines(comparison: Comparison, most: int = 10) -> Iterator[str]:
    """The comparison as Markdown; `most` of the questions where the two differ."""
    a, b = comparison.names
    yield f"B ({b}) less A ({a}), {len(comparison.pairs)} questions that both have answered"
    yield ""
    yield from table(_lines(comparison), ("", "A", "B", "B - A", "95% interval", "better", "worse", "equal", "chance"))
    yield ""
    whole = comparison.whole
    yield f"{verdict(whole)} (sign test over pictures: {whole.chance:.2g})"
    for warning in comparison.warnings:
        yield f"note: {warning}"
    different = comparison.different
    if different:
        yield ""
        yield f"{len(different)} questions differ" + (f", {most} of them:" if len(different) > most else ":")
        for one, other in different[:most]:
            yield f"  {one.id}: {_short(one.answer)} -> {_short(other.answer)}  (truth {_short(one.truths[0])})"


def verdict(one: Difference) -> str:
    """What a difference says, in words."""
    if one.low > 0:
        return "B is better: the interval is above 0"
    return (
        "A is better: the interval is below 0" if one.high < 0 else "no significant difference: the interval contains 0"
    )


def _lines(comparison: Comparison) -> Iterator[Sequence[str]]:
    yield _line("all", comparison.pairs, comparison.whole)
    for field, values in comparison.groups.items():
        for value, one in values.items():
            yield _line(f"{field}: {value}", _in_group(comparison.pairs, field, value), one)


def _line(name: str, pairs: Sequence[tuple[Marked, Marked]], one: Difference) -> Sequence[str]:
    means = [100 * sum(pair[side].value or 0.0 for pair in pairs) / len(pairs) for side in (0, 1)]
    return (
        name, f"{means[0]:.1f}", f"{means[1]:.1f}", f"{100 * one.mean:+.1f}",
        f"{100 * one.low:+.1f} to {100 * one.high:+.1f}", str(one.better), str(one.worse), str(one.equal),
        f"{one.chance:.2g}",
    )  # fmt: skip


def _of(pairs: Sequence[tuple[Marked, Marked]]) -> Difference:
    clusters = [a.cluster or f"question {a.id}" for a, _ in pairs]
    return difference([a.value or 0.0 for a, _ in pairs], [b.value or 0.0 for _, b in pairs], clusters)


def _by_group(pairs: Sequence[tuple[Marked, Marked]], field: str) -> dict[str, Difference]:
    values = dict.fromkeys(one.groups[field] for one, _ in pairs if one.groups.get(field))
    return {value: _of(_in_group(pairs, field, value)) for value in values}


def _in_group(pairs: Sequence[tuple[Marked, Marked]], field: str, value: str) -> list[tuple[Marked, Marked]]:
    return [pair for pair in pairs if pair[0].groups.get(field) == value]


def _warnings(runs: Sequence[dict[str, Any]], pairs: Sequence[tuple[Marked, Marked]]) -> Iterator[str]:
    a, b = (run["settings"] for run in runs)
    if a.get("md5") != b.get("md5"):
        yield f"their data differ: md5 {a.get('md5')} and {b.get('md5')}"
    for name in ("profile", "min_pixels", "max_pixels", "max_new_tokens"):
        if a.get(name) != b.get(name):
            yield f"they were asked with another {name}: {a.get(name)} and {b.get(name)}"
    changed = sum(one.truths != other.truths for one, other in pairs)
    if changed:
        yield f"{changed} questions have other truths in the one than in the other"


def _answered(one: Marked) -> bool:
    return one.value is not None


def _side(one: Marked) -> dict[str, Any]:
    return {"answer": one.answer, "parsed": one.parsed, "value": one.value, "verdict": one.verdict}


def _percent(one: Difference) -> dict[str, Any]:
    return asdict(one) | {name: round(100 * getattr(one, name), 4) for name in ("mean", "low", "high")}


def _short(text: str | None, most: int = 40) -> str:
    flat = " ".join((text or "").split())
    return repr(flat if len(flat) <= most else f"{flat[: most - 3]}...")
