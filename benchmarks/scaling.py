"""72B on 16 to 1,024 devices, on paper: `python benchmarks/scaling.py` writes the tables of docs/scaling.md again.

Layouts are those that `duetvl plan` proposes for the devices of the guides, with its cost model. Volumes are those of
the model's own accounts of traffic, the checkpoint's files those that the writer's and reader's own code choose, over
parameters without numbers. Nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duetvl.core.boxes import Box
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import BYTES, Trained
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.parallel.division import Division
from duetvl.parallel.units import Unit
from duetvl.planning.command import Question, wish_of
from duetvl.planning.search import Proposal, Search, degrees
from duetvl.training.checkpoints.pieces import LocalTensor, read_pieces, written_pieces
from duetvl.training.memory import division_of

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODEL, DEVICE = "Qwen2.5-VL-72B", "910B3"
DEVICES = (16, 64, 256, 1024)
SAMPLES_A_DEVICE, ALL_SAMPLES = 6, 1536  # the guides' 96 on 16; a batch that does not grow with the devices
NODE_STORAGE, ALL_STORAGE = 2e9, 20e9  # bytes a second of a node, and of the file system
OFFLOADED = (16,)  # devices on which the optimizer's state has to be on the host

Table = Iterator[str]
Range = tuple[str, str, Box]


@dataclass(frozen=True)
class Layout:
    """The first proposal for a number of devices."""

    devices: int
    best: Proposal
    config: ModelConfig

    @property
    def name(self) -> str:
        """Degrees, and virtual stages where there are some."""
        parallel = self.best.recipe.parallel
        virtual = f", virtual {parallel.virtual}" if parallel.virtual > 1 else ""
        zero = f", zero {parallel.zero}" if parallel.zero > 1 else ""
        return degrees(parallel) + virtual + zero

    def division(self, rank: int) -> Division:
        """As a rank sees it."""
        return division_of(self.best.recipe, self.config, rank)


def planned(devices: int, samples: int, model: str = MODEL) -> Layout:
    """The fastest layout for a number of samples per step, of 512 tokens each, with a picture of 324."""
    overrides = ["optim.offload=true"] if devices in OFFLOADED else []
    wish = wish_of(Question(model, devices, DEVICE, global_batch=samples, overrides=overrides))
    return Layout(devices, Search(wish).best(1)[0], wish.config)


# -- a step -----------------------------------------------------------------------------------------------------------


def steps(layouts: Iterable[Layout], seconds_a_sample: float | None = None) -> Table:
    """Seconds, and of what; the share of the speed that the first layout's devices would have in this number."""
    yield "| devices | layout | recompute | samples | memory | seconds | bubble | samples a second | efficiency |"
    yield "|---:|---|---|---:|---:|---:|---:|---:|---:|"
    for layout in layouts:
        step, recipe = layout.best.step, layout.best.recipe
        samples = recipe.train.global_batch
        own = layout.devices * step.seconds / samples
        seconds_a_sample = seconds_a_sample or own
        yield (
            f"| {layout.devices:,} | {layout.name} | {recipe.train.recompute} | {samples:,} "
            f"| {layout.best.memory.on_device / 2**30:.1f} GiB | {step.seconds:.2f} | {step.bubble:.0%} "
            f"| {samples / step.seconds:.1f} | {seconds_a_sample / own:.2f} |"
        )


def parts(layouts: Iterable[Layout]) -> Table:
    """Where the busiest rank's seconds go, and what it sends."""
    yield "| devices | computing | recomputing | tp | cp | ZeRO-3 | waiting | gradients | optimizer | sent by a rank |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for layout in layouts:
        step = layout.best.step
        shares = (step.compute, step.again, step.sums, step.pieces, step.blocks, step.waiting)
        cells = " | ".join(f"{seconds / step.seconds:.0%}" for seconds in (*shares, step.gradients, step.update))
        yield f"| {layout.devices:,} | {cells} | {step.sent / 1e9:.1f} GB |"


