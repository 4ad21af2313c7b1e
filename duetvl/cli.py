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
from typing import Any

import duetvl
from duetvl.commands.options import add_bench, add_chat, add_eval, add_infer, add_serve
from duetvl.core.errors import ConfigError, DuetvlError, one_line
from duetvl.core.streams import discard_output, open_streams

USER_ERROR = 2
INTERRUPTED = 130

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_RECIPE_HELP = "recipe file, YAML or JSON; its fields are described in docs/recipe.md"
_OVERRIDES = "section.key=value replaces a field of the recipe: optim.lr=3e-5 train.steps=100"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for an error that the user can act on, 128 + n after signal n."""
    open_streams()
    _quiet()
    try:
        status = _run(_parse(sys.argv[1:] if argv is None else list(argv)))
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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    words: list[str] = []
    if argv[:1] == ["launch"] and "--" in argv:  # what follows is another command
        argv, words = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, rest = parser.parse_known_args(argv)
    args.words = words
    if getattr(args, "resume", None) and "=" in args.resume and not Path(args.resume).exists():
        rest, args.resume = [args.resume, *rest], ""  # `--resume optim.lr=1e-5`: an override, not a directory
    if args.command == "import-mindspeed":  # files may stand on both sides of an option
        args.files, rest = _files_first([*args.files, *rest])
    known = hasattr(args, "recipe") or args.command == "import-mindspeed"
    wrong = [text for text in rest if text.startswith("-") or "=" not in text or not known]
    if wrong:
        hint = "; a field of the recipe is given as section.key=value, as in optim.lr=1e-5" * hasattr(args, "recipe")
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{hint}")
    args.overrides, args.argv = rest, argv
    return args


def _files_first(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Names of files, and NAME=VALUE, options and whatever else."""
    files = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    return [Path(word) for word in files], [word for word in words if word not in files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="duetvl", description=duetvl.__doc__)
    parser.add_argument("--version", action="version", version=f"duetvl {duetvl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train what a recipe says", epilog=_OVERRIDES)
    _add_recipe(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR[@STEP]",
        help="resume from the newest checkpoint, which must be there, or from another run or an earlier step; without "
        "it a run that has checkpoints is resumed as well",
    )
    train.add_argument(
        "--restart", action="store_true", help="start at the beginning; what the run directory holds is set aside"
    )

    _add_launch(commands.add_parser("launch", help="train, or answer, over many processes, by torchrun or msrun"))

    check = commands.add_parser("check", help="check a recipe, its model and all its records", epilog=_OVERRIDES)
    _add_recipe(check)
    check.add_argument(
        "--decode", action="store_true", help="make all pixels as well: finds truncated pictures, takes much longer"
    )
    check.add_argument("--schedule", type=Path, metavar="PNG", help="draw the schedule of a pipeline there")

    _add_import(commands.add_parser("import-mindspeed", help="make a recipe of a MindSpeed-MM run"))

    commands.add_parser("doctor", help="what is installed, which backends and devices work")

    export = commands.add_parser("export", help="write a run's checkpoint for transformers, of a LoRA run for PEFT")
    export.add_argument("run", metavar="RUN[@STEP]", help="run directory; by default its newest checkpoint")
    export.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="must not exist yet")

    merge = commands.add_parser("merge", help="write a model with a LoRA adapter (PEFT's layout) merged into it")
    merge.add_argument("model", metavar="MODEL", help="model directory, or an id of a hub")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of the adapter")
    merge.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="must not exist yet")

    plot = commands.add_parser("plot", help="draw the curves of runs")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    plot.add_argument(
        "--key",
        action="append",
        default=[],
        help="a number of metrics.jsonl, such as grad_norm or eval_loss; may be given several times. By default losses "
        "and learning rates",
    )
    plot.add_argument("-o", "--output", type=Path, metavar="PNG", help="default: RUN/loss.png, or compare.png")

    _add_data(commands.add_parser("data", help="convert data sets, look at samples"))

    add_infer(commands.add_parser("infer", help="answers to a prompt, to records, to a directory of pictures"))
    add_eval(commands.add_parser("eval", help="a model's scores on benchmarks; two runs compared"))
    add_chat(commands.add_parser("chat", help="talk with a model in the terminal"))
    add_serve(commands.add_parser("serve", help="an OpenAI-compatible server with a chat page"))
    bench = commands.add_parser("bench", help="how fast a model is here")
    add_bench(bench.add_subparsers(dest="action", required=True, metavar="WHAT").add_parser("infer", help="answering"))
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="published data sets to records that training reads")
    layouts = convert.add_subparsers(dest="layout", required=True, metavar="LAYOUT")

    preview = actions.add_parser("preview", help="samples as the model sees them", epilog=_OVERRIDES)
    _add_recipe(preview)
    preview.add_argument("-n", "--count", type=int, default=3, metavar="N", help="how many; default 3")
    preview.add_argument(
        "-o", "--output", type=Path, default=Path("preview.png"), metavar="PNG", help="default: preview.png"
    )

    llava = layouts.add_parser("llava", help="LLaVA-Instruct's JSON and its pictures")
    llava.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="llava_instruct_150k.json")
    llava.add_argument("--images", type=Path, required=True, metavar="DIR", help="its pictures: COCO's train2017")
    llava.add_argument(
        "-o", "--output", type=Path, required=True, metavar="JSON", help="must not exist (.json or .jsonl)"
    )

    rlhf_v = layouts.add_parser("rlhf-v", help="preference pairs of RLHF-V or RLAIF-V, openbmb's or llamafactory's")
    rlhf_v.add_argument("--parquet", type=Path, required=True, nargs="+", metavar="FILE", help="Parquet files")
    rlhf_v.add_argument(
        "-o", "--output", type=Path, required=True, metavar="JSON", help="must not exist; or a directory"
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --nproc N [options] -- train RECIPE [options] [section.key=value ...]"
    parser.add_argument("--backend", help="torch_npu or mindspore; default: that of the recipe")
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes on this node, one a device")
    parser.add_argument("--nnodes", default="1", metavar="M", help="nodes; with torchrun also MIN:MAX. Default 1")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="the number of this node; default 0")
    parser.add_argument("--master", metavar="HOST:PORT", help="a free port of node 0, the same on all nodes")
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help="how often to start again after a failure")
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="the ranks' logs; default: launch-logs/TIME-PROCESS, which is new"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
    parser.usage = f"{parser.prog} RECIPE [options] [section.key=value ...]"
    parser.add_argument(
        "--backend",
        help="torch_npu (or torch), mindspore, or auto for the one that is installed; default: DUETVL_BACKEND, the "
        "recipe's, auto",
    )
    parser.add_argument("--device", help="cpu, cuda, npu (ascend) or auto; default: the recipe's")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} DATA MODEL SCRIPT -o RECIPE [NAME=VALUE ...]"
    parser.add_argument(
        "files",
        nargs="*",
        metavar="DATA MODEL SCRIPT",
        help="data.json, model.json and the shell script, which is read, never run; NAME=VALUE sets a variable of it",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="RECIPE", help="file to be made")
    parser.add_argument("--allow-unknown", action="store_true", help="leave out keys that are not known")


