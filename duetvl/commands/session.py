"""A model that answers, and how: what the options, the model's own defaults and ours come to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from duetvl.api import Model, load_model
from duetvl.commands.options import PRESETS
from duetvl.commands.over_ranks import Team, backend_name
from duetvl.convert.opening import open_model
from duetvl.core.backend import Backend, load_backend
from duetvl.core.batch import Sample
from duetvl.core.device import Device
from duetvl.core.errors import ConfigError, shown
from duetvl.data.encode import Processor
from duetvl.data.media.plan import MediaSettings
from duetvl.inference.defaults import Defaults, read_defaults
from duetvl.inference.engine import Engine
from duetvl.inference.guided import Grammars, Guides
from duetvl.inference.lead import Load
from duetvl.inference.output import check_stops
from duetvl.inference.request import Request
from duetvl.inference.sampling import MOST_ALTERNATIVES, Sampling, check_count
from duetvl.models.model_directory import ModelDirectory
from duetvl.storage.files import read_json

Say = Callable[[str], None]
MAX_NEW_TOKENS: Final = 256
_SAMPLED: Final = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How answers are made."""

    sampling: Sampling
    max_new_tokens: int = MAX_NEW_TOKENS
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None

    def request(self, prompt: Sample, id: str = "", **more: Any) -> Request:
        """One prompt to the engine."""
        return Request(
            prompt=prompt,
            id=id,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            stop=self.stop,
            stop_ids=self.stop_ids,
            logprobs=self.logprobs,
            **more,
        )


@dataclass(frozen=True)
class Opened:
    """A model that is found, with its processor; no framework is loaded, and no weight read."""

    source: ModelDirectory
    processor: Processor
    defaults: Defaults


def open_for_answers(args: argparse.Namespace, say: Say) -> Opened:
    """Find the model of the options. What its defaults take over is said."""
    source = open_model(args.model, base=args.base)
    check_stop_tokens(args, source.family.vocabulary)
    processor = Processor.from_directory(source.path, source.family)
    processor.media = media_settings(processor.media, args)
    defaults = read_defaults(source.path, processor)
    if defaults.told:
        say(defaults.told)
    return Opened(source, processor, defaults)


def load(args: argparse.Namespace, opened: Opened, say: Say) -> Model:
    """Read the model onto its backend, in the dtype of the options; over ranks, this one's part of it."""
    team: Team | None = args.team
    backend = team.backend if team else _backend_alone(args)
    dtype = dtype_of(args.dtype, opened.source.config.dtype, backend.device)
    where = f"; {team.lead.ranks.count} ranks, tp {team.mesh.tp} x pp {team.mesh.pp}" if team else ""
    say(f"{args.model}: {dtype} on {backend.name}, {backend.device.name}{where}")
    if team:
        model = team.load(Load(args.model, dtype, args.adapter, args.base))
    else:
        model = load_model(args.model, backend=backend, dtype=dtype, adapter=args.adapter, base=args.base)
    model.processor.media = opened.processor.media
    return model


def _backend_alone(args: argparse.Namespace) -> Backend:
    backend = load_backend(backend_name(args), device=args.device or "auto")
    if (count := backend.collectives.launched()) > 1:
        raise ConfigError(
            f"this is one of {count} processes that torchrun or msrun started; have duetvl start them: --nproc {count}"
        )
    return backend


def dtype_of(asked: str | None, stored: str | None, device: Device) -> str:
    """The one that is asked for; else the stored one, or what comes next of half precision and float32 that the device
    has. ConfigError for one that it does not have."""
    if asked not in (None, "auto"):
        if not device.supports(asked):
            others = " or ".join(name for name in ("bfloat16", "float16", "float32") if device.supports(name))
            raise ConfigError(f"--dtype {asked}: the device {device.name} does not support it; use {others}")
        return asked
    halves = {"bfloat16": ("bfloat16", "float16"), "float16": ("float16",)}.get(stored or "", ())
    return next((name for name in halves if device.supports(name)), "float32")


