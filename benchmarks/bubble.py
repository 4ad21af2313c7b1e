"""How long the stages of a pipeline wait for each other: `python benchmarks/bubble.py [--write]`.

Steps of eight micro-batches of text through two stages, and through two by two virtual ones, by real processes
(torchrun, gloo). Every action of the executor is timed. Idle is the share of a step, from the first action to the last
of all ranks, in which a rank computes nothing: as the formula says; as the schedule has it, with backward passes twice
as long as forward ones; as it is when the schedule is played through with the times that the passes have taken; and as
measured. The last two differ by what messages take. `--write` puts the table into results/bubble.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "training")]

from duetvl.parallel.schedule import Compute, Exchange, Schedule, formula, one_f_one_b  # noqa: E402

MICRO_BATCHES, STEPS, TOKENS = 8, 6, 384
# Equal stages: the vocabulary is small, and text does not meet the vision tower, which the first stage has.
SIZES: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_hidden_layers": 8, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": False,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp 2": {"pp": 2},
    "pp 2, virtual 2": {"pp": 2, "vision_layers": [[2, 0], [0, 0]], "language_layers": [[2, 2], [2, 2]]},
}


def measure(name: str, model: str) -> dict[str, Any]:
    """On this rank: steps, and when the actions of each began and ended; that of all ranks put together."""
    from duetvl.core.backend import load_backend
    from duetvl.core.batch import Sample
    from duetvl.data.loading.loader import Step
    from duetvl.parallel.pipeline import Pipeline
    from duetvl.training.recipe.reading import make_recipe
    from duetvl.training.sft import prepare
    from duetvl.training.step import Trainer

    sections = {"model": {"path": model, "freeze": []}, "data": {"train": "-"}, "parallel": LAYOUTS[name]}
    recipe, backend = make_recipe({**sections, "backend": {"device": "cpu"}}), load_backend("torch_npu", "cpu")
    backend.collectives.start()
    job = prepare(recipe, backend)
    trainer = Trainer(job.model, job.objective, backend, recipe.optim, division=job.division)
    assert isinstance(trainer.passes, Pipeline)
    times: list[tuple[float, float]] = []

    @contextmanager
    def timed(action: Any) -> Iterator[None]:
        start = time.monotonic()
        yield
        times.append((start, time.monotonic()))

    trainer.passes.around = timed
    tokens = np.random.default_rng(0).integers(0, 250, (MICRO_BATCHES, TOKENS))
    batches = tuple(job.model.pack([Sample(ids, ids)]) for ids in tokens)
    steps = []
    for number in range(1 + STEPS):
        times.clear()
        trainer.step(Step(batches, ("-",), numbers=tuple(range(MICRO_BATCHES))), 1e-5, number)
        steps.append(backend.collectives.gather_objects(list(times)))
    backend.collectives.stop()
    virtual = job.division.virtual
    schedule = one_f_one_b(2, virtual, MICRO_BATCHES)
    waits = formula(2, virtual, MICRO_BATCHES)
    rows = [shares(schedule, ranks) for ranks in steps[1:]]  # in the first one much is loaded
    return {"formula": waits / (1 + waits), "schedule": schedule.idle, "steps": rows}


def shares(schedule: Schedule, ranks: Sequence[Sequence[tuple[float, float]]]) -> dict[str, float]:
    """Of a step, whose actions had these times on each rank: the idle share as played through, and as it was."""
    seconds = [[stop - start for start, stop in times] for times in ranks]
    busy = sum(
        took
        for rank, actions in enumerate(schedule.actions)
        for action, took in zip(actions, seconds[rank], strict=True)
        if isinstance(action, Compute)
    )
    begun, ended = min(times[0][0] for times in ranks), max(times[-1][1] for times in ranks)
    played = played_through(schedule, seconds)
    count = len(ranks)
    return {"played": 1 - busy / (count * played), "measured": 1 - busy / (count * (ended - begun)),
            "seconds": ended - begun}  # fmt: skip


def played_through(schedule: Schedule, seconds: Sequence[Sequence[float]]) -> float:
    """How long a schedule is whose passes take these times and whose messages none: an exchange ends where all that
    take part have come to it."""
    at, clock = [0] * len(seconds), [0.0] * len(seconds)

    def waits(rank: int) -> Exchange | None:
        actions = schedule.actions[rank]
        while at[rank] < len(actions):
            action = actions[at[rank]]
            if isinstance(action, Exchange):
                return action
            clock[rank] = clock[rank] + seconds[rank][at[rank]]
            at[rank] = at[rank] + 1
        return None

    while (first := waits(0)) is not None:
        second = waits(1)
        assert second is not None and len(first.sends) == len(second.receives), "two ranks meet at each exchange"
        clock[:] = [max(clock)] * 2
        at[:] = [place + 1 for place in at]
    waits(1)
    return max(clock)


def started(name: str, model: Path) -> dict[str, Any]:
    """`measure` on both ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--one", name, "--model", str(model)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def report(rows: dict[str, dict[str, Any]], command: str) -> str:
    """The page."""
    import torch
    from harness import processor_name

    lines = [
        "# How long stages wait",
        "",
        f"`OMP_NUM_THREADS=1 python {command}` on {processor_name()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; load {os.getloadavg()[0]:.1f} at the end. {STEPS} steps of {MICRO_BATCHES} "
        "micro-batches of text. The share of a step in which a rank computes nothing: by the formula; of the schedule, "
        "whose backward passes take twice as long as its forward passes; of the schedule played through with the "
        "times that the passes took; and measured. Of the last two, the step with the shortest time and the median.",
        "",
        "| layout | formula | schedule | with measured times | measured | median: with measured times | measured | "
        "seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        best = min(row["steps"], key=lambda one: one["seconds"])
        median = {key: statistics.median(one[key] for one in row["steps"]) for key in ("played", "measured")}
        cells = [row["formula"], row["schedule"], best["played"], best["measured"], *median.values()]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {best['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        row = measure(arguments.one, arguments.model)
        if os.environ["RANK"] == "0":
            print(json.dumps(row), flush=True)  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as directory:
        import tiny_run

        model = tiny_run.write_model(Path(directory) / "model", **SIZES)
        rows = {name: started(name, model) for name in LAYOUTS}
    page = report(rows, " ".join(["benchmarks/bubble.py", *sys.argv[1:]]))
    print(page)  # noqa: T201
    if arguments.write:
        (ROOT / "benchmarks" / "results" / "bubble.md").write_text(page)


if __name__ == "__main__":
    main()
