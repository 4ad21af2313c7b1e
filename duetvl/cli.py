"""The command line. Nothing heavy is imported before it is known what is asked for."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duetvl
from duetvl.commands.parser import parse
from duetvl.core.errors import ConfigError, DuetvlError, one_line
from duetvl.core.streams import discard_output, open_streams

if TYPE_CHECKING:
    from duetvl.migrate.importer import Imported

USER_ERROR = 2
INTERRUPTED = 130

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for an error that the user can act on, 128 + n after signal n."""
    open_streams()
    _quiet()
    try:
        status = _run(parse(sys.argv[1:] if argv is None else list(argv)))
        discard_output()  # what a library printed and cannot be shown is no failure of the command
        return status
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        discard_output()
        return 0
    except (DuetvlError, OSError) as error:
        if os.environ.get("DUETVL_DEBUG") == "1":
            raise
        if isinstance(error, OSError):
            discard_output()  # a full disk may be where it goes
        if not getattr(error, "silent", False):
            _say(f"error: {_in_words(error)}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted", sys.stderr)
        return INTERRUPTED


def _in_words(error: DuetvlError | OSError) -> str:
    """One line of an error; the system's names the file, where it knows one."""
    if isinstance(error, DuetvlError):
        return str(error)
    reason = error.strerror or str(error) or type(error).__name__
    return str(ConfigError(f"{error.filename}: {reason}" if error.filename else reason))


