"""What the commands that answer are asked, as argparse reads it. Nothing heavy is imported: `--help` shows this.

No option has a default of its own: what the user leaves out may be said by a file of MindSpeed-MM, then by the model's
generation_config.json, and last by `Usual`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
PRESETS: Final = {"qwen": 2.0, "mindie": 0.5}  # frames of a second of video that are taken


class AddMedium(argparse.Action):
    """`--image A --video B --image C`: the order is kept."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Append (kind, path)."""
        namespace.media = [*(namespace.media or []), ((option_string or "").lstrip("-"), str(values))]


def add_infer(parser: argparse.ArgumentParser) -> None:
    """`duetvl infer`."""
    _add_model(parser, optional=True)
    parser.add_argument("--prompt", metavar="TEXT", help="the question; with --input DIR, asked about every picture")
    parser.add_argument("--system", metavar="TEXT", help="system message; default: that of the model's template")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}",
            action=AddMedium,
            dest="media",
            metavar="PATH",
            help=f"{kind} to put before the text; repeatable",
        )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE|DIR",
        help="records in the formats of training data, without their last answer; or a directory of pictures and "
        "videos, to ask --prompt about each",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="JSONL", help="one line per record; an interrupted run is resumed"
    )
    parser.add_argument(
        "--from-mindspeed",
        type=Path,
        metavar="JSON",
        help="inference_*.json of MindSpeed-MM; options override its keys",
    )
    parser.add_argument("--allow-unknown", action="store_true", help="ignore its unknown keys")
    _add_sampling(parser)
    _add_media(parser)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """`duetvl eval`."""
    nproc = "processes, each with its own device; every tp x pp of them share a copy of the model"
    _add_model(parser, optional=True, nproc=nproc)
    parser.add_argument(
        "--task", metavar="NAME", help="benchmark, such as ai2d_test, or the YAML file of a task of your own"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="its data file or directory")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="directory of this run; an interrupted run is resumed"
    )
    parser.add_argument("--profile", metavar="NAME", help="prompt profile; default: that of the model's family")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions; default: all")
    parser.add_argument(
        "--server",
        metavar="URL",
        help="evaluate an OpenAI-compatible server; MODEL is the name there, if it has several",
    )
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="questions sent to the server at once; default: 16"
    )
    parser.add_argument("--rescore", action="store_true", help="rescore the answers in -o DIR, without the model")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two runs on the same questions"
    )
    parser.add_argument(
        "--judge", metavar="URL", help="OpenAI-compatible server that judges choices which the task's rule cannot parse"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="model of the judge; default: its only one")
    parser.add_argument(
        "--from-mindspeed", type=Path, metavar="JSON", help="evaluate_*.json of MindSpeed-MM; options override its keys"
    )
    parser.add_argument("--allow-unknown", action="store_true", help="ignore its unknown keys")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # which copy, as their parent starts them
    _add_sampling(parser)
    _add_media(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """`duetvl chat`."""
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message; default: that of the model's template")
    _add_sampling(parser)
    _add_media(parser)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """`duetvl bench infer`."""
    _add_model(parser)
    for name, usual, what in (
        ("batch", "1", "requests at once"), ("input-tokens", "256", "tokens of a prompt, its picture's included"),
        ("output-tokens", "128", "tokens of an answer"),
        ("image-size", "0", "sides of a picture in pixels, 0 for none, or WIDTHxHEIGHT"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", default=usual, metavar="LIST", help=f"{what}, separated by commas; default: {usual}"
        )
    parser.set_defaults(min_pixels=None, max_pixels=None, video_preset=None, fps=None, max_frames=None)
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs of each, of which the fastest is reported; default: 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results as CSV, with MindIE's column names")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """`duetvl serve`."""
    _add_model(parser, adapters=True)
    parser.add_argument(
        "--served-name",
        action="append",
        metavar="NAME",
        help="the model's name in requests; repeatable; default: its path",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="maximum tokens of prompt and answer; default: the model's"
    )
    group = parser.add_argument_group("address and access")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="default: 127.0.0.1; 0.0.0.0 to accept other machines"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 selects a free port")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="KEY or NAME:KEY, one per line; also in DUETVL_API_KEYS"
    )
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="log format on stderr; default: text"
    )
    _add_limits(parser)
    _add_media(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for name, kind, what in (
        ("max-requests", int, "requests at once, others get 429; default: 256"),
        ("max-requests-per-key", int, "the same for each key; default: no limit"),
        ("max-prompt-tokens", int, "of a prompt; default: the context"),
        ("max-output-tokens", int, "of an answer; default: the rest of the context"),
        ("timeout", float, "seconds from a request's arrival to the end of its answer; default: 600"),
        ("drain", float, "seconds for running answers to finish after SIGTERM; default: 60"),
        ("max-body-bytes", int, "of a request; default: 128 MiB"),
        ("max-media", int, "pictures and videos in a request; default: 16"),
        ("max-media-bytes", int, "of one picture or video; default: 64 MiB"),
        ("max-media-pixels", int, "of a picture as sent; default: 64 million"),
        ("max-video-seconds", float, "of a video as sent; default: 1800"),
        ("prepare-threads", int, "threads that decode and tokenise; default: 4"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, metavar="X", help=what)
    group.add_argument(
        "--media-host", action="append", metavar="HOST", help="fetch media from this host; repeatable; default: none"
    )
    group.add_argument(
        "--media-root", type=Path, metavar="DIR", help="allow file:// media below this directory; default: none"
    )


def _add_model(
    parser: argparse.ArgumentParser, *, optional: bool = False, adapters: bool = False, nproc: str | None = None
) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="model directory or hub id, a run (runs/x, runs/x@1200), an adapter, or a MindSpeed-MM directory",
    )
    parser.add_argument("--base", metavar="DIR", help="base model of a MindSpeed-MM directory, a run or an adapter")
    if adapters:
        parser.add_argument(
            "--adapter", action="append", dest="adapters", metavar="NAME=DIR", help="LoRA adapter, served beside the "
            "model under its own name; repeatable",
        )  # fmt: skip
        parser.set_defaults(adapter=None)
    else:
        parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter to add to the model")
    parser.add_argument("--backend", metavar="NAME", help="torch_npu (or torch), mindspore, auto; default: auto")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, npu (ascend), auto; default: auto")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; default: as stored, if the device supports it"
    )
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N", help="size of the key-value cache; default: from free memory"
    )
    parser.add_argument(
        "--media-tokens", type=int, metavar="N", help="size of the cache of picture and video features; default: 16384"
    )
    parser.add_argument("--max-sequences", type=int, metavar="N", help="answers generated at once; default: 64")
    group = parser.add_argument_group("many ranks", "default: one process")
    usual = "processes of this machine, one per device, that share the model"
    group.add_argument("--nproc", type=int, metavar="N", help=nproc or usual)
    group.add_argument(
        "--tp", type=int, metavar="T", help="tensor parallelism: ranks that share each layer; default: --nproc"
    )
    group.add_argument(
        "--pp", type=int, metavar="P", help="pipeline stages that the layers are divided over; default: 1"
    )
    group.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="the ranks' logs; default: kept only after a failure"
    )
    parser.set_defaults(team=None, divides=nproc is None, process=None, copies=1)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "default: the model's generation_config.json, otherwise greedy")
    for name, kind, what in (
        ("max-new-tokens", int, "maximum tokens of an answer; default: 256"),
        ("min-new-tokens", int, "minimum tokens of an answer; default: 0"),
        ("temperature", float, "0 is greedy"), ("top-k", int, "0: all"), ("top-p", float, "1: all"),
        ("min-p", float, "minimum probability relative to the most likely token"),
        ("repetition-penalty", float, "for tokens of prompt and answer"),
        ("presence-penalty", float, "for tokens of the answer"),
        ("frequency-penalty", float, "the same, per occurrence"), ("seed", int, "of the random numbers; default: 0"),
        ("logprobs", int, "write log-probabilities, with this number of alternatives"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, metavar="X", help=what)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop string, not included in the answer; repeatable"
    )
    group.add_argument("--stop-token", action="append", type=int, metavar="ID", help="stop token; repeatable")
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="continue past end tokens, up to --max-new-tokens"
    )
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="answers are JSON that follows this schema")
    group.add_argument("--regex", metavar="PATTERN", help="answers match this regular expression")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of the choices; repeatable")


def _add_media(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures and videos", "default: the model's own settings")
    group.add_argument(
        "--min-pixels", type=int, metavar="N", help="minimum pixels of a picture; smaller ones are enlarged"
    )
    group.add_argument(
        "--max-pixels", type=int, metavar="N", help="maximum pixels of a picture; larger ones are reduced"
    )
    group.add_argument(
        "--video-preset", choices=sorted(PRESETS), help="qwen: 2 frames per second (default); mindie: 0.5"
    )
    group.add_argument("--fps", type=float, metavar="X", help="frames per second of video, whatever the preset")
    group.add_argument("--max-frames", type=int, metavar="N", help="maximum frames of a video; default: 768")
