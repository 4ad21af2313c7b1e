"""The words of the command line: every command with its options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import duetvl
from duetvl.commands.options import DTYPES, add_bench, add_chat, add_eval, add_infer, add_serve
from duetvl.cost_model.devices import DEFAULT, device_names

_RECIPE_HELP = "recipe file, YAML or JSON; its fields are described in docs/recipe.md"
_OVERRIDES = "section.key=value replaces a field of the recipe: optim.lr=3e-5 train.steps=100; 'lora={}' a section"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its options; `overrides` of a recipe and the words of another command apart."""
    parser = make_parser()
    words: list[str] = []
    if argv[:1] == ["launch"] and "--" in argv:  # what follows is another command
        argv, words = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, rest = parser.parse_known_args(argv)
    args.words = words
    if getattr(args, "resume", None) and "=" in args.resume and not Path(args.resume).exists():
        rest, args.resume = [args.resume, *rest], ""  # `--resume optim.lr=1e-5`: an override, not a directory
    if args.command == "import-mindspeed":  # files may stand on both sides of an option
        args.files, rest = _files_first([*args.files, *rest])
    known = hasattr(args, "recipe") or args.command in ("import-mindspeed", "plan")
    wrong = [text for text in rest if text.startswith("-") or "=" not in text or not known]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{_hint(rest) if hasattr(args, 'recipe') else ''}")
    args.overrides, args.argv = rest, argv
    return args


def _hint(rest: Sequence[str]) -> str:
    """How the fields of a recipe are written that somebody gave as options or with blanks."""
    from duetvl.training.recipe.spelling import as_overrides  # the recipe's sections take a moment to import

    meant = as_overrides([word for word in rest if not re.fullmatch(r"[^-=][^=]*=.+", word)])  # those are well written
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    return "; a field of the recipe is given as section.key=value, as in optim.lr=1e-5"


