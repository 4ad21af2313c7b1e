"""Greedy answers by the engine on both backends against transformers' `generate`: a model of 100 million parameters.

Cases: one prompt; 16 of equal length; 16 whose prompts and answers have lengths as 1 to 8; and the same 16 arriving one
after the other, where transformers answers in static batches what has arrived. Every prompt has a picture. transformers
pads a batch on the left, and goes on until its longest answer is done; counted are the tokens that were wanted. Time is
processor time, on which arrivals happen as well: it is what one undisturbed core would need, also on a busy machine.

    python benchmarks/generate.py [--new 128] [--dtypes float32 bfloat16] [--cases one equal ...] [--write]

`--write` puts the table and what it ran on into benchmarks/results/generate.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from contest import END, IMAGE, START, model_config, write_model
from harness import Limits, Row, Seconds

BATCH, GRID = 16, (1, 16, 16)
CASES = ("one", "equal", "mixed", "arrivals")
CONTENDERS = ("transformers", "torch", "torch, not steady", "mindspore")
EVERY = 0.05  # of the time that one prompt alone takes: what lies between arrivals


class Clock:
    """Processor seconds; waiting costs none."""

    def __init__(self) -> None:
        self.start, self.wall, self.skipped = time.process_time(), time.perf_counter(), 0.0

    def now(self) -> float:
        """Seconds since the start."""
        return time.process_time() - self.start + self.skipped

    def taken(self) -> Seconds:
        """The same, with what has gone by on the wall."""
        return Seconds(self.now(), time.perf_counter() - self.wall)

    def wait_until(self, moment: float) -> None:
        """Let time pass in which nothing is done."""
        self.skipped += max(0.0, moment - self.now())


def questions(case: str, new: int) -> list[tuple[dict[str, Any], int]]:
    """Prompts with their pictures, and how many tokens each answer is to have."""
    rng = np.random.default_rng(5)
    count = 1 if case == "one" else BATCH
    shares = np.ones(count) if case in ("one", "equal") else rng.permutation(np.linspace(1 / 8, 1, count))
    found = []
    for share in shares:
        head = [START, *[IMAGE] * (GRID[1] * GRID[2] // 4), END]
        ids = np.concatenate([rng.integers(10, 32000, 4), head, rng.integers(10, 32000, int(300 * share))])
        pixels = rng.standard_normal((GRID[1] * GRID[2], 1176)).astype(np.float32)
        sample = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": np.array([GRID])}
        found.append((sample, max(1, int(new * share))))
    return found


# -- contenders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What it took until every answer had its first token, and from then until all were there."""

    first: Seconds
    rest: Seconds

    @property
    def whole(self) -> Seconds:
        """Both."""
        return Seconds(self.first.cpu + self.rest.cpu, self.first.wall + self.rest.wall)


Answer = Callable[[Sequence[tuple[dict[str, Any], int]], Sequence[float]], Answered]  # of questions and their arrivals


def duetvl_engine(directory: Path, dtype: str, backend: str, steady: bool) -> Answer:
    """The engine; requests are submitted when they arrive."""
    import duetvl

    model = duetvl.load_model(directory, backend=duetvl.load_backend(backend, device="cpu"), dtype=dtype)

    def answer(given: Sequence[tuple[dict[str, Any], int]], arrivals: Sequence[float]) -> Answered:
        engine = duetvl.Engine(model, cache_tokens=BATCH * 640, steady=steady, reuse=False)
        clock, left = Clock(), list(zip(given, arrivals, strict=True))
        begun, first = set(), Seconds(0.0, 0.0)
        while left or engine.busy:
            if not engine.busy:
                clock.wait_until(left[0][1])
            while left and left[0][1] <= clock.now():
                (sample, new), _ = left.pop(0)
                name = str(len(given) - len(left))
                one = duetvl.Request(duetvl.Sample(**sample), max_new_tokens=new, stop_ids=frozenset(), id=name)
                engine.submit(one)
            before = len(begun)
            begun |= {delta.id for delta in engine.step() if delta.token_ids}
            first = clock.taken() if before < len(begun) else first
        return Answered(first, clock.taken() - first)

    return answer


