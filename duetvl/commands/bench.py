"""`duetvl bench infer`: how fast a model answers here, over lists of batch sizes, lengths and picture sizes.

Prompts are random tokens, all different, with one random picture each where a size is given; answers have exactly the
length that is asked for. A first small run of each shape is left out of the figures.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, NamedTuple

import numpy as np

from duetvl.api import Model
from duetvl.commands.session import Say, load, make_engine, open_for_answers
from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError
from duetvl.data.encode import Processor
from duetvl.inference.engine import Engine
from duetvl.inference.request import Request
from duetvl.storage.files import write_text

_MOST: Final = 10**7


class Case(NamedTuple):
    """One shape of a run. picture: (width, height), (0, 0) for none."""

    batch: int
    input_tokens: int
    output_tokens: int
    picture: tuple[int, int]


@dataclass(frozen=True)
class Figures:
    """What was measured: seconds since the requests were there of every token of each answer, in order."""

    case: Case
    image_tokens: int
    tokens_at: list[list[float]]
    seconds: float
    peak_memory: int

    @property
    def first(self) -> np.ndarray:
        """Seconds to each answer's first token."""
        return np.array([times[0] for times in self.tokens_at])

    @property
    def between(self) -> np.ndarray:
        """Seconds between an answer's tokens."""
        return np.concatenate([np.diff(times) for times in self.tokens_at])

    def row(self) -> dict[str, Any]:
        """The figures by name; times in milliseconds, memory in GiB. None where there is nothing of the kind."""
        case, between = self.case, self.between * 1000
        count = case.batch * case.output_tokens
        decoding = self.seconds - float(self.first.max())
        later = count - case.batch
        return {
            "batch": case.batch,
            "input_tokens": case.input_tokens,
            "output_tokens": case.output_tokens,
            "picture": "x".join(map(str, case.picture)) if case.picture[0] else None,
            "picture_tokens": self.image_tokens,
            "first_token_ms_p50": _rounded(np.percentile(self.first * 1000, 50)),
            "first_token_ms_p99": _rounded(np.percentile(self.first * 1000, 99)),
            "between_ms_p50": _rounded(np.percentile(between, 50)) if between.size else None,
            "between_ms_p99": _rounded(np.percentile(between, 99)) if between.size else None,
            "tokens_per_s": _rounded(count / self.seconds),
            "decode_tokens_per_s": _rounded(later / decoding) if later and decoding > 0 else None,
            "seconds": round(self.seconds, 4),
            "memory_gib": round(self.peak_memory / 2**30, 3),
        }


def _rounded(value: Any) -> float:
    return round(float(value), 3)


def bench(args: argparse.Namespace, out: Say, say: Say) -> int:
    """Measure every combination, and tell each when it is done."""
    cases = cases_of(args)
    for path in (args.json, args.csv):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.parent}; create it, or choose another place")
    opened = open_for_answers(args, lambda _: None)
    prompts = {case: make_prompts(opened.processor, case) for case in cases}  # what cannot be is told before weights
    model = load(args, opened, say)
    rows = []
    for number, case in enumerate(cases):
        figures = measure(model, args, case, prompts[case])
        rows.append(figures)
        for line in table([figures.row()], heading=number == 0):
            out(line)
    if args.json is not None:
        where = {"model": args.model, "backend": model.backend.name, "device": model.backend.device.name}
        content = {**where, "dtype": model.dtype, "runs": [figures.row() for figures in rows]}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    if args.csv is not None:
        write_text(args.csv, mindie_csv(rows))
    return 0


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All combinations of the lists. ConfigError."""
    if args.repeat < 1:
        raise ConfigError(f"--repeat {args.repeat}: expected at least 1")
    batches, inputs = numbers("--batch", args.batch), numbers("--input-tokens", args.input_tokens)
    outputs = numbers("--output-tokens", args.output_tokens)
    return [Case(*values) for values in product(batches, inputs, outputs, pictures(args.image_size))]


def numbers(name: str, text: str) -> list[int]:
    """`1,4,16`. ConfigError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= _MOST for word in words):
        raise ConfigError(f"{name} {text!r}: expected whole numbers from 1, separated by commas")
    return [int(word) for word in words]


def pictures(text: str) -> list[tuple[int, int]]:
    """`0,448,1280x720`. ConfigError."""
    found = []
    for word in (each.strip() for each in text.split(",")):
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", word)
        if match is None:
            raise ConfigError(f"--image-size {text!r}: expected sides in pixels, or WIDTHxHEIGHT, separated by commas")
        found.append((int(match[1]), int(match[2] or match[1])))
    return found


def make_prompts(processor: Processor, case: Case) -> list[Sample]:
    """Prompts of exactly the asked length. ConfigError where a picture alone has more tokens."""
    rng = np.random.default_rng(0)
    return [_prompt(processor, case, rng) for _ in range(case.batch)]


