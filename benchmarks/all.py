"""One table of what costs time, beside the fastest of the others and beside the machine's own limits.

    python benchmarks/all.py --quick                       # some minutes on two quiet cores; refreshes README.md
    python benchmarks/all.py                               # the sizes of the benchmarks' own pages
    python benchmarks/all.py --quick --only train_step     # some of it, printed alone
    python benchmarks/all.py --quick --compare [FILE]      # what got slower since FILE (results/all.json)?
    python benchmarks/all.py --read benchmarks/results/all.json   # README.md again, of figures that are there

Everything runs on one thread. README.md and results/all.json are written by a whole run that compares nothing;
`--output FILE` writes the figures of any run elsewhere. Seconds of two runs are not compared: machines differ, and so
does the same one from hour to hour. Compared are the ratios to the other side and to the limit, both measured in the
same run. A row is slower where every ratio that both runs have grew by more than 10%; it is measured once more before
that is said. The status is 1 where a row is slower, a benchmark failed, or nothing could be compared.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, Limits, Row, Seconds

BENCHMARKS = ("train_step", "lora_step", "dpo_step", "generate", "encode", "convert", "load_save", "eval")
SLOWER = 1.10
MOST_SECONDS = 3600  # of one benchmark; one that takes longer has failed
ROW, LIMITS = "row ", "limits "
PAGE, FILE = Path(__file__).parent / "README.md", RESULTS / "all.json"
TABLE, PAGES = "made by all.py", "pages"  # parts of README.md between comments of these names
ON_GPU = {  # rows of results/gpu.md, which benchmarks/gpu.py writes
    "training step": "sft | useful operations",
    "LoRA step": "lora | useful operations",
    "decode, one": "decode | batch 1",
    "decode, many": "decode | batch 16",
}


@dataclass(frozen=True)
class Report:
    """The rows of a run, what it ran on, and the benchmarks that failed with what they said last."""

    about: Mapping[str, Any]
    rows: Sequence[Row]
    failed: Mapping[str, str]

    def write(self, path: Path) -> None:
        """As JSON, a row a line."""
        rows = ",\n".join(f"  {json.dumps(row.to_json(), ensure_ascii=False)}" for row in self.rows)
        head = json.dumps({"about": self.about, "failed": self.failed}, indent=1, ensure_ascii=False)
        path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote."""
        read = json.loads(path.read_text(encoding="utf-8"))
        return cls(read["about"], [Row.from_json(line) for line in read["rows"]], read["failed"])

    @property
    def title(self) -> str:
        """When and where."""
        return f"{self.about['date']}, {self.about['machine']}, {self.load}"

    @property
    def load(self) -> str:
        """Processes that wanted a core, in words."""
        first, last = self.about["load"]
        return f"load {first:.1f} at the start, {last:.1f} at the end"

    @property
    def busy(self) -> bool:
        """Whether others wanted the cores too: clocks on the wall say little then."""
        return max(self.about["load"]) > self.about["cores"]


# -- running ----------------------------------------------------------------------------------------------------------


def inside(name: str, quick: bool) -> None:
    """Print the limits of the machine and the rows of one benchmark, as they come."""
    limits = Limits.measure()
    harness.say(LIMITS + json.dumps(vars(limits)))
    for row in import_module(name).rows(quick, limits):
        harness.say(ROW + json.dumps(row.to_json()))