# -- a checkpoint -----------------------------------------------------------------------------------------------------


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def of_rank(layout: Layout, rank: int) -> tuple[list[Parameter], dict[str, Parameter], AdamWState]:
    """What a rank holds, and what it updates with AdamW's memory of it."""
    division, recipe = layout.division(rank), layout.best.recipe
    shapes = parameter_shapes(layout.config)
    trained = Trained.of(layout.config, recipe.model.dtype, recipe.model.freeze, None).paths
    held, owned = [], {}
    for path, shape in shapes.items():
        if not division.holds(path):
            continue
        part = division.part(path, shape)
        parameter = Parameter.of(path, empty(part.shape), part)
        parameter.trainable = path in trained
        held.append(parameter)
        if parameter.trainable:
            sharing = division.sharing(path, shape)
            team = division.team(sharing.axes)
            rows = Unit.of(sharing, part.shape, len(team), path).rows[team.index(rank)]
            if len(team) == 1:
                owned[path] = parameter
            elif rows:
                own = sharing.unit.rows(rows.start, rows.stop)
                owned[path] = Parameter(path, empty(own.shape), part=own)
    tensors = {path: one.tensor for path, one in owned.items()}
    return held, owned, AdamWState({}, dict(tensors), dict(tensors), dict(tensors))


def size_of(pieces: Iterable[LocalTensor], dtype: str) -> Counter[str]:
    """Bytes of each kind: weights in the run's dtype, the rest in float32."""
    found: Counter[str] = Counter()
    for piece in pieces:
        numbers = sum(math.prod(box.shape) for box, _ in piece.boxes())
        found[piece.kind] += numbers * BYTES[dtype if piece.kind == "weights" else "float32"]
    return found


def checkpoints(layouts: Iterable[Layout]) -> Table:
    """Files and bytes of a checkpoint, the rank that writes most, and seconds."""
    yield "| devices | files | bytes | most by a rank | by a node | written in | a rank reads at most | read in |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for layout in layouts:
        dtype = layout.best.recipe.model.dtype
        written, read, files = [], [], 0
        for rank in range(layout.devices):
            held, owned, state = of_rank(layout, rank)
            sizes = size_of(written_pieces(held, owned, state, layout.division(rank)), dtype)
            files = files + sum(1 for size in sizes.values() if size)
            written.append(sizes.total())
            read.append(size_of(read_pieces(held, owned, state), dtype).total())
        writing, reading = (storage_seconds(sizes) for sizes in (written, read))
        yield (
            f"| {layout.devices:,} | {files:,} | {sum(written) / 1e9:,.0f} GB | {max(written) / 1e9:.2f} GB "
            f"| {max(by_node(written)) / 1e9:.1f} GB | {writing:.0f} s | {max(read) / 1e9:.2f} GB | {reading:.0f} s |"
        )


def by_node(sizes: list[int], ranks: int = 8) -> list[int]:
    """Sums over the ranks of each node."""
    return [sum(sizes[first : first + ranks]) for first in range(0, len(sizes), ranks)]


def storage_seconds(sizes: list[int]) -> float:
    """Of the node with most, or of the file system, whichever is longer."""
    return max(max(by_node(sizes)) / NODE_STORAGE, sum(sizes) / ALL_STORAGE)


# -- the page ---------------------------------------------------------------------------------------------------------


def tables(devices: Iterable[int]) -> dict[str, str]:
    """Each table of the page by its name."""
    growing = [planned(number, SAMPLES_A_DEVICE * number) for number in devices]
    fixed = [planned(number, ALL_SAMPLES) for number in devices]
    made = {"growing": steps(growing), "parts": parts(growing), "fixed": steps(fixed), "files": checkpoints(growing)}
    return {name: "\n".join(lines) for name, lines in made.items()}


def replaced(page: str, name: str, table: str) -> str:
    """The page with the table between its two marks."""
    begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n\n{end}", page, flags=re.DOTALL)


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, help="numbers of devices")
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md")
    args = parser.parse_args()
    began, page = time.perf_counter(), PAGE.read_text(encoding="utf-8") if args.write else ""
    for name, table in tables(args.devices).items():
        page = replaced(page, name, table)
        sys.stdout.write(f"{name}\n{table}\n\n")
    if args.write:
        PAGE.write_text(page, encoding="utf-8")
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