def _quiet() -> None:
    """Warnings are a line each, and those that say nothing to a user are left out.

    Pillow warns of what is odd about a picture that it reads all the same; one that it cannot read is an error. torch
    warns of a package that swanlab brings, which no user of ours has chosen.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """A warning as this command line shows it: ours alone, others with what they are and where they come from."""
    ours = Path(filename).is_relative_to(Path(duetvl.__file__).parent)
    words = str(message) if ours else f"{filename}: {category.__name__}: {message}"
    with suppress(OSError):  # as Python's own does: a warning ends nothing
        _say(f"warning: {one_line(words)}", sys.stderr)


def _run(args: argparse.Namespace) -> int:
    commands = {
        "train": _train, "launch": _launch, "check": _check, "data": _data, "plan": _plan,
        "import-mindspeed": _import_mindspeed, "import-llamafactory": _import_llamafactory,
        "doctor": _doctor, "export": _export, "merge": _merge, "plot": _plot, "infer": _infer, "chat": _chat,
        "bench": _bench, "eval": _eval, "serve": _serve,
    }  # fmt: skip
    run = commands[args.command]
    if not hasattr(args, "tp"):
        return run(args)
    from duetvl.commands.over_ranks import over_ranks

    return over_ranks(args, lambda: run(args))


def _train(args: argparse.Namespace) -> int:
    from duetvl.api import train

    result = train(args.recipe, _overrides(args), resume=args.resume, restart=args.restart)
    return 128 + result.stopped_by if result.stopped_by else 0


def _launch(args: argparse.Namespace) -> int:
    from duetvl.core.backend import AUTO, choose_backend
    from duetvl.launch.plan import LaunchPlan, check_words, log_directory, survived
    from duetvl.launch.run import launch
    from duetvl.training.recipe.reading import for_world, load_recipe

    check_words(args.words)
    inner = parse(args.words)
    if inner.command != "train":
        backend = choose_backend(args.backend or inner.backend or AUTO, inner.device or "auto")
        logs = log_directory(args.log_dir)
        words = (*args.words, "--backend", backend)
        return launch(LaunchPlan(backend, words, *_nodes(args), survives=survived(inner.command)), logs, logs)
    recipe = load_recipe(inner.recipe, _overrides(inner))
    backend = choose_backend(args.backend or recipe.backend.name, recipe.backend.device)
    words = (*args.words, "--backend", backend)
    plan = LaunchPlan(backend, words, *_nodes(args), args.restarts)
    if plan.processes is not None:
        for_world(recipe, plan.processes)
    return launch(plan, Path(recipe.train.output_dir), log_directory(args.log_dir))


def _nodes(args: argparse.Namespace) -> tuple[int, str, int, str | None]:
    return args.nproc, args.nnodes, args.node_rank, args.master


def _check(args: argparse.Namespace) -> int:
    from duetvl.training.check import check

    if args.schedule is not None:
        _check_picture(args.schedule, "--schedule")
    wanted = {name: getattr(args, name) for name in ("decode", "sample", "output", "schedule", "device_type")}
    for line in check(args.recipe, _overrides(args), **wanted):
        _say(line)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from duetvl.planning.command import plan, question_of

    if args.output is not None:
        _check_new(args.output)
    for line in plan(question_of(vars(args))):
        _say(line)
    return 0


def _import_mindspeed(args: argparse.Namespace) -> int:
    from duetvl.migrate.importer import import_run
    from duetvl.migrate.reading import check_task

    if len(args.files) != 3 or not args.output:
        for path in args.files:
            check_task(path)
        given = " ".join(map(str, args.files)) + (f" -o {args.output}" if args.output else "")
        raise ConfigError(
            f"import-mindspeed takes data.json model.json script.sh -o RECIPE; found {given or 'nothing'}"
        )
    _check_new(args.output)
    variables = dict(text.split("=", 1) for text in args.overrides)
    return _write_import(import_run(*args.files, variables=variables, allow_unknown=args.allow_unknown), args.output)


def _import_llamafactory(args: argparse.Namespace) -> int:
    from duetvl.migrate.llamafactory.importer import import_yaml

    _check_new(args.output)
    return _write_import(import_yaml(args.yaml, devices=args.devices, allow_unknown=args.allow_unknown), args.output)


def _check_new(path: Path) -> None:
    _check_target(path)
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name, or move it away")


def _write_import(imported: Imported, output: Path) -> int:
    from duetvl.storage.files import write_text

    try:
        write_text(output, imported.text)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from None
    for line in imported.report.lines():
        _say(line)
    _say(f"{output}: {imported.summary}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    if args.full:
        return _doctor_full(args)
    from duetvl.doctor import report

    if args.output is not None or args.nproc is not None or args.device is not None or args.backend is not None:
        raise ConfigError("doctor: --device, --backend, --nproc and -o belong to the full examination: add --full")
    works = False
    for line, good in report():
        _say(line)
        works = works or good
    return 0 if works else 1


def _doctor_full(args: argparse.Namespace) -> int:
    from duetvl.core.backend import AUTO

    if args.between is not None:
        from duetvl.doctor.worker import take_part

        return take_part(args.backend, args.device, args.between)
    from duetvl.doctor.full import examine_fully

    if args.output is not None:
        _check_target(args.output)
    device = args.device or "auto"
    for line in examine_fully(args.backend or AUTO, device, ranks=args.nproc, output=args.output):
        _say(line)
    return 0


def _export(args: argparse.Namespace) -> int:
    from duetvl.training.checkpoints.export import export_run

    export_run(args.run, args.output, _say, dtype=None if args.dtype == "auto" else args.dtype)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from duetvl.convert.opening import open_model
    from duetvl.models.qwen_vl.adapters import merge_directories

    layers = merge_directories(open_model(args.model), args.adapter, args.output)
    _say(f"merged {layers} layers into {args.output}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from duetvl.training.watching.metrics import read_metrics
    from duetvl.training.watching.plots import plot_runs

    for run in args.runs:
        if not read_metrics(run):
            raise ConfigError(f"{run}: has no metrics.jsonl with a step in it; give the directory of a run")
    target = args.output or (args.runs[0] / "loss.png" if len(args.runs) == 1 else Path("compare.png"))
    _check_picture(target)
    try:
        plot_runs(args.runs, target, args.key)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror or error}") from None
    _say(str(target))
    return 0


def _infer(args: argparse.Namespace) -> int:
    from duetvl.commands.infer import infer

    if args.output is not None:
        _check_target(args.output)
    return infer(args, _show, _tell)


def _eval(args: argparse.Namespace) -> int:
    from duetvl.commands.eval import evaluate

    return evaluate(args, lambda text: _say(text), _tell)


def _chat(args: argparse.Namespace) -> int:
    from duetvl.commands.chat import chat

    return chat(args, sys.stdin, _show, _tell)


def _serve(args: argparse.Namespace) -> int:
    from duetvl.commands.serve import serve

    return serve(args, _tell)


def _bench(args: argparse.Namespace) -> int:
    from duetvl.commands.bench import bench

    return bench(args, _say, _tell)


def _data(args: argparse.Namespace) -> int:
    if args.action == "preview":
        return _preview(args)
    from duetvl.data.formats.convert import convert_llava, convert_rlhf_v

    if args.layout == "llava":
        report = convert_llava(args.annotations, args.images, args.output)
    else:
        report = convert_rlhf_v(args.parquet, args.output)
    for line in report.lines():
        _say(line)
    return 0


def _preview(args: argparse.Namespace) -> int:
    from duetvl.data.preview import COLOURED, PLAIN
    from duetvl.training.preview import preview

    _check_picture(args.output)
    marks = COLOURED if sys.stdout.isatty() else PLAIN
    for text in preview(args.recipe, _overrides(args), count=args.count, marks=marks, sheet=args.output):
        _say(text)
    return 0


def _check_target(path: Path, option: str = "-o") -> None:
    """Raise ConfigError, before any work is done, where no file can be made at `path`."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}; create it, or choose another place")


def _check_picture(path: Path, option: str = "-o") -> None:
    """The same for a PNG file, which may replace a picture and nothing else."""
    _check_target(path, option)
    if path.exists() and not _is_png(path):
        raise ConfigError(
            f"{option} {path}: exists already and is not a PNG file; choose another name, or move it away"
        )


def _is_png(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(4) == b"\x89PNG"


def _overrides(args: argparse.Namespace) -> list[str]:
    """Later ones win: the environment, then section.key=value, then --backend and --device."""
    chosen = [*args.overrides]
    if from_environment := os.environ.get("DUETVL_BACKEND"):
        chosen.insert(0, f"backend.name={from_environment}")
    chosen += [f"backend.name={args.backend}"] if args.backend else []
    chosen += [f"backend.device={args.device}"] if args.device else []
    return chosen


def _show(text: str) -> None:
    """A piece of an answer; what would move a terminal's cursor is none of its text."""
    sys.stdout.write(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    """A line that is not part of the answer."""
    _say(text, sys.stderr)


def _say(text: str, stream: Any = None) -> None:
    out = stream or sys.stdout
    out.write(text + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