def transformers_generate(directory: Path, dtype: str) -> Answer:
    """Static batches of what has arrived."""
    import torch
    import transformers as hf

    kind = hf.Qwen2_5_VLForConditionalGeneration
    model = kind.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def answer(given: Sequence[tuple[dict[str, Any], int]], arrivals: Sequence[float]) -> Answered:
        clock, left = Clock(), list(zip(given, arrivals, strict=True))
        firsts: list[Seconds] = []

        def on_token(ids: Any, scores: Any, **others: Any) -> Any:
            if len(firsts) < batches:
                firsts.append(clock.taken())
            return torch.zeros(len(ids), dtype=torch.bool)

        batches = 0
        while left:
            clock.wait_until(left[0][1])
            batch = [one for one, at in left if at <= clock.now()]
            del left[: len(batch)]
            batches = batches + 1
            new = max(tokens for _, tokens in batch)
            fed = {key: torch.from_numpy(value) for key, value in left_padded([one for one, _ in batch]).items()}
            with torch.no_grad():
                model.generate(
                    **fed, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
                    stopping_criteria=[on_token],
                )  # fmt: skip
        return Answered(firsts[-1], clock.taken() - firsts[-1])

    return answer


def left_padded(samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A batch as transformers takes it."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids, mask = (np.zeros((len(samples), longest), np.int64) for _ in range(2))
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample["input_ids"]) :] = sample["input_ids"]
        mask[row, longest - len(sample["input_ids"]) :] = 1
    pixels, grids = (np.concatenate([s[key] for s in samples]) for key in ("pixel_values", "image_grid_thw"))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grids}


def contender(name: str, directory: Path, dtype: str) -> Answer:
    """The contender of this name."""
    if name == "transformers":
        return transformers_generate(directory, dtype)
    return duetvl_engine(directory, dtype, name.partition(",")[0], "not steady" not in name)


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(answer: Answer, cases: Sequence[str], new: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Tokens and seconds of each case, the least of some runs, after a short one."""
    answer([(sample, 2) for sample, _ in questions("one", new)], [0.0])
    alone = answer(questions("one", new), [0.0]).whole.cpu
    figures = {}
    for case in cases:
        asked = questions(case, new)
        arrivals = np.arange(len(asked)) * (EVERY * alone if case == "arrivals" else 0.0)
        runs = [answer(asked, arrivals.tolist()) for _ in range(repeats)]
        whole = harness.least(run.whole for run in runs)
        figures[case] = {
            "tokens": sum(tokens for _, tokens in asked),
            "seconds": whole.cpu,
            "wall": whole.wall,
            "first": vars(harness.least(run.first for run in runs)),
            "rest": vars(harness.least(run.rest for run in runs)),
        }
    return figures


def apart(directory: str, name: str, dtype: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One contender in a fresh process."""
    flags = ["--new", options.new, "--cases", *options.cases, "--repeats", options.repeats]
    flags += ["--inside", directory, name, dtype]
    return harness.apart(__file__, *flags, threads=options.threads)


def table(found: dict[tuple[str, str], dict[str, dict[str, float]]], options: argparse.Namespace) -> str:
    """Tokens a processor second, and their share of transformers' in the same dtype."""
    lines = [f"| | dtype | {' | '.join(options.cases)} |", "|---|---|" + "---|" * len(options.cases)]
    for (name, dtype), cases in found.items():
        cells = []
        for case in options.cases:
            rate = cases[case]["tokens"] / cases[case]["seconds"]
            base = found.get(("transformers", dtype), {}).get(case)
            ratio = "" if base is None else f" ({rate / (base['tokens'] / base['seconds']):.2f})"
            cells.append(f"{rate:.1f}{ratio}")
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    wall, busy = (sum(case[key] for cases in found.values() for case in cases.values()) for key in ("wall", "seconds"))
    lines += [
        "",
        "Tokens a processor second, prompts included in the time (share of transformers' in brackets). Every prompt",
        f"has a picture of 64 tokens and up to 300 of text; {options.new} new tokens, or an eighth of that and more.",
        f"The machine was busy: {wall:.0f} s went by on the clock for {busy:.0f} of the processor.",
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, Python {platform.python_version()}.",
        f"Command: `python benchmarks/generate.py {' '.join(sys.argv[1:])}`",
    ]
    return "\n".join(lines) + "\n"


# -- the common table -------------------------------------------------------------------------------------------------


REPEATS = 2
Figures = dict[str, dict[str, Any]]  # those of `measure`


def rows(quick: bool, limits: Limits) -> Iterator[Row]:
    """Prefill of equal prompts, until all answers have begun; and decoding the rest of them, alone and together."""
    new, length = 32 if quick else 128, len(prompts()[0]["input_ids"])

    def later(figures: Figures, case: str) -> Seconds:
        return Seconds(**figures[case]["rest"]) / (new - 1)

    pieces: dict[str, tuple[str, harness.Limit, Callable[[Figures], Seconds]]] = {
        "prefill": (
            f"{BATCH} prompts of {length} tokens", prefill_limit(quick, limits),
            lambda figures: Seconds(**figures["equal"]["first"]),
        ),
        "decode, one": (
            "a token of 1 sequence", decode_limit(quick, limits, 1), lambda figures: later(figures, "one"),
        ),
        "decode, many": (
            f"a token of each of {BATCH} sequences", decode_limit(quick, limits, BATCH),
            lambda figures: later(figures, "equal"),
        ),
    }  # fmt: skip
    taken = apart_each(quick, new)
    for name, (work, limit, seconds) in pieces.items():
        theirs, other = harness.fastest({one: seconds(taken[one]) for one in taken if one not in harness.SIDES})
        for side in harness.sides():
            work_here = f"{work}{'; the quick size' if quick else ''}; float32"
            own, command = seconds(taken[side]), harness.command_of(__file__)
            yield Row(name, side, work_here, own, theirs, other, limit, command)


def apart_each(quick: bool, new: int) -> dict[str, Figures]:
    """What ours and transformers take for one prompt and for many."""
    names = [*harness.sides(), *(["transformers"] if harness.installed("transformers", "torch") else [])]
    flags = ["--new", new, "--cases", "one", "equal", "--repeats", REPEATS]
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), quick)
        model = f"{directory}/model"
        return {name: harness.apart(__file__, *flags, "--inside", model, name, "float32") for name in names}


