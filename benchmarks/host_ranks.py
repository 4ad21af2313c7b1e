"""Host work of a step where many ranks share it, on one node: processor seconds of each against one process's.

    python benchmarks/host_ranks.py [--ranks 8] [--steps 6] [--write]

A step is 64 conversations about a JPEG of 448 x 448 each, made by the threads of `StepLoader` without workers, as in
training; nothing is computed with it. Every layout makes the same steps, in processes of its own that have the node to
themselves. Seconds are those of the processors, of all threads of a rank, from the first draft to the last batch that
has arrived; the pixels in it are bytes, which a model widens where it uses them. A first step, in which modules are
imported, is not counted. `--write` puts the table and what it ran on into benchmarks/results/host_ranks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data"), str(ROOT / "benchmarks")]

from encode import QUESTION, make_encoder, make_model_directory, make_pictures  # noqa: E402
from harness import processor_name  # noqa: E402
from meeting import gather_by_files  # noqa: E402

from duetvl.core.mesh import Mesh  # noqa: E402
from duetvl.data.loading.ahead import StepLoader  # noqa: E402
from duetvl.data.loading.loader import BatchMaker, Packing  # noqa: E402
from duetvl.data.loading.order import Mixture, RecordCursor  # noqa: E402
from duetvl.data.loading.peers import Peers  # noqa: E402
from duetvl.data.loading.samples import SampleMaker  # noqa: E402
from duetvl.data.loading.workers import InlinePool  # noqa: E402
from duetvl.data.sources.catalog import Records  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "host_ranks.md"
BATCH = 64
PACK_TOKENS = 2048


def main() -> None:
    """Measure, print, write; with --rank, be one of the processes."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=6)
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--dp", type=int, default=1, help=argparse.SUPPRESS)
    arguments.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.rank is not None:
        be_rank(options.place, options.rank, Mesh(dp=options.dp, tp=options.ranks // options.dp), options.steps)
        return
    report = measure(options.ranks, options.steps)
    print(report)  # noqa: T201
    if options.write:
        import os
        import platform

        command = " ".join(["benchmarks/host_ranks.py", *sys.argv[1:]])
        machine = f"{processor_name()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
        load = f"load {os.getloadavg()[0]:.1f} at the end"
        RESULTS.write_text(
            f"# Host work of many ranks\n\n`OMP_NUM_THREADS=1 python {command}` on {machine}; {load}.\n\n{report}\n"
        )


def measure(ranks: int, steps: int) -> str:
    """The table: what all ranks take together, and the one that takes most."""
    layouts = [Mesh(), *(Mesh(dp=dp, tp=ranks // dp) for dp in range(ranks, 0, -1) if ranks % dp == 0)]
    lines = [
        f"{BATCH} pictures a step, {steps} steps; processor seconds a step.",
        "",
        "| | all ranks | of one process | the busiest rank | of one process | samples, packs |",
        "|---|---|---|---|---|---|",
    ]
    alone = 0.0
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model_directory(directory)
        make_data(directory)
        for mesh in layouts:
            seconds, made = run(directory, mesh, steps)
            alone = alone or sum(seconds)
            name = f"dp {mesh.dp}, tp {mesh.tp}" if mesh.size > 1 else "one process"
            total, most = sum(seconds), max(seconds)
            lines.append(f"| {name} | {total:.2f} | {total / alone:.2f} | {most:.3f} | {most / alone:.3f} | {made} |")
    return "\n".join(lines)


def make_data(directory: Path) -> None:
    """Conversations about 32 pictures."""
    names = [path.name for path in make_pictures(directory, [(448, 448)] * 32)]
    lines = []
    for number in range(BATCH * 4):
        answer = f"{number}: squares of many colours, blurred into each other; no object can be made out. " * 2
        turns = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": [names[number % len(names)]]}))
    (directory / "chat.jsonl").write_text("\n".join(lines) + "\n")


def run(directory: Path, mesh: Mesh, steps: int) -> tuple[list[float], str]:
    """Seconds a step of each rank, and how much each step held."""
    place = directory / f"dp{mesh.dp}tp{mesh.tp}"
    place.mkdir()
    command = [sys.executable, __file__, f"--ranks={mesh.size}", f"--dp={mesh.dp}", f"--steps={steps}"]
    command += [f"--place={place}"]
    processes = [subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE) for rank in range(mesh.size)]
    found = [json.loads(process.communicate()[0]) for process in processes]
    assert len({said["made"] for said in found}) == 1, found
    return [said["seconds"] for said in found], found[0]["made"]


def be_rank(place: Path, rank: int, mesh: Mesh, steps: int) -> None:
    """Make the steps, and print what they took."""
    records = Records([place.parent / "chat.jsonl"])
    encoder = make_encoder(place.parent)
    peers = Peers.meet(mesh, rank, "127.0.0.1", partial(gather_by_files, place, rank, mesh.size))
    maker = BatchMaker(InlinePool(SampleMaker(records.files, encoder)), encoder, Packing(PACK_TOKENS), peers=peers)
    cursor = RecordCursor(records, Mixture(records.counts, seed=0))
    maker.begin(cursor, BATCH).finish()
    begun = time.process_time()
    loader = StepLoader(maker, cursor, BATCH, steps=steps)
    last = [loader.next_step() for _ in range(steps)][-1]
    seconds = (time.process_time() - begun) / steps
    loader.close()
    peers.close()
    print(json.dumps({"seconds": seconds, "made": f"{len(last.sample_ids)}, {last.totals.packs}"}))  # noqa: T201


if __name__ == "__main__":
    main()