def run(name: str, quick: bool) -> tuple[list[Row], list[Limits], str]:
    """The rows of one benchmark, in a process group of its own, with the limits it saw; and why it failed, or ""."""
    command = [sys.executable, __file__, "--inside", name, *(["--quick"] if quick else [])]
    path = os.pathsep.join(filter(None, (str(harness.ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOG_v": "4", "PYTHONPATH": path}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=MOST_SECONDS)
        problem = "" if process.returncode == 0 else (err.strip().splitlines() or ["no word"])[-1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        problem = f"no end within {MOST_SECONDS} s"
    return *said(out), problem


def said(out: str) -> tuple[list[Row], list[Limits]]:
    """What `inside` has printed."""
    lines = out.splitlines()
    rows = [Row.from_json(json.loads(line[len(ROW) :])) for line in lines if line.startswith(ROW)]
    return rows, [Limits(**json.loads(line[len(LIMITS) :])) for line in lines if line.startswith(LIMITS)]


def measure(names: Sequence[str], quick: bool) -> Report:
    """All of these in turn; one that fails leaves the others."""
    rows, limits, failed, begun, load = [], [], {}, time.monotonic(), os.getloadavg()[0]
    processors = harness.seconds_of_children()
    for name in names:
        measured, seen, problem = run(name, quick)
        rows, limits = rows + measured, limits + seen
        if problem:
            failed[name] = problem
        for row in measured:
            harness.say(f"{row.name}, {row.side}: {cell(row.ours)} {ratios_of(row)}")
        harness.say(f"{name}: {problem or 'done'} ({time.monotonic() - begun:.0f} s)")
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{harness.processor_name()}, {os.cpu_count()} cores",
        "cores": os.cpu_count(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "versions": f"Python {platform.python_version()}, "
        + harness.versions("numpy", "torch", "mindspore", "transformers", "peft", "trl"),
        "quick": quick,
        "seconds": round(time.monotonic() - begun),
        "processor seconds": round(harness.seconds_of_children() - processors),
        "gflops": round(max((each.flops for each in limits), default=0.0) / 1e9, 1),
        "gigabytes a second": round(max((each.bandwidth for each in limits), default=0.0) / 1e9, 1),
    }
    return Report(about, rows, failed)


# -- the page ---------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """The rows as markdown: a line for each piece of work, our frameworks beside each other."""
    about = report.about
    lines = [
        f"{about['date']}; {about['machine']}, one thread; {report.load}. {about['versions']}. The machine, "
        f"measured in the same run: {about['gflops']} GFLOP/s in float32 products, {about['gigabytes a second']} GB/s "
        f"read from memory. Command: `python benchmarks/all.py{' --quick' if about['quick'] else ''}` "
        f"({about['seconds']} s, {about['processor seconds']} of a processor).",
        "",
        "| | torch CPU | MindSpore CPU | GPU | the fastest other side | of it: torch, MindSpore | the limit "
        "| of it: torch, MindSpore |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_name: dict[str, list[Row]] = {}
    for row in report.rows:
        by_name.setdefault(row.name, []).append(row)
    lines += [line_of(rows) for rows in by_name.values()]
    works = {row.name: row for row in report.rows}.values()
    lines += ["", *(f"- {row.name}: {row.work}. `{row.command}`" for row in works)]
    lines += [f"- failed: {name}: {problem}" for name, problem in report.failed.items()]
    return "\n".join(lines) + "\n"


def line_of(rows: Sequence[Row]) -> str:
    """One piece of work."""
    by_side, first = {row.side: row for row in rows}, rows[0]
    if "host" in by_side:
        sides = [f"{cell(first.ours)}, without a framework", "the same"]
    else:
        sides = [cell(by_side[side].ours) if side in by_side else "" for side in harness.SIDES]
    theirs = f"{cell(first.theirs)}: {first.other}" if first.theirs else "none installed"
    limit = f"{duration(first.limit.seconds)}: {first.limit.kind}" if first.limit else ""
    mark = " (wall)" if first.clock == "wall" else ""
    ratios = [
        ", ".join(f"{row.ratios[what]:.2f}" for row in rows if what in row.ratios) + mark
        for what in ("the other side", "the limit")
    ]
    cells = [first.name, *sides, on_gpu(first.name), theirs, ratios[0], limit, ratios[1]]
    return f"| {' | '.join(cells)} |"


def on_gpu(name: str) -> str:
    """The share of a GPU's limit, where results/gpu.md tells it."""
    page, row = RESULTS / "gpu.md", ON_GPU.get(name)
    if row is None or not page.exists():
        return "not measured"
    share = re.search(rf"^\| {re.escape(row)} \| .*?(\d+)% of the (matrix products|bandwidth)", page.read_text(), re.M)
    return f"7B: [{share[1]}% of the {share[2]}](results/gpu.md)" if share else "not measured"


def cell(seconds: Seconds) -> str:
    """Of the processor and of the clock on the wall."""
    return f"{duration(seconds.cpu)} / {duration(seconds.wall)}"


def duration(seconds: float) -> str:
    """With three digits."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def ratios_of(row: Row) -> str:
    """In words."""
    return ", ".join(f"{ratio:.2f} of {what}" for what, ratio in row.ratios.items())


def pages() -> str:
    """Every other benchmark, by the first line of what it says of itself."""
    lines = ["| file | what it measures | page |", "|---|---|---|"]
    for file in sorted(PAGE.parent.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text and file.name != Path(__file__).name:
            first = first_sentence(ast.get_docstring(ast.parse(text)) or "")
            page = f"results/{file.stem}.md"
            link = f"[{page}]({page})" if (PAGE.parent / page).exists() else ""
            lines.append(f"| [{file.name}]({file.name}) | {first} | {link} |")
    return "\n".join(lines) + "\n"


def first_sentence(doc: str) -> str:
    """Without the command that may follow it."""
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].partition(": `python ")[0].rstrip(".")


def put(page: str, part: str, text: str) -> str:
    """A page with one of its parts replaced."""
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no part between {begin.strip()} and {end.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def refresh(report: Report) -> None:
    """Put the table into README.md and the figures beside it."""
    report.write(FILE)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(put(put(page, TABLE, table(report)), PAGES, pages()), encoding="utf-8")


# -- comparing --------------------------------------------------------------------------------------------------------


def growth(old: Row, new: Row) -> dict[str, float]:
    """How much each ratio grew that both rows have."""
    return {what: ratio / old.ratios[what] for what, ratio in new.ratios.items() if what in old.ratios}


def is_slower(old: Row, new: Row) -> bool:
    """Whether every ratio grew: where only one did, what it is measured against got faster."""
    grown = growth(old, new)
    return bool(grown) and min(grown.values()) > SLOWER


def pairs(old: Report, new: Report) -> Iterator[tuple[Row | None, Row | None]]:
    """Rows of the same work on the same side; None where one of the two has none."""
    earlier = {(row.name, row.side): row for row in old.rows}
    later = {(row.name, row.side): row for row in new.rows}
    for key in {**earlier, **later}:
        yield earlier.get(key), later.get(key)


def compare(old: Report, new: Report) -> tuple[list[str], set[str]]:
    """What to say of every row, and the benchmarks with a slower one. ValueError where nothing can be compared."""
    lines, slower, count = [f"then: {old.title}", f"now:  {new.title}"], set(), 0
    alone: dict[str, list[str]] = {"then": [], "now": []}
    for before, after in pairs(old, new):
        row = after or before
        assert row is not None
        name = f"{row.name}, {row.side}"
        if before is None or after is None:
            alone["now" if before is None else "then"].append(name)
        elif before.work != after.work or not growth(before, after):
            lines.append(f"{name}: other work, or no ratio in common; not compared")
        elif after.clock == "wall" and (old.busy or new.busy):
            lines.append(f"{name}: by the clock on the wall of a busy machine, not compared")
        else:
            count = count + 1
            bad = is_slower(before, after)
            changes = [f"{before.ratios[w]:.2f} to {after.ratios[w]:.2f} of {w}" for w in growth(before, after)]
            lines.append(f"{name}: {', '.join(changes)}{'  SLOWER' if bad else ''}")
            slower |= {after.command.split("/")[-1].removesuffix(".py")} if bad else set()
    lines += [f"only {when}, not compared: {'; '.join(names)}" for when, names in alone.items() if names]
    if not count:
        raise ValueError("nothing could be compared: no row of both runs is of the same work (quick and whole differ)")
    return [*lines, f"compared {count} rows, {len(slower)} benchmarks slower by more than {SLOWER - 1:.0%}"], slower


def better(first: Report, second: Report) -> Report:
    """The first report, each row as it was measured the better time."""
    again = {(row.name, row.side): row for row in second.rows}

    def least(row: Row) -> Row:
        other = again.get((row.name, row.side), row)
        return min(row, other, key=lambda each: max(each.ratios.values(), default=0.0))

    return replace(first, rows=[least(row) for row in first.rows])


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure or read, write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer repetitions")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--compare", nargs="?", type=Path, const=FILE, metavar="FILE", help="with an earlier run")
    parser.add_argument("--read", type=Path, metavar="FILE", help="take the figures of a run instead of measuring")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--inside", choices=BENCHMARKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options.quick)
        return 0
    earlier = Report.read(options.compare) if options.compare else None
    report = Report.read(options.read) if options.read else measure(options.only or BENCHMARKS, options.quick)
    slower = set() if earlier is None else against(earlier, report, again=options.read is None)
    if options.output:
        report.write(options.output)
    if earlier is None and not options.only and not options.output:
        refresh(report)
    elif earlier is None:
        harness.say(table(report))
    return 1 if slower or report.failed else 0


def against(earlier: Report, report: Report, again: bool) -> set[str]:
    """Say how two runs compare; the benchmarks that are slower, and still are when they are measured `again`."""
    try:
        lines, slower = compare(earlier, report)
        if slower and again:
            harness.say(f"measured again, as they look slower: {', '.join(sorted(slower))}")
            report = better(report, measure(sorted(slower), report.about["quick"]))
            lines, slower = compare(earlier, report)
    except ValueError as error:
        harness.say(str(error))
        return {"nothing"}
    harness.say("\n".join(lines))
    return slower


if __name__ == "__main__":
    sys.exit(main())