def _files_first(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Names of files, and NAME=VALUE, options and whatever else."""
    files = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    return [Path(word) for word in files], [word for word in words if word not in files]


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="duetvl", description=duetvl.__doc__)
    parser.add_argument("--version", action="version", version=f"duetvl {duetvl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_train(commands.add_parser("train", help="train a model as a recipe describes", epilog=_OVERRIDES))
    _add_launch(commands.add_parser("launch", help="train or infer over many processes, started by torchrun or msrun"))
    _add_check(commands.add_parser("check", help="check a recipe, its model and all its records", epilog=_OVERRIDES))
    _add_plan(commands.add_parser("plan", help="propose layouts for a number of devices", epilog=_OVERRIDES))
    _add_import(commands.add_parser("import-mindspeed", help="turn a MindSpeed-MM run into a recipe"))
    _add_llamafactory(
        commands.add_parser("import-llamafactory", help="turn LLaMA-Factory's training YAML into a recipe")
    )
    _add_doctor(commands.add_parser("doctor", help="report what is installed and which backends and devices work"))
    _add_export(commands.add_parser("export", help="export a run's checkpoint for transformers (a LoRA run: for PEFT)"))
    _add_merge(commands.add_parser("merge", help="write a model with a LoRA adapter (PEFT's layout) merged into it"))
    _add_plot(commands.add_parser("plot", help="plot the curves of runs"))
    _add_data(commands.add_parser("data", help="convert data sets, preview samples"))
    add_infer(commands.add_parser("infer", help="answer a prompt, records or a directory of pictures"))
    add_eval(commands.add_parser("eval", help="score a model on benchmarks, compare two runs"))
    add_chat(commands.add_parser("chat", help="chat with a model in the terminal"))
    add_serve(commands.add_parser("serve", help="run an OpenAI-compatible server with a chat page"))
    bench = commands.add_parser("bench", help="measure a model's speed on this machine")
    add_bench(
        bench.add_subparsers(dest="action", required=True, metavar="WHAT").add_parser("infer", help="inference speed")
    )
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR[@STEP|@best]",
        help="resume from the newest checkpoint, which must exist, or from another run or step; a run that has "
        "checkpoints is also resumed without this option",
    )
    parser.add_argument(
        "--restart", action="store_true", help="start at step 0; existing contents of the run directory are set aside"
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--decode", action="store_true", help="also decode all pixels: finds truncated pictures, takes much longer"
    )
    parser.add_argument(
        "--device-type", metavar="NAME", help="estimate the seconds of a step for this device: 910B3, H100, ..."
    )
    parser.add_argument("--sample", type=int, metavar="N", help="check N records of each data set, drawn by data.seed")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write histograms of lengths and lists of records left out there; by default nothing is written",
    )
    parser.add_argument("--schedule", type=Path, metavar="PNG", help="draw the schedule of a pipeline to this file")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[@STEP|@best]", help="run directory; by default its newest checkpoint")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="output directory, which must not exist"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the exported weights; default: as config.json says"
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="output directory, which must not exist"
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        help="a value in metrics.jsonl, such as grad_norm or eval_loss; repeatable; default: losses and learning rates",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="default: RUN/loss.png, or compare.png")


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="convert published data sets to training records")
    layouts = convert.add_subparsers(dest="layout", required=True, metavar="LAYOUT")

    preview = actions.add_parser("preview", help="show samples as the model sees them", epilog=_OVERRIDES)
    _add_recipe(preview)
    preview.add_argument("-n", "--count", type=int, default=3, metavar="N", help="number of samples; default: 3")
    preview.add_argument(
        "-o", "--output", type=Path, default=Path("preview.png"), metavar="PNG", help="default: preview.png"
    )

    llava = layouts.add_parser("llava", help="LLaVA-Instruct's JSON and pictures")
    llava.add_argument("--annotations", type=Path, required=True, metavar="JSON", help="llava_instruct_150k.json")
    llava.add_argument("--images", type=Path, required=True, metavar="DIR", help="its pictures: COCO's train2017")
    llava.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="JSON",
        help="output file (.json or .jsonl), which must not exist",
    )

    rlhf_v = layouts.add_parser("rlhf-v", help="preference pairs of RLHF-V or RLAIF-V, openbmb's or llamafactory's")
    rlhf_v.add_argument("--parquet", type=Path, required=True, nargs="+", metavar="FILE", help="Parquet files")
    rlhf_v.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="JSON",
        help="output file or directory, which must not exist",
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --nproc N [options] -- train RECIPE [options] [section.key=value ...]"
    parser.add_argument("--backend", help="torch_npu or mindspore; default: the recipe's")
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes on this node, one per device")
    parser.add_argument(
        "--nnodes", default="1", metavar="M", help="number of nodes; with torchrun also MIN:MAX; default: 1"
    )
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this node; default: 0")
    parser.add_argument("--master", metavar="HOST:PORT", help="a free port of node 0, the same on all nodes")
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="K", help="how often to restart after a failure; default: 0"
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="the ranks' logs; default: a new directory launch-logs/TIME-PROCESS"
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} MODEL --devices N [options] [section.key=value ...]"
    parser.add_argument("model", metavar="MODEL", help="directory with a config.json, or a size: Qwen2.5-VL-7B")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="how many there are in all")
    parser.add_argument(
        "--device-type",
        default=DEFAULT,
        metavar="NAME",
        help=f"{', '.join(device_names())}, or cpu, which is measured; default {DEFAULT}",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="of a device, for tensors: 64GiB; default: 90%% of what the kind has"
    )
    parser.add_argument("--seq", type=int, default=4096, metavar="N", help="most tokens of a micro-batch; default 4096")
    parser.add_argument("--sample", type=int, default=512, metavar="N", help="tokens of a sample; default 512")
    parser.add_argument("--answer", type=int, default=128, metavar="N", help="of them trained; default 128")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="in a sample; default 1")
    parser.add_argument("--picture", default="504x504", metavar="HxW", help="its pixels; default 504x504")
    parser.add_argument("--global-batch", type=int, metavar="N", help="samples in a step; default: 24 a device")
    parser.add_argument("--lora", action="store_true", help="adapters are trained, of the language model")
    parser.add_argument("--dpo", action="store_true", help="preference pairs, with a reference model")
    parser.add_argument("-n", "--count", type=int, default=8, metavar="N", help="layouts that are shown; default 8")
    fitting = parser.add_mutually_exclusive_group()
    fitting.add_argument(
        "--shares", metavar="NAME=X,...", help="of the device's peaks: products=0.4,memory=0.8,links=0.8"
    )
    fitting.add_argument(
        "--measured", nargs="+", type=Path, metavar="RUN", help="fit these shares to runs on this kind of device"
    )
    parser.add_argument("--data", default="data.jsonl", metavar="FILE", help="data.train of the recipe that is written")
    parser.add_argument(
        "-o", "--out", dest="output", type=Path, metavar="RECIPE", help="a recipe with the first layout"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
    parser.usage = f"{parser.prog} RECIPE [options] [section.key=value ...]"
    parser.add_argument(
        "--backend",
        help="torch_npu (or torch), mindspore, or auto for the installed one; default: DUETVL_BACKEND, then the "
        "recipe's, then auto",
    )
    parser.add_argument("--device", help="cpu, cuda, npu (ascend) or auto; default: the recipe's")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full", action="store_true", help="test every operation, a tiny training run and inference on one device"
    )
    parser.add_argument("--device", help="npu, cuda or cpu; default: the best available")
    parser.add_argument("--backend", help="torch or mindspore; default: the installed one, PyTorch if both are")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="number of cards for the test of collectives; default: all"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="write the report to this file")
    parser.add_argument("--between", type=Path, help=argparse.SUPPRESS)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} DATA MODEL SCRIPT -o RECIPE [NAME=VALUE ...]"
    parser.add_argument(
        "files",
        nargs="*",
        metavar="DATA MODEL SCRIPT",
        help="data.json, model.json and the shell script, which is read, never run; NAME=VALUE sets a variable of "
        "the script",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="RECIPE", help="recipe to write")
    parser.add_argument("--allow-unknown", action="store_true", help="ignore unknown keys")


def _add_llamafactory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("yaml", type=Path, metavar="YAML", help="training YAML with stage sft or dpo")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RECIPE", help="recipe to write")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="number of devices of the run; default: 1")
    parser.add_argument("--allow-unknown", action="store_true", help="ignore unknown keys")