def prompts() -> list[dict[str, Any]]:
    """Those of the case "equal"."""
    return [sample for sample, _ in questions("equal", 1)]


def prefill_limit(quick: bool, limits: Limits) -> harness.Limit:
    """The operations of all prompts in one pass."""
    from duetvl.core.batch import Sample
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.flops import inference_flops
    from duetvl.models.qwen_vl.host import QwenVLFamily

    config = ModelConfig.from_dict(model_config(quick))
    batch = QwenVLFamily(config).pack([Sample(**prompt) for prompt in prompts()])
    return limits.of(flops=inference_flops(config, batch))


def decode_limit(quick: bool, limits: Limits, count: int) -> harness.Limit:
    """Every weight of the language model and every row of the cache read once, or the products with `count` rows."""
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.parameters import parameter_shapes

    config = ModelConfig.from_dict(model_config(quick))
    text, shapes = config.text, parameter_shapes(config)
    weights = sum(int(np.prod(shapes[path])) for path in shapes if not path.startswith("visual."))
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * count * len(prompts()[0]["input_ids"])
    return limits.of(flops=2 * weights * count, read=4 * (weights + cache))


def main() -> None:
    """Run every contender in a process of its own and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1, help="number of runs, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        directory, name, dtype = options.inside
        print(json.dumps(measure(contender(name, Path(directory), dtype), options.cases, options.new, options.repeats)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        runs = [(name, dtype) for dtype in options.dtypes for name in options.only]
        found = {(name, dtype): apart(directory + "/model", name, dtype, options) for name, dtype in runs}
    report = table(found, options)
    print(report)  # noqa: T201
    if options.write:
        harness.write_page(__file__, report)


if __name__ == "__main__":
    main()
