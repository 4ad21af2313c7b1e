"""The command `mm-convert`, with the grammar of the tool of that name in MindSpeed-MM.

    mm-convert Qwen2VLConverter hf_to_mm --cfg.mm_dir OUT --cfg.hf_config.hf_dir HF \\
        --cfg.parallel_config.llm_pp_layers [[1,10,10,7]] --cfg.parallel_config.vit_pp_layers [[32,0,0,0]]
    mm-convert verify A B
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Final

from duetvl.convert import commands
from duetvl.convert.layouts import Layout
from duetvl.convert.options import (
    COMMANDS,
    REQUIRED,
    Key,
    as_yaml,
    complete,
    describe,
    flatten,
    from_environment,
    parse_flags,
)
from duetvl.convert.plans import Options
from duetvl.convert.verify import Difference, verify
from duetvl.core.errors import ConfigError, DuetvlError, did_you_mean
from duetvl.version import __version__

DIFFERENT: Final = 1
USER_ERROR: Final = 2
INTERRUPTED: Final = 130

_CONVERSIONS: Final = ("hf_to_mm", "mm_to_hf", "resplit", "lora_hf_to_mm", "lora_mm_to_hf")
CONVERTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "Qwen2VLConverter": ("qwen2_vl", _CONVERSIONS),
    "Qwen2_5_VLConverter": ("qwen2_5_vl", _CONVERSIONS),
}
_NEEDLESS: Final = {
    "hf_to_mm_dcp": "training needs no conversion to DCP: it reads each rank's slices straight from the Hugging Face "
    "directory (model.path in the recipe); for MindSpeed-MM's own trainer use hf_to_mm",
    "hf_to_mm_ldt": "the division between edge and cloud is not offered; use hf_to_mm",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 1 where `verify` finds differences, 2 for a mistake of the user, 130 after an interrupt."""
    try:
        with _tidy_when_terminated():
            return _run(sys.argv[1:] if argv is None else list(argv))
    except DuetvlError as error:
        if os.environ.get("DUETVL_DEBUG") == "1":
            raise
        _say(f"error: {error}", sys.stderr)
        return USER_ERROR
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted; nothing was left behind", sys.stderr)
        return INTERRUPTED


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """SIGTERM as Ctrl-C."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run(argv: list[str]) -> int:
    files: list[str] = []
    while argv[:1] == ["--config"] and len(argv) > 1:  # before the names as well as after
        files.append(argv[1])
        argv = argv[2:]
    if not argv or argv[0] in ("-h", "--help"):
        return _tell(_HELP)
    if argv[0] == "--version":
        return _tell(f"mm-convert {__version__}")
    if argv[0] == "verify":
        return _verify(argv[1:])
    if argv[0] not in CONVERTERS:
        raise ConfigError(f"there is no converter {argv[0]!r}{did_you_mean(argv[0], [*CONVERTERS, 'verify'])}")
    return _convert(argv[0], argv[1:], files)


def _convert(converter: str, argv: list[str], files: list[str]) -> int:
    family, known = CONVERTERS[converter]
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:16}{COMMANDS[name][0]}" for name in known]
        return _tell("\n".join([f"usage: mm-convert {converter} COMMAND --cfg.KEY VALUE ...", "", *lines]))
    command = argv[0]
    if command in _NEEDLESS and family == "qwen2_5_vl":
        raise ConfigError(f"{command}: {_NEEDLESS[command]}")
    if command not in known:
        raise ConfigError(f"{converter} has no command {command!r}{did_you_mean(command, known)}")
    title, keys = COMMANDS[command]
    rest, shown = _take_print_config(argv[1:])
    if {"-h", "--help"} & set(rest):
        usage = f"usage: mm-convert {converter} {command} --cfg.KEY VALUE ..."
        return _tell("\n".join([usage, "", f"{title}.", "", *describe(keys), "", _WAYS]))
    values = from_environment(os.environ, keys, f"MM_CONVERT_{converter}__{command}")
    flags = parse_flags(rest, keys, files)
    for file in files:
        values |= flatten(_read_config(Path(file), converter, command), keys, file)
    values |= flags
    if shown is not None:
        return _tell("\n".join(as_yaml(keys, values, shown)))
    _CALLS[command](complete(values, keys), family)
    return 0


def _take_print_config(argv: list[str]) -> tuple[list[str], list[str] | None]:
    rest = [word for word in argv if word.partition("=")[0] != "--print_config"]
    found = [word for word in argv if word.partition("=")[0] == "--print_config"]
    return rest, found[-1].partition("=")[2].split(",") if found else None


def _read_config(path: Path, converter: str, command: str) -> Any:
    import yaml  # only here: conversion needs no more than numpy

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {cause}") from None
    for name in (converter, command, "cfg"):  # whichever of these levels the file has
        if isinstance(tree, dict) and set(tree) == {name}:
            tree = tree[name]
    return tree


# -- commands ---------------------------------------------------------------------------------------------------------


def _hf_to_mm(values: Mapping[str, Any], family: str) -> None:
    language = values["llm_hf_config.hf_dir"] or values["common_model_config.llm_hf_dir"]
    commands.hf_to_mm(
        values["hf_config.hf_dir"],
        values["mm_dir"],
        _layout(values, "parallel_config"),
        _options(values),
        family=family,
        language_dir=language,
        vision_only=values["save_vit_only"],
        kind=values["format"],
    )


def _mm_to_hf(values: Mapping[str, Any], family: str) -> None:
    layout = _layout(values, "parallel_config")
    directories = values["mm_dir"], values["hf_config.hf_dir"], values["save_hf_dir"]
    commands.mm_to_hf(*directories, layout, _options(values), family=family)


def _resplit(values: Mapping[str, Any], family: str) -> None:
    commands.resplit(
        values["source_dir"],
        values["target_dir"],
        _layout(values, "source_parallel_config", "source_vit_qkv_layout"),
        _layout(values, "target_parallel_config", "target_vit_qkv_layout"),
        _options(values),
        hf_dir=values["hf_config.hf_dir"],
        family=family,
        kind=values["format"],
    )


def _lora_hf_to_mm(values: Mapping[str, Any], family: str) -> None:
    _need_canonical(values)
    commands.lora_hf_to_mm(
        values["hf_config.hf_dir"],
        values["mm_dir"],
        _layout(values, "parallel_config"),
        _options(values),
        prefix=values["common_model_config.model_prefix"],
        family=family,
        kind=values["format"],
    )


def _lora_mm_to_hf(values: Mapping[str, Any], family: str) -> None:
    commands.lora_mm_to_hf(
        values["mm_dir"],
        values["save_hf_dir"],
        _layout(values, "parallel_config"),
        _options(values),
        prefix=values["common_model_config.model_prefix"],
        new_names=values["common_model_config.new_transformers_weight_key"],
        family=family,
        hf_dir=values["hf_config.hf_dir"],
    )


_CALLS: Final = {
    "hf_to_mm": _hf_to_mm,
    "mm_to_hf": _mm_to_hf,
    "resplit": _resplit,
    "lora_hf_to_mm": _lora_hf_to_mm,
    "lora_mm_to_hf": _lora_mm_to_hf,
}


def _need_canonical(values: Mapping[str, Any]) -> None:
    if not values["common_model_config.enable_canonical_hf_struct"]:
        raise ConfigError(
            "--cfg.common_model_config.enable_canonical_hf_struct must be true: an adapter for q, k and v each has no "
            "equal on fused tensors"
        )


def _layout(values: Mapping[str, Any], section: str, order: str = "vit_qkv_layout") -> Layout:
    if values[f"{section}.ep_size"] != 1:
        raise ConfigError(f"--cfg.{section}.ep_size must be 1: these models have no experts")
    if values[f"{section}.audio_pp_layers"] or values[f"{section}.audio_tp_size"]:
        raise ConfigError(f"--cfg.{section}.audio_*: these models have no audio tower; leave it out")
    return Layout(
        values[f"{section}.llm_pp_layers"],
        values[f"{section}.vit_pp_layers"],
        values[f"{section}.tp_size"],
        values[f"{section}.vit_tp_size"],
        bool(values.get("common_model_config.enable_canonical_hf_struct")),
        values.get(order),
        bool(values.get("replicate_kv")),
    )


def _options(values: Mapping[str, Any]) -> Options:
    workers = values["workers"] or min(os.cpu_count() or 1, 4)
    return Options(values["overwrite"], values["dry_run"], workers, _progress, _say)


def _verify(argv: list[str]) -> int:
    title, keys = COMMANDS["verify"]
    paths = []
    while argv and not argv[0].startswith("-"):
        paths.append(Path(argv.pop(0)))
    if {"-h", "--help"} & set(argv):
        usage = "usage: mm-convert verify A B [--cfg.KEY VALUE ...]"
        return _tell("\n".join([usage, "", f"{title}.", "", *describe(keys)]))
    values = complete(parse_flags(argv, keys, []), keys)
    if len(paths) != 2:
        raise ConfigError(f"verify takes two directories, found {len(paths)}")
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such directory")
    orders = values["a_vit_qkv_layout"], values["b_vit_qkv_layout"]
    equal, different = 0, 0
    for found in verify(paths[0], paths[1], orders=orders, hf_dir=values["hf_config.hf_dir"], say=_say):
        if isinstance(found, Difference):
            _say(f"{found.name}: {found.text}")
        different += isinstance(found, Difference)
        equal += not isinstance(found, Difference)
    _say(f"{equal} tensor(s) equal, {different} difference(s)")
    return DIFFERENT if different else 0


# -- what is said -----------------------------------------------------------------------------------------------------

_HELP: Final = f"""usage: mm-convert CONVERTER COMMAND --cfg.KEY VALUE ...
       mm-convert verify A B