def _prompt(processor: Processor, case: Case, rng: np.random.Generator) -> Sample:
    width, height = case.picture
    parts: list[dict[str, Any]] = []
    if width and height:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        parts.append({"type": "image", "image": pixels})
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "."}]}
    sample = processor([message], add_generation_prompt=True)
    lacking = case.input_tokens - len(sample)
    if lacking < 0:
        picture = f" with a picture of {width}x{height}" if width else ""
        text = f"--input-tokens {case.input_tokens}: the shortest prompt{picture} has {len(sample)} tokens"
        raise ConfigError(text)
    place = int(np.flatnonzero(sample.input_ids == processor.control.turn_end)[-1])  # behind the picture
    words = rng.integers(0, min(_first_special(processor), processor.family.vocabulary), lacking)
    ids = np.concatenate([sample.input_ids[:place], words, sample.input_ids[place:]])
    return Sample(
        input_ids=ids.astype(sample.input_ids.dtype),
        pixel_values=sample.pixel_values,
        image_grid_thw=sample.image_grid_thw,
        video_grid_thw=sample.video_grid_thw,
    )


def _first_special(processor: Processor) -> int:
    """Ids below it are words."""
    control = processor.control
    ends = control.turn_end if control.end_of_text is None else min(control.turn_end, control.end_of_text)
    return min(*processor.family.special, control.turn_start, ends)


def measure(model: Model, args: argparse.Namespace, case: Case, prompts: Sequence[Sample]) -> Figures:
    """The fastest of the repeated runs."""
    most = max(len(prompt) for prompt in prompts) + case.output_tokens + 1
    size = model.backend.kv_cache.block_size
    engine = make_engine(
        model,
        args,
        cache_tokens=case.batch * -(-most // size) * size,
        max_sequences=case.batch,
        media_tokens=max(16384, case.batch * most),
        reuse=False,
    )
    _run(model, engine, case._replace(output_tokens=min(case.output_tokens, 2)), prompts)
    return min((_run(model, engine, case, prompts) for _ in range(args.repeat)), key=lambda one: one.seconds)


def _run(model: Model, engine: Engine, case: Case, prompts: Sequence[Sample]) -> Figures:
    tokens_at: dict[str, list[float]] = {}
    model.backend.device.synchronize()
    start = time.perf_counter()
    for prompt in prompts:
        request = Request(
            prompt, max_new_tokens=case.output_tokens, min_new_tokens=case.output_tokens, stop_ids=frozenset()
        )
        tokens_at[engine.submit(request)] = []
    while engine.busy:
        for delta in engine.step():
            if delta.completion is not None and delta.completion.error is not None:
                raise delta.completion.error
            tokens_at[delta.id] += [time.perf_counter() - start] * len(delta.token_ids)
    seconds = time.perf_counter() - start
    merged = model.family.geometry.merge**2
    image_tokens = int(prompts[0].image_grid_thw.prod(axis=1).sum()) // merged
    return Figures(case, image_tokens, list(tokens_at.values()), seconds, model.backend.device.peak_memory())


# -- how it is told ---------------------------------------------------------------------------------------------------

_COLUMNS: Final = {
    "batch": "batch", "input_tokens": "in", "output_tokens": "out", "picture": "picture",
    "first_token_ms_p50": "first ms p50", "first_token_ms_p99": "p99", "between_ms_p50": "between ms p50",
    "between_ms_p99": "p99", "tokens_per_s": "tokens/s", "decode_tokens_per_s": "decode tokens/s",
    "memory_gib": "memory GiB",
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]], *, heading: bool = True) -> Iterator[str]:
    """Lines of fixed columns."""
    widths = [max(len(title), 9) for title in _COLUMNS.values()]
    if heading:
        yield "  ".join(title.rjust(width) for title, width in zip(_COLUMNS.values(), widths, strict=True))
    for row in rows:
        values = ("-" if row[name] is None else str(row[name]) for name in _COLUMNS)
        yield "  ".join(value.rjust(width) for value, width in zip(values, widths, strict=True))


def mindie_csv(runs: Sequence[Figures]) -> str:
    """The figures under the column names of MindIE's benchmark.csv; times in milliseconds."""
    text = io.StringIO()
    names = ["batch_size", "input_seq_len", "output_seq_len", "e2e_time(ms)", "prefill_time(ms)",
             "decoder_token_time(ms)", "prefill_count", "prefill_token_times", "decode_token_times",
             "prefill_average_time(ms)"]  # fmt: skip
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        first, between = run.first * 1000, run.between * 1000
        values = (
            run.case.batch, run.case.input_tokens, run.case.output_tokens, _rounded(run.seconds * 1000),
            _rounded(first.max()), _rounded(between.mean()) if between.size else "", run.case.batch,
            " ".join(str(_rounded(value)) for value in first), " ".join(str(_rounded(value)) for value in between),
            _rounded(first.mean()),
        )  # fmt: skip
        writer.writerow(dict(zip(names, values, strict=True)))
    return text.getvalue()
