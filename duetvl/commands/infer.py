"""`duetvl infer`: answers to a prompt, to records, to the pictures of a directory."""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import numpy as np

from duetvl.commands.asks import Ask, asks_of
from duetvl.commands.session import Opened, Say, Way, check_way, guides_of, load, make_engine, open_for_answers, way_of
from duetvl.core.errors import ConfigError
from duetvl.inference.answering import ahead, answers
from duetvl.inference.guided import Guides
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.adapters import open_adapter_for
from duetvl.storage.answers_file import AnswersFile, alone
from duetvl.training.watching.progress import Progress

FAILED: Final = 1


def infer(args: argparse.Namespace, out: Say, say: Say) -> int:
    """Answer what the options ask; 1 where some of it failed. `out` takes the answer, `say` all else."""
    if args.from_mindspeed is not None:
        from duetvl.commands.mindspeed import apply

        for line in apply(args):
            say(line)
    if args.model is None:
        raise ConfigError("no model is given: duetvl infer MODEL --prompt TEXT")
    check_way(args)
    asks = asks_of(args)
    if args.output is None and (args.input is not None or args.logprobs is not None):
        raise ConfigError("-o OUT.jsonl is missing: answers to --input, and --logprobs, are written to a file")
    opened = open_for_answers(args, say)
    way = way_of(args, opened.defaults)
    guides = guides_of(args, opened, way)
    if args.output is None:
        _answer_one(args, opened, way, guides, asks[0], out, say)
        return 0
    with alone(args.output):
        return _answer_all(args, opened, way, guides, asks, say)


def _answer_one(
    args: argparse.Namespace, opened: Opened, way: Way, guides: Guides | None, ask: Ask, out: Say, say: Say
) -> None:
    """One answer, shown as it grows."""
    request = way.request(ask.sample(opened.processor), guide=guides)  # a bad picture is told before weights are read
    model = load(args, opened, say)
    special = opened.source.family.special
    media = int(np.isin(request.prompt.input_ids, (special.image, special.video)).sum())
    rows = min(len(request.prompt) + way.max_new_tokens, model.context) + model.backend.kv_cache.block_size
    engine = make_engine(model, args, cache_tokens=rows, media_tokens=max(media, 1), max_sequences=1, reuse=False)
    engine.submit(request)
    while engine.busy:
        for delta in engine.step():
            out(delta.text or "")
            if delta.completion is not None and delta.completion.error is not None:
                raise delta.completion.error
    out("\n")


def _answer_all(args: argparse.Namespace, opened: Opened, way: Way, guides: Guides | None, asks: Any, say: Say) -> int:
    """All answers into a file."""
    name = way_name(args, opened.source, way)
    file = AnswersFile(args.output, [ask.key(name) for ask in asks])
    missing = list(file.missing())
    distinct = len(set(file.keys))
    if len(missing) < distinct:
        say(f"-o {args.output}: {distinct - len(missing)} of {distinct} answers already exist")
    if missing:
        engine = make_engine(load(args, opened, say), args)
        request = partial(way.request, guide=guides)
        done = distinct - len(missing)
        progress = Progress(distinct, done=done, unit="answer", stream=sys.stderr, every=max(1, distinct // 20))
        with closing(progress), file.adding() as add:
            prepared = ahead(missing, lambda number: asks[number].sample(opened.processor))
            for number, row in answers(engine, prepared, request, opened.processor.tokenizer):
                add(file.keys[number], row)
                done += 1
                progress.step({"step": done})
    file.finish(ask.id for ask in asks)
    failed = sum("error" in file.known[key] for key in file.keys)
    tokens = sum(file.known[key].get("completion_tokens", 0) for key in file.keys)
    say(
        f"{args.output}: {len(asks)} answers, {tokens} tokens"
        + (f"; {failed} failed, see their error" if failed else "")
    )
    return FAILED if failed else 0


def way_name(args: argparse.Namespace, source: ModelDirectory, way: Way) -> str:
    """What an answer depends on besides what is asked, as a text."""
    adapter = source.adapter if args.adapter is None else open_adapter_for(source.config, args.adapter)
    paths = [] if adapter is None else sorted(adapter.tensors)
    parts = {
        "weights": source.identity()["fingerprint"],
        "adapter": [zlib.crc32(adapter.read(path)[0].tobytes()) for path in paths] if adapter else None,
        "way": {**asdict(way), "stop_ids": sorted(way.stop_ids)},
        "guided": [args.json_schema and args.json_schema.read_text(), args.regex, args.choice],
        "media": [args.min_pixels, args.max_pixels, args.video_preset, args.fps, args.max_frames],
        "dtype": args.dtype,
    }
    return json.dumps(parts, sort_keys=True, default=str)