def make_engine(model: Model, args: argparse.Namespace, **usual: Any) -> Engine:
    """The engine of a model; what the options say of its size comes before what is `usual`."""
    sizes = ("cache_tokens", "max_sequences", "media_tokens")
    given = {name: value for name in sizes if (value := getattr(args, name)) is not None}
    team: Team | None = args.team
    if team and usual.get("adapters"):
        team.adapt(usual["adapters"])
    lead = team.lead if team else None
    return Engine(model, tokenizer=model.processor.tokenizer, lead=lead, **{**usual, **given})


def guides_of(args: argparse.Namespace, opened: Opened, way: Way) -> Guides | None:
    """The grammar that answers follow, None for none. ConfigError."""
    asked = {"--json-schema": args.json_schema, "--regex": args.regex, "--choice": args.choice}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: an answer can follow one grammar; give one of them")
    if not given:
        return None
    grammars = Grammars(opened.processor.tokenizer, opened.source.family.vocabulary, sorted(way.stop_ids))
    if args.json_schema is not None:
        return grammars.json_schema(read_json(args.json_schema, ConfigError))
    return grammars.regex(args.regex) if args.regex is not None else grammars.choice(args.choice)


def check_way(args: argparse.Namespace) -> None:
    """Raise ConfigError, before anything is read, for values that make no sense whatever the model."""
    way_of(args, Defaults())


def check_stop_tokens(args: argparse.Namespace, vocabulary: int) -> None:
    """Raise ConfigError for a token that the model cannot choose."""
    if beyond := [number for number in getattr(args, "stop_token", None) or () if number >= vocabulary]:
        raise ConfigError(f"--stop-token {beyond[0]}: is not one of the model's {vocabulary} tokens")


def way_of(args: argparse.Namespace, defaults: Defaults) -> Way:
    """How answers are made: the options where they say something, else the model's defaults. ConfigError."""
    given = {name: value for name in _SAMPLED if (value := getattr(args, name)) is not None}
    most = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    least = args.min_new_tokens or 0
    if most < 1 or not 0 <= least <= most:
        raise ConfigError(
            f"--max-new-tokens {most}, --min-new-tokens {least}: expected at least 1, and a minimum that is no larger"
        )
    if args.logprobs is not None:
        check_count("--logprobs", args.logprobs, MOST_ALTERNATIVES)
    check_stops(args.stop or [])
    ends = defaults.stop_ids | frozenset(args.stop_token or ())
    if any(number < 0 for number in ends):
        raise ConfigError(f"--stop-token {min(ends)}: is not a token id")
    return Way(
        replace(defaults.sampling, **given),
        most,
        least,
        tuple(args.stop or ()),
        frozenset(args.stop_token or ()) if args.ignore_eos else ends,
        args.logprobs,
    )


def media_settings(own: MediaSettings, args: argparse.Namespace) -> MediaSettings:
    """The model directory's settings with what the options say instead. ConfigError."""
    low = own.image.min_pixels if args.min_pixels is None else args.min_pixels
    high = own.image.max_pixels if args.max_pixels is None else args.max_pixels
    if not 0 < low <= high:
        raise ConfigError(
            f"pictures of {low} to {high} pixels are not a valid range; give --min-pixels and --max-pixels"
        )
    fps = args.fps if args.fps is not None else PRESETS[args.video_preset or "qwen"]
    most = own.frames.max_frames if args.max_frames is None else args.max_frames
    if not 0 < fps < 1e4 or most < 2:
        raise ConfigError(f"--fps {shown(fps)}, --max-frames {most}: expected above 0, and at least 2")
    frames = replace(own.frames, fps=fps, max_frames=most)
    return replace(own, image=replace(own.image, min_pixels=low, max_pixels=high), frames=frames)
