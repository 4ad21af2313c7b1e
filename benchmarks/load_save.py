"""Seconds to load a checkpoint and to save it again, against transformers, and against the machine's own.

Every contender runs in a process of its own, in turn, on the same random weights of 100 million parameters in float32:

    python benchmarks/load_save.py [--write]

The file is in the page cache when it is loaded: reading its bytes into new memory is the limit, in processor seconds.
What is saved is a directory that transformers reads, its bytes on the disk when the clock stops, and the clock is the
one on the wall: writing as many bytes is the limit. `--write` puts the table into benchmarks/results/load_save.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from contest import write_model
from harness import SIDES, Limit, Limits, Row, Seconds

OTHER = "transformers"
PAGE = 1024  # numbers
Pieces = tuple[Callable[[], Any], Callable[[Any, Path], None]]  # loads a model; saves it into a new directory


def duetvl_pieces(directory: Path, side: str) -> Pieces:
    """Through duetvl."""
    import duetvl

    backend = duetvl.load_backend(SIDES[side], device="cpu")
    return (
        lambda: duetvl.load_model(directory, backend=backend, dtype="float32"),
        lambda model, target: model.save_pretrained(target),
    )


def transformers_pieces(directory: Path) -> Pieces:
    """Through transformers, which maps its weights: a number of each page is read, so that they are there.

    Saving is followed by `sync`, as duetvl waits for its files too.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Their

    def save(model: Any, target: Path) -> None:
        model.save_pretrained(target)
        subprocess.run(["sync", "-f", str(target)], check=True)

    def load() -> Any:
        model = Their.from_pretrained(directory, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.detach().view(-1)[::PAGE].sum()
        return model

    return load, save


def measure(directory: Path, name: str, repeats: int) -> dict[str, dict[str, float]]:
    """The least seconds of loading and of saving, in this process."""
    load, save = transformers_pieces(directory) if name == OTHER else duetvl_pieces(directory, name)
    model = load()
    loading = harness.repeated(load, repeats, warm=0)
    saving = []
    for number in range(repeats):
        target = directory.parent / f"{name}-{number}"
        saving.append(harness.timed(partial(save, model, target)))
        shutil.rmtree(target)
    return {"load": vars(loading), "save": vars(harness.least(saving))}


def read_bytes(directory: Path) -> None:
    """Every byte of the weights into new memory."""
    for path in directory.glob("*.safetensors"):
        np.fromfile(path, np.uint8)


def rows(quick: bool, limits: Limits) -> Iterator[Row]:
    """Loading and saving on each framework; the quick size is the whole one."""
    names = [*harness.sides(), *([OTHER] if harness.installed("torch", OTHER) else [])]
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        write_model(Path(place))
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        reading = harness.repeated(lambda: read_bytes(directory), 3)
        writing = harness.seconds_of_writing(Path(place), size)
        flags = ["--repeats", 3, "--inside", directory]
        taken = {name: harness.apart(__file__, *flags, name) for name in names}
    for piece, limit in (("load", Limit("reading the file", reading.cpu)), ("save", Limit("disk", writing.wall))):
        clock: harness.Clock = "cpu" if piece == "load" else "wall"
        seconds = {name: Seconds(**figures[piece]) for name, figures in taken.items()}
        theirs, other = harness.fastest({name: seconds[name] for name in names if name == OTHER}, clock)
        for side in harness.sides():
            work, command = f"a model of {size / 1e6:.0f} MB in float32", harness.command_of(__file__)
            yield Row(piece, side, work, seconds[side], theirs, other, limit, command, clock)


def report(table: list[Row]) -> str:
    """The rows as a page."""
    lines = [
        "# Loading and saving",
        "",
        "| | processor s | wall s | of transformers | of the limit | the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        ratios = [f"{ratio:.2f}" for ratio in row.ratios.values()]
        limit = row.limit.kind if row.limit else ""
        lines.append(
            f"| {row.name}, {row.side} | {row.ours.cpu:.2f} | {row.ours.wall:.2f} | {' | '.join(ratios)} | {limit} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{table[0].work}; the least of 3. Ratios are of processor seconds in loading, of wall seconds in saving.",
            f"{harness.processor_name()}, {os.cpu_count()} cores, 1 thread, Python {platform.python_version()}, "
            f"{harness.versions('torch', 'mindspore', 'transformers')}; load {os.getloadavg()[0]:.1f} at the end.",
            "Command: `python benchmarks/load_save.py --write`",
        ]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", nargs=2, metavar=("DIRECTORY", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        directory, name = options.inside
        harness.say(json.dumps(measure(Path(directory), name, options.repeats)))
        return
    page = report(list(rows(False, Limits.measure())))
    harness.say(page)
    if options.write:
        harness.write_page(__file__, page + "\n")


if __name__ == "__main__":
    main()
