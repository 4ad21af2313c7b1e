"""`--from-mindspeed` of `duetvl infer` and `duetvl eval`: options of MindSpeed-MM's files where none are given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duetvl.convert.mindspeed import is_mindspeed
from duetvl.migrate.evaluation_keys import read_evaluation
from duetvl.migrate.inference_keys import read_inference


def apply(args: argparse.Namespace) -> Iterator[str]:
    """Put what the file says into the options; the lines of the report. Raises ConfigError."""
    options, report = read_inference(args.from_mindspeed, allow_unknown=args.allow_unknown)
    pretrained, asked = options.pop("pretrained"), {name: options.pop(name) for name in ("prompt", "media")}
    if args.prompt is None and args.input is None:
        args.prompt = asked["prompt"]
        args.media = args.media or asked["media"]
    _take(args, options, pretrained)
    return report.lines()


def apply_evaluation(args: argparse.Namespace) -> Iterator[str]:
    """Put what an evaluate_*.json says into the options of `duetvl eval`; the lines of the report. ConfigError."""
    options, report = read_evaluation(args.from_mindspeed, allow_unknown=args.allow_unknown)
    _take(args, options, options.pop("pretrained"))
    return report.lines()


def _take(args: argparse.Namespace, options: dict[str, Any], pretrained: str | None) -> None:
    """What the user has given comes first."""
    for name, value in options.items():
        if value is not None and getattr(args, name) is None:
            setattr(args, name, value)
    if args.model is None:
        args.model = pretrained
    elif args.base is None and pretrained and is_mindspeed(Path(args.model)):
        args.base = pretrained
