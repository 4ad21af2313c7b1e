"""The schedule of a recipe's pipeline, drawn: each rank's passes along time, and its bubble."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.parallel.schedule import Schedule, Timed, formula, one_f_one_b
from duetvl.storage.files import write_bytes
from duetvl.training.recipe.sections import Recipe

_COLUMNS: Final = 80
_LABELLED: Final = 160  # units of time up to which there is room for numbers in a picture
_COLOURS: Final = {"forward": "Blues", "backward": "Oranges"}


def check_drawable(recipe: Recipe) -> None:
    """Raise ConfigError unless a recipe has a pipeline."""
    if recipe.parallel.pp == 1:
        raise ConfigError("--schedule: parallel.pp is 1, so there is no pipeline to draw; give parallel.pp=2 or more")


def schedule_lines(ranks: int, virtual: int, micro_batches: int) -> Iterator[str]:
    """A step's schedule with its bubble, and a line for each rank where F is a forward and B a backward pass.

    The bubble is a share of the computing time. Behind F and B is the number of the micro-batch, and with virtual
    stages a letter for the stage of the rank. All stages are drawn alike, a backward pass with twice the time of a
    forward pass.
    """
    schedule = one_f_one_b(ranks, virtual, micro_batches)
    bubble, by_formula = _percent(_bubble(schedule)), _percent(formula(ranks, virtual, micro_batches))
    yield f"schedule: {_shape(ranks, virtual, micro_batches)}: bubble {bubble}, formula {by_formula}"
    yield from cells(schedule, virtual)


def cells(schedule: Schedule, virtual: int, columns: int = _COLUMNS) -> Iterator[str]:
    """A line for each rank, cut with `...` beyond `columns`."""
    ranks = [schedule.timed(rank) for rank in range(len(schedule.actions))]
    width = 1 + max((len(_label(one, len(ranks), virtual)) for passes in ranks for one in passes), default=1)
    name = len(f"  rank {len(ranks) - 1}")
    for rank, passes in enumerate(ranks):
        drawn = [f"{'.':<{width}}"] * schedule.length
        for one in passes:
            label = _label(one, len(ranks), virtual)
            drawn[one.start : one.stop] = [f"{label:-<{width * (one.stop - one.start) - 1}} "]
            drawn[one.start + 1 : one.start + 1] = [""] * (one.stop - one.start - 1)
        line = f"{f'  rank {rank}':<{name}}  {''.join(drawn)}".rstrip()
        yield line if len(line) <= columns else f"{line[: columns - 4].rstrip()} ..."


def draw(ranks: int, virtual: int, micro_batches: int, target: Path) -> None:
    """The same as a PNG, which appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schedule = one_f_one_b(ranks, virtual, micro_batches)
    figure = Figure(figsize=(max(8, min(24, 0.22 * schedule.length)), 1.4 + 0.4 * ranks), layout="constrained")
    axes = figure.subplots()
    for rank in range(ranks):
        _draw_rank(axes, rank, schedule.timed(rank), ranks, virtual, schedule.length <= _LABELLED)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlabel("time in forward passes of a stage, all stages drawn alike")
    axes.set_title(f"{_shape(ranks, virtual, micro_batches)}: bubble {_percent(_bubble(schedule))}")
    FigureCanvasAgg(figure).print_png(content := io.BytesIO())
    write_bytes(target, content.getvalue())


def _draw_rank(axes: Any, rank: int, passes: Sequence[Timed], ranks: int, virtual: int, labelled: bool) -> None:
    """Bars: forward passes blue, backward passes orange, darker for later stages of the rank."""
    from matplotlib import colormaps

    shades = [
        colormaps[_COLOURS[one.compute.direction]](0.35 + 0.4 * (one.compute.stage // ranks) / max(1, virtual - 1))
        for one in passes
    ]
    spans = [(one.start, one.stop - one.start) for one in passes]
    axes.broken_barh(spans, (rank - 0.4, 0.8), facecolors=shades, edgecolor="white", linewidth=0.5)
    for one in passes if labelled else ():
        axes.text((one.start + one.stop) / 2, rank, str(one.compute.micro_batch), ha="center", va="center", fontsize=7)


def _label(one: Timed, ranks: int, virtual: int) -> str:
    """`F3`, with virtual stages `F3a`."""
    compute = one.compute
    stage = _letters(compute.stage // ranks) if virtual > 1 else ""
    return f"{compute.direction[0].upper()}{compute.micro_batch}{stage}"


def _letters(number: int) -> str:
    """a to z, and then aa, ab."""
    more, last = divmod(number, 26)
    return (_letters(more - 1) if more else "") + chr(ord("a") + last)


def _shape(ranks: int, virtual: int, micro_batches: int) -> str:
    stages = f" x {virtual} virtual stages" if virtual > 1 else ""
    return f"{ranks} ranks{stages}, {micro_batches} micro-batch{'es' * (micro_batches != 1)}"


def _bubble(schedule: Schedule) -> float:
    """What a rank waits as a share of the time that it computes."""
    return schedule.idle / (1 - schedule.idle)


def _percent(share: float) -> str:
    return f"{100 * share + 1e-9:.1f} %"  # halves are rounded up