Convert weights of Qwen2-VL and Qwen2.5-VL between Hugging Face and MindSpeed-MM.

converters:
  Qwen2VLConverter      {", ".join(CONVERTERS["Qwen2VLConverter"][1])}
  Qwen2_5_VLConverter   {", ".join(CONVERTERS["Qwen2_5_VLConverter"][1])}
commands:
{chr(10).join(f"  {name:22}{title}" for name, (title, _) in COMMANDS.items())}

`mm-convert CONVERTER COMMAND --help` explains every key; docs/mm_convert.md has examples."""
_WAYS: Final = """Other ways to give keys:
  --config FILE           a YAML file, as --print_config (or --print_config=comments) prints it
  --cfg.parallel_config '{"tp_size": 2}'   a whole section as JSON
  JSONARGPARSE_DEFAULT_ENV=true MM_CONVERT_CONVERTER__COMMAND__CFG__PARALLEL_CONFIG__TP_SIZE=2"""


def _progress(size: int) -> Any:
    """A bar with bytes and remaining time, where someone is looking."""
    if not sys.stderr.isatty():
        return None
    with suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

        return _Bar(tqdm(total=size, unit="B", unit_scale=True, desc="writing"))
    return None


class _Bar:
    """A progress bar that is called."""

    def __init__(self, bar: Any):
        self.bar = bar

    def __call__(self, size: int) -> None:
        self.bar.update(size)

    def close(self) -> None:
        self.bar.close()


def _tell(text: str) -> int:
    _say(text)
    return 0


def _say(text: str, stream: Any = None) -> None:
    out = stream or sys.stdout
    out.write(text + "\n")
    out.flush()


__all__ = ["CONVERTERS", "REQUIRED", "Key", "main"]

if __name__ == "__main__":
    sys.exit(main())
