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
    parser.add_argument("--prompt", metavar="TEXT", help="what is asked; with --input DIR of every picture")
    parser.add_argument("--system", metavar="TEXT", help="system message; by default that of the model's template")
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}", action=AddMedium, dest="media", metavar="PATH", help=f"{kind}s go before the text; repeatable"
        )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE|DIR",
        help="records as training reads them, of which the last answer is left out; or a directory of pictures and "
        "videos, each asked --prompt",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="JSONL", help="a line for each record; with it a run that ended is resumed"
    )
    parser.add_argument(
        "--from-mindspeed", type=Path, metavar="JSON", help="inference_*.json of MindSpeed-MM; options replace its keys"
    )
    parser.add_argument("--allow-unknown", action="store_true", help="leave out its keys that are not known")
    _add_sampling(parser)
    _add_media(parser)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """`duetvl eval`."""
    nproc = "processes, each on a device of its own; every tp x pp of them have one copy of the model"
    _add_model(parser, optional=True, nproc=nproc)
    parser.add_argument("--task", metavar="NAME", help="benchmark, such as ai2d_test, or the YAML file of your own")
    parser.add_argument("--data", type=Path, metavar="PATH", help="its data file or directory")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="directory of this run; a run that ended is gone on with"
    )
    parser.add_argument("--profile", metavar="NAME", help="prompt profile; default: the one of the model's family")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions; default: all")
    parser.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server; MODEL is its name there, if it has several"
    )
    parser.add_argument("--concurrency", type=int, metavar="N", help="questions that a server has at once: 16")
    parser.add_argument("--rescore", action="store_true", help="score the answers of -o DIR again, without the model")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two runs on the same questions")
    parser.add_argument(
        "--judge", metavar="URL", help="OpenAI-compatible server that reads choices which the task's rule cannot read"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="its model; default: the one that it has")
    parser.add_argument(
        "--from-mindspeed", type=Path, metavar="JSON", help="evaluate_*.json of MindSpeed-MM; options replace its keys"
    )
    parser.add_argument("--allow-unknown", action="store_true", help="leave out its keys that are not known")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # which copy, as their parent starts them
    _add_sampling(parser)
    _add_media(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """`duetvl chat`."""
    _add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message; by default that of the model's template")
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
        parser.add_argument(f"--{name}", default=usual, metavar="LIST", help=f"{what}, separated by commas: {usual}")
    parser.set_defaults(min_pixels=None, max_pixels=None, video_preset=None, fps=None, max_frames=None)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each, the fastest is told: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the figures under MindIE's column names")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """`duetvl serve`."""
    _add_model(parser, adapters=True)
    parser.add_argument(
        "--served-name", action="append", metavar="NAME", help="of the model in requests; repeatable; default: its path"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer; default: the model's")
    group = parser.add_argument_group("where it listens, and to whom")
    group.add_argument("--host", default="127.0.0.1", metavar="NAME", help="127.0.0.1; 0.0.0.0 for other machines")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="8000; 0 takes a free one")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a key, or NAME:KEY, a line; also in DUETVL_API_KEYS"
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="of the lines on stderr; text")
    _add_limits(parser)
    _add_media(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for name, kind, what in (
        ("max-requests", int, "under way at once, others get 429; default: 256"),
        ("max-requests-per-key", int, "the same for each key; default: no limit"),
        ("max-prompt-tokens", int, "default: what the context has room for"),
        ("max-output-tokens", int, "of one answer; default: what the context has room for"),
        ("timeout", float, "seconds from a request's arrival to the end of its answer; default: 600"),
        ("drain", float, "seconds that answers may take to end after SIGTERM; default: 60"),
        ("max-body-bytes", int, "of one request; default: 128 MiB"),
        ("max-media", int, "pictures and videos of one request; default: 16"),
        ("max-media-bytes", int, "of one of them; default: 64 MiB"),
        ("max-media-pixels", int, "of a picture as it is sent; default: 64 million"),
        ("max-video-seconds", float, "of a video as it is sent; default: 1800"),
        ("prepare-threads", int, "that decode and tokenise; default: 4"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, metavar="X", help=what)
    group.add_argument(
        "--media-host", action="append", metavar="HOST", help="media are fetched from there; repeatable; default: none"
    )
    group.add_argument("--media-root", type=Path, metavar="DIR", help="file:// of media below this; default: none")


def _add_model(
    parser: argparse.ArgumentParser, *, optional: bool = False, adapters: bool = False, nproc: str | None = None
) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="model directory or id of a hub; a run (runs/x, runs/x@1200); an adapter; a MindSpeed-MM directory",
    )
    parser.add_argument("--base", metavar="DIR", help="model that a MindSpeed-MM directory is of, or below an adapter")
    if adapters:
        parser.add_argument(
            "--adapter", action="append", dest="adapters", metavar="NAME=DIR", help="LoRA adapter served beside the "
            "model under a name of its own; repeatable",
        )  # fmt: skip
        parser.set_defaults(adapter=None)
    else:
        parser.add_argument("--adapter", type=Path, metavar="DIR", help="LoRA adapter to lay on the model")
    parser.add_argument("--backend", metavar="NAME", help="torch_npu (or torch), mindspore, auto; default: auto")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, npu (ascend), auto; default: auto")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are stored, where the device has that"
    )
    parser.add_argument("--cache-tokens", type=int, metavar="N", help="room for keys and values; default: free memory")
    parser.add_argument(
        "--media-tokens", type=int, metavar="N", help="room for features of pictures and videos; default: 16384"
    )
    parser.add_argument("--max-sequences", type=int, metavar="N", help="answers that grow at once; default: 64")
    group = parser.add_argument_group("many ranks", "default: one process")
    usual = "processes, one for each device of this machine, that divide the model"
    group.add_argument("--nproc", type=int, metavar="N", help=nproc or usual)
    group.add_argument("--tp", type=int, metavar="T", help="ranks that divide each layer; default: those of --nproc")
    group.add_argument("--pp", type=int, metavar="P", help="ranks that divide the layers among them: 1")
    group.add_argument("--log-dir", type=Path, metavar="DIR", help="the ranks' logs; default: kept where they failed")
    parser.set_defaults(team=None, divides=nproc is None, process=None, copies=1)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how tokens are chosen", "default: the model's generation_config.json, else greedy"
    )
    for name, kind, what in (
        ("max-new-tokens", int, "most tokens of an answer; default: 256"), ("min-new-tokens", int, "least of them: 0"),
        ("temperature", float, "0 is greedy"), ("top-k", int, "0: all"), ("top-p", float, "1: all"),
        ("min-p", float, "least probability beside the most likely token's"),
        ("repetition-penalty", float, "of tokens of prompt and answer"),
        ("presence-penalty", float, "of tokens of the answer"),
        ("frequency-penalty", float, "the same, for each time"), ("seed", int, "of the random numbers: 0"),
        ("logprobs", int, "write log-probabilities, with this number of alternatives"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, metavar="X", help=what)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer, and is left out; repeatable")
    group.add_argument("--stop-token", action="append", type=int, metavar="ID", help="ends it as well; repeatable")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on up to --max-new-tokens")
    group.add_argument("--json-schema", type=Path, metavar="FILE", help="answers are JSON after this schema")
    group.add_argument("--regex", metavar="PATTERN", help="answers match this")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; repeatable")


def _add_media(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures and videos", "default: what the model's directory says")
    group.add_argument("--min-pixels", type=int, metavar="N", help="a picture is made no smaller")
    group.add_argument("--max-pixels", type=int, metavar="N", help="nor larger")
    group.add_argument("--video-preset", choices=sorted(PRESETS), help="qwen: 2 frames a second (default); mindie: 0.5")
    group.add_argument("--fps", type=float, metavar="X", help="frames of a second of video, whatever the preset")
    group.add_argument("--max-frames", type=int, metavar="N", help="most frames of a video: 768")