def _run(args: argparse.Namespace) -> int:
    commands = {
        "train": _train, "launch": _launch, "check": _check, "data": _data, "import-mindspeed": _import_mindspeed,
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
    from duetvl.launch.plan import Plan, check_words, log_directory, survived
    from duetvl.launch.run import launch
    from duetvl.training.recipe.reading import for_world, load_recipe

    check_words(args.words)
    inner = _parse(args.words)
    if inner.command != "train":
        backend = choose_backend(args.backend or inner.backend or AUTO, inner.device or "auto")
        logs = log_directory(args.log_dir)
        words = (*args.words, "--backend", backend)
        return launch(Plan(backend, words, *_nodes(args), survives=survived(inner.command)), logs, logs)
    recipe = load_recipe(inner.recipe, _overrides(inner))
    backend = choose_backend(args.backend or recipe.backend.name, recipe.backend.device)
    words = (*args.words, "--backend", backend)
    plan = Plan(backend, words, *_nodes(args), args.restarts)
    if plan.processes is not None:
        for_world(recipe, plan.processes)
    return launch(plan, Path(recipe.train.output_dir), log_directory(args.log_dir))


def _nodes(args: argparse.Namespace) -> tuple[int, str, int, str | None]:
    return args.nproc, args.nnodes, args.node_rank, args.master


def _check(args: argparse.Namespace) -> int:
    from duetvl.training.check import check

    if args.schedule is not None:
        _check_picture(args.schedule, "--schedule")
    for line in check(args.recipe, _overrides(args), decode=args.decode, schedule=args.schedule):
        _say(line)
    return 0


def _import_mindspeed(args: argparse.Namespace) -> int:
    from duetvl.migrate.importer import import_run
    from duetvl.migrate.reading import check_task
    from duetvl.storage.files import write_text

    if len(args.files) != 3 or not args.output:
        for path in args.files:
            check_task(path)
        given = " ".join(map(str, args.files)) + (f" -o {args.output}" if args.output else "")
        raise ConfigError(
            f"import-mindspeed takes data.json model.json script.sh -o RECIPE; found {given or 'nothing'}"
        )
    _check_target(args.output)
    if args.output.exists():
        raise ConfigError(f"{args.output}: exists already; choose another name, or move it away")
    variables = dict(text.split("=", 1) for text in args.overrides)
    made = import_run(*args.files, variables=variables, allow_unknown=args.allow_unknown)
    try:
        write_text(args.output, made.text)
    except OSError as error:
        raise ConfigError(f"{args.output}: cannot be written: {error.strerror or error}") from None
    for line in made.report.lines():
        _say(line)
    _say(f"{args.output}: {made.summary}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from duetvl.doctor import report

    works = False
    for line, good in report():
        _say(line)
        works = works or good
    return 0 if works else 1


def _export(args: argparse.Namespace) -> int:
    from duetvl.training.checkpoints.export import export_run

    export_run(args.run, args.output, _say)
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
