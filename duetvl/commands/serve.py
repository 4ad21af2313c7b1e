"""`duetvl serve`: a model, and adapters beside it, over HTTP as OpenAI's clients speak it."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from duetvl.api import Model
from duetvl.commands.session import Opened, Say, load, make_engine, open_for_answers
from duetvl.core.errors import ConfigError, shown
from duetvl.models.qwen_vl.adapters import open_adapter_for

if TYPE_CHECKING:
    from duetvl.serving.answering import Answering
    from duetvl.serving.limits import Keys, Limits
    from duetvl.serving.media import MediaPolicy

_NEEDED: Final = ("fastapi", "uvicorn", "prometheus_client")
_LIMITS: Final = {
    "max_body_bytes": "body_bytes", "max_requests": "requests", "max_requests_per_key": "per_key",
    "max_prompt_tokens": "prompt_tokens", "max_output_tokens": "output_tokens", "timeout": "seconds",
}  # fmt: skip
_MEDIA: Final = {
    "media_root": "root", "max_media_bytes": "max_bytes", "max_media_pixels": "max_pixels",
    "max_video_seconds": "max_video_seconds", "max_media": "max_media",
}  # fmt: skip


def serve(args: argparse.Namespace, say: Say) -> int:
    """Serve until a signal comes; the exit status, see `serving.server.Server`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"duetvl serve needs {', '.join(missing)}: pip install 'duetvl[serve]'")
    from duetvl.serving.app import create_app
    from duetvl.serving.limits import Keys
    from duetvl.serving.server import DRAIN, Server, bind

    _check_counts(args)
    keys = Keys.read(args.api_key_file, os.environ)
    limits, policy = _limits(args), _policy(args)
    adapters = adapters_of(args.adapters or ())
    names = served_names(args.served_name, args.model, adapters)
    opened = open_for_answers(args, say)
    for directory in adapters.values():
        open_adapter_for(opened.source.config, directory)
    bound = bind(args.host, args.port)  # before weights are read, which may take minutes
    answering = _answering(args, opened, load(args, opened, say), names, adapters, limits, policy)
    server = Server(
        create_app(answering, keys),
        answering,
        bound=bound,
        drain=DRAIN if args.drain is None else args.drain,
        log_form=args.log_format,
    )
    _tell_who_may_ask(args.host, keys, say)
    host, port = server.address
    say(f"models: {', '.join(names)}; tokens of prompt and answer: {answering.engine.longest}")
    say(f"chat page: {_url(host, port)}/  OpenAI's clients: {_url(host, port)}/v1")
    # What was made up to here stays. A full collection would look at all of it each time, and nobody gets an answer
    # for a tenth of a second.
    gc.collect()
    gc.freeze()
    return server.serve_until_stopped()


def _check_counts(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that make no sense."""
    for name, least in (("context", 2), ("prepare_threads", 1), ("drain", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected {least} or more")


def adapters_of(given: Sequence[str]) -> dict[str, Path]:
    """Names and directories of `NAME=DIR`. ConfigError."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not equals or not name or not directory:
            raise ConfigError(f"--adapter {shown(text)}: expected NAME=DIR, the name that requests give as their model")
        if name in adapters:
            raise ConfigError(f"--adapter {text}: the name {shown(name)} is given twice")
        adapters[name] = Path(directory)
    return adapters


def served_names(own: Sequence[str] | None, model: str, adapters: Mapping[str, Path]) -> dict[str, str]:
    """Served name -> the engine's adapter, the model's own names first. ConfigError for a name that two have."""
    base = list(own or [Path(model).resolve().name if Path(model).exists() else model])
    if both := [name for name in base if name in adapters]:
        raise ConfigError(f"--adapter {both[0]}={adapters[both[0]]}: the model itself has this name")
    return {**dict.fromkeys(base, ""), **{name: name for name in adapters}}


def _answering(
    args: argparse.Namespace,
    opened: Opened,
    model: Model,
    names: Mapping[str, str],
    adapters: Mapping[str, Path],
    limits: Limits,
    policy: MediaPolicy,
) -> Answering:
    from duetvl.serving.answering import THREADS, Answering
    from duetvl.serving.media import Media
    from duetvl.serving.metrics import Metrics

    model.processor.media = replace(model.processor.media, decode_seconds=policy.decode_seconds)
    beside = {name: model.with_adapter(directory) for name, directory in adapters.items()}
    engine = make_engine(model, args, adapters=beside, defaults=opened.defaults, context=args.context)
    return Answering(
        engine,
        model.processor,
        names,
        media=Media(policy),
        limits=limits,
        metrics=Metrics(list(names)),
        threads=args.prepare_threads or THREADS,
    )


def _limits(args: argparse.Namespace) -> Limits:
    from duetvl.serving.limits import Limits

    return Limits(**_given(args, _LIMITS))


def _policy(args: argparse.Namespace) -> MediaPolicy:
    from duetvl.serving.media import MediaPolicy

    return MediaPolicy(hosts=tuple(args.media_host or ()), **_given(args, _MEDIA))


def _given(args: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """What the options say, under the names of fields; what they leave open is left to those."""
    return {field: value for option, field in names.items() if (value := getattr(args, option)) is not None}


def _tell_who_may_ask(host: str, keys: Keys, say: Say) -> None:
    if not keys and not _is_loopback(host):
        say(f"--host {host} without keys: anyone who reaches this machine can use it; see --api-key-file")


def _url(host: str, port: int) -> str:
    """As one types it on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
