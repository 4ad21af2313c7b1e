"""`duetvl eval`: a model's answers to the questions of a benchmark, their scores, and two runs compared."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from duetvl.commands.infer import way_name
from duetvl.commands.options import PRESETS
from duetvl.commands.processes import end_with_parent, run_processes
from duetvl.commands.session import Opened, Say, Way, check_way, guides_of, load, make_engine, open_for_answers, way_of
from duetvl.core.backend import choose_backend
from duetvl.core.errors import ConfigError, DataError
from duetvl.evaluation.answers import ANSWERS, Asked, RunAnswers, data_md5, open_run
from duetvl.evaluation.endpoint import open_endpoint, server_answers
from duetvl.evaluation.profiles import Profile, default_profile, find_profile
from duetvl.evaluation.run import Answers, Running, engine_answers, keep
from duetvl.evaluation.tasks.registry import find_task
from duetvl.inference.defaults import Defaults
from duetvl.inference.sampling import Sampling
from duetvl.storage.answers_file import Row, alone
from duetvl.training.watching.progress import Progress

FAILED: Final = 1
CONCURRENCY: Final = 16  # questions that a server has at once
Ask = Callable[[list[int]], Answers]


@dataclass(frozen=True)
class Answerer:
    """Who answers. settings: what answers depend on; more: what else is to be known. `ask`, with what is asked, gives
    the answers to questions by their numbers."""

    family: str
    settings: Mapping[str, Any]
    more: Mapping[str, Any]
    ask: Callable[[Asked], Ask]


def evaluate(args: argparse.Namespace, out: Say, say: Say) -> int:
    """Do what the options ask; 1 where questions have no answer. `out` takes the report, `say` all else."""
    if args.compare is not None:
        from duetvl.commands.eval_report import compare

        return compare(args, out, say)
    if args.from_mindspeed is not None:
        from duetvl.commands.mindspeed import apply_evaluation

        for line in apply_evaluation(args):
            say(line)
    if args.output is None:
        raise ConfigError("-o DIR is missing: the directory of this run")
    if not args.rescore:
        _answer(args, say)
    if args.process is not None:
        return 0
    from duetvl.commands.eval_report import report

    return FAILED if report(args, out, say) else 0


def _answer(args: argparse.Namespace, say: Say) -> None:
    """Ask what has no answer yet."""
    _check(args)
    task = find_task(args.task)
    source = _server(args) if args.server else _model(args, say)
    profile = profile_of(args, source.family)
    questions = task.questions(args.data, profile)
    count = len(questions) if args.limit is None else min(args.limit, len(questions))
    if not count:
        raise DataError(f"{args.data}: has no questions")
    settings = {"task": task.name, "profile": profile.name, **pixels_of(profile), **source.settings}
    settings["md5"] = data_md5(args.data)
    asked = Asked(task, profile, questions, count, json.dumps(settings, sort_keys=True, default=str))
    if args.process is not None:
        if args.team is None:  # else the process that started these ranks ends them
            end_with_parent()
        with alone(args.output / f"{ANSWERS}.{args.process}"):
            _keep(args, RunAnswers(asked, args.output), source, args.process, args.copies)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    with alone(args.output / ANSWERS):
        task_file = Path(args.task).absolute() if Path(args.task).is_file() else args.task
        more = {"task": task_file, "data": args.data.absolute(), "questions": count, **source.more}
        open_run(args.output, settings, more)
        run = RunAnswers(asked, args.output)
        _answer_all(args, run, source, say)
        run.finish()


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for what makes no sense, before anything is read."""
    for name in ("task", "data"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} is missing: duetvl eval MODEL --task NAME --data PATH -o DIR")
    if args.model is None and args.server is None:
        raise ConfigError("no model is given: duetvl eval MODEL --task NAME --data PATH -o DIR, or --server URL")
    for name in ("limit", "concurrency"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: expected at least 1")
    if args.server is not None and (args.nproc or 1) > 1:
        raise ConfigError("--nproc does not apply to --server; use --concurrency")
    check_way(args)


def profile_of(args: argparse.Namespace, family: str) -> Profile:
    """The profile of the options, with the pixels, frames and tokens that they say instead. ConfigError."""
    profile = default_profile(family) if args.profile is None else find_profile(args.profile)
    pixels = {name: value for name in ("min_pixels", "max_pixels") if (value := getattr(args, name)) is not None}
    frames = {name: value for name in ("fps", "max_frames") if (value := getattr(args, name)) is not None}
    if args.video_preset is not None:
        frames = {"fps": PRESETS[args.video_preset], **frames}
    low, high = (pixels.get(name, getattr(profile.pixels, name)) for name in ("min_pixels", "max_pixels"))
    if low is not None and high is not None and not 0 < low <= high:
        raise ConfigError(
            f"pictures of {low} to {high} pixels are not a valid range; give --min-pixels and --max-pixels"
        )
    return replace(
        profile,
        pixels=profile.pixels._replace(**pixels),
        video=replace(profile.video, **frames),
        max_new_tokens=args.max_new_tokens or profile.max_new_tokens,
    )


def pixels_of(profile: Profile) -> dict[str, Any]:
    """The bounds of pictures and videos, as run.json has them; None leaves one to the model's own."""
    video = profile.video
    return {
        "min_pixels": profile.pixels.min_pixels,
        "max_pixels": profile.pixels.max_pixels,
        "video": {
            "fps": video.fps, "max_frames": video.max_frames, "total_pixels": video.total_pixels,
            "min_pixels": video.wish.min_pixels, "max_pixels": video.wish.max_pixels,
        },
        "max_new_tokens": profile.max_new_tokens,
    }  # fmt: skip


# -- who answers -----------------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace, say: Say) -> Answerer:
    """A model in this process; its weights are read when there is something to answer."""
    opened = open_for_answers(args, lambda text: None)  # its own sampling is not what benchmarks are answered with
    family = opened.source.config.model_type
    args.max_new_tokens = profile_of(args, family).max_new_tokens
    way = way_of(args, Defaults(stop_ids=opened.defaults.stop_ids))
    how = json.loads(way_name(args, opened.source, way))
    backend = choose_backend(args.backend or "auto", args.device or "auto")
    settings = {
        "backend": backend,
        **{name: how[name] for name in ("weights", "adapter", "dtype")},
        "guided": how["guided"] if any(how["guided"]) else None,
        **{name: value for name, value in how["way"].items() if name != "max_new_tokens"},
    }
    more = {"model": args.model, "device": args.device or "auto"}
    return Answerer(family, settings, more, partial(_engine_asker, args, opened, way, say))


def _engine_asker(args: argparse.Namespace, opened: Opened, way: Way, say: Say, asked: Asked) -> Ask:
    def ask(numbers: list[int]) -> Answers:
        engine = make_engine(load(args, opened, say), args)
        request = partial(way.request, guide=guides_of(args, opened, way))
        return engine_answers(engine, opened.processor, asked, numbers, request)

    return ask


def _server(args: argparse.Namespace) -> Answerer:
    """A model on a server. Its tokenizer, its pixels where it takes no bounds, and its weights are its own business."""
    endpoint = open_endpoint(args.server, args.model, "--server")
    older = re.search(r"qwen2[-_]vl", endpoint.model, re.IGNORECASE)
    if args.logprobs is not None or any(value is not None for value in (args.json_schema, args.regex, args.choice)):
        raise ConfigError("--logprobs and grammars do not apply to --server")
    way = way_of(args, Defaults())
    sampling = {name: value for name, value in vars(way.sampling).items() if value != getattr(Sampling(), name)}
    settings = {"server": endpoint.url, "served": endpoint.model, "sampling": sampling, "stop": way.stop}

    def asker(asked: Asked) -> Ask:
        options = {
            "max_tokens": asked.profile.max_new_tokens,
            **sampling,
            "temperature": way.sampling.temperature,
            "seed": way.sampling.seed,
            **({"stop": list(way.stop)} if way.stop else {}),
            **_bounds(asked.profile),
        }
        return lambda numbers: server_answers(endpoint, asked, numbers, args.concurrency or CONCURRENCY, options)

    return Answerer("qwen2_vl" if older else "qwen2_5_vl", settings, {"model": endpoint.model}, asker)


def _bounds(profile: Profile) -> dict[str, Any]:
    """Bounds of pictures in vLLM's words, which duetvl serve and others understand as well."""
    sizes = {"min_pixels": profile.pixels.min_pixels, "max_pixels": profile.pixels.max_pixels, "fps": profile.video.fps}
    bounds = {name: value for name, value in sizes.items() if value is not None}
    return {"mm_processor_kwargs": bounds} if bounds else {}


# -- asking ----------------------------------------------------------------------------------------------------------


def _answer_all(args: argparse.Namespace, run: RunAnswers, source: Answerer, say: Say) -> None:
    """Ask what is missing, of the model in this process or of copies of it in others."""
    missing, total = run.missing(), len(run.numbers)
    if len(missing) < total:
        say(f"{args.output}: {total - len(missing)} of {total} questions are answered already")
    if not missing:
        return
    divided = args.tp or args.pp  # then this process has no model, unless it is one of the ranks
    with _watched(run) as look:
        if args.copies == 1 or (len(missing) == 1 and not divided):
            _keep(args, run, source, 0, 1, look)
        else:
            devices = (args.nproc or 1) // args.copies
            logs = args.output / "logs"
            run_processes(args.argv, args.copies, logs, partial(_look_again, run, look), devices)
            _look_again(run, look)


def _keep(
    args: argparse.Namespace,
    run: RunAnswers,
    source: Answerer,
    process: int,
    processes: int,
    look: Callable[[int, Row], None] = lambda number, row: None,
) -> None:
    if missing := run.missing(process, processes):
        keep(run, source.ask(run.asked)(missing), process, look)


def _look_again(run: RunAnswers, look: Callable[[int, Row], None]) -> None:
    """See what other processes have answered since."""
    before = run.rows()
    run.file.read_again()
    for number, row in run.rows().items():
        if before.get(number) is not row and before.get(number) != row:
            look(number, row)


@contextmanager
def _watched(run: RunAnswers) -> Iterator[Callable[[int, Row], None]]:
    """A function that shows every answer's part of the score on the way."""
    running, answered = Running(run.asked), {number for number, row in run.rows().items() if "error" not in row}
    for number in answered:
        running.add(number, run.rows()[number])
    total = len(run.numbers)
    progress = Progress(total, done=len(answered), unit="question", stream=sys.stderr, every=max(1, total // 20))

    def look(number: int, row: Row) -> None:
        answered.add(number)
        running.add(number, row)
        progress.step({"step": len(answered), "score": running.score})

    with closing(progress):
        yield look
