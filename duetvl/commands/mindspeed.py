"""`duetvl infer --from-mindspeed`: options from an inference_*.json, where the user gives none."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from duetvl.convert.mindspeed import is_mindspeed
from duetvl.migrate.inference_keys import read_inference


def apply(args: argparse.Namespace) -> Iterator[str]:
    """Put what the file says into the options; the lines of the report. Raises ConfigError."""
    options, report = read_inference(args.from_mindspeed, allow_unknown=args.allow_unknown)
    pretrained, asked = options.pop("pretrained"), {name: options.pop(name) for name in ("prompt", "media")}
    if args.prompt is None and args.input is None:
        args.prompt = asked["prompt"]
        args.media = args.media or asked["media"]
    for name, value in options.items():
        if value is not None and getattr(args, name) is None:
            setattr(args, name, value)
    if args.model is None:
        args.model = pretrained
    elif args.base is None and pretrained and is_mindspeed(Path(args.model)):
        args.base = pretrained
    return report.lines()
