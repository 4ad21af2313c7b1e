"""The command `mm-convert`: the command lines of the tool of that name in MindSpeed-MM, read by the same library.

    mm-convert Qwen2VLConverter hf_to_mm --cfg.mm_dir OUT --cfg.hf_config.hf_dir HF \\
        --cfg.parallel_config.llm_pp_layers [[1,10,10,7]] --cfg.parallel_config.vit_pp_layers [[32,0,0,0]]
    mm-convert verify A B
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Final

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from duetvl.convert import arguments, commands
from duetvl.convert.options import (
    COMMANDS,
    CommonModelConfig,
    HfToMm,
    LoraHfToMm,
    LoraMmToHf,
    MmToHf,
    Ours,
    Resplit,
    SourcePath,
    Verify,
    layout_of,
    stated,
)
from duetvl.convert.plans import Options
from duetvl.convert.verify import Difference
from duetvl.convert.verify import verify as compare
from duetvl.core.errors import ConfigError, DuetvlError
from duetvl.core.streams import discard_output, open_streams
from duetvl.version import __version__

DIFFERENT: Final = 1
USER_ERROR: Final = 2
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 1 where `verify` finds differences, 2 for a mistake of the user, 130 after an interrupt."""
    open_streams()
    try:
        with _tidy_when_terminated():
            return _run(sys.argv[1:] if argv is None else list(argv))
    except DuetvlError as error:
        if os.environ.get("DUETVL_DEBUG") == "1":
            raise
        _say(f"error: {error}", sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of --help, such as `head`, has gone
        discard_output()
        return 0
    except OSError as error:
        discard_output()  # a full disk may be where it goes
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted; nothing was left behind", sys.stderr)
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    words = arguments.prepared(argv)
    if not words or words[0] in ("-h", "--help", "--version"):
        _say(f"mm-convert {__version__}" if words[-1:] == ["--version"] else _HELP)
        return 0
    names = arguments.check(words)
    if not names:
        raise ConfigError(f"{words[0]}: the name of a converter, or verify, comes first; see mm-convert --help")
    parser = _parser(names)
    try:
        found = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise ConfigError(arguments.in_one_line(str(error))) from None
    except SystemExit as end:  # after --help and the like
        return int(end.code or 0)
    if names[0] == "verify":
        return _verify(found.verify)
    _CALLS[names[1]](found[names[0]][names[1]].cfg, _FAMILIES[names[0]])
    return 0


def _parser(names: Sequence[str]) -> ArgumentParser:
    """Of these names alone: that of every command takes half a second to make."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    root = _new_parser(prog="mm-convert")
    group = root.add_subcommands()
    if names[:1] == ["verify"]:
        parser = _command_parser("verify")
        for place, text in (("a", _COMPARABLE), ("b", "what it is compared with")):
            parser.add_argument(place, type=SourcePath, help=text)
        group.add_subcommand("verify", parser)
    for converter in names[:1] if names[:1] != ["verify"] else ():
        parser = _new_parser(description=f"{converter}: convert weights.")
        group.add_subcommand(converter, parser)
        commands_of = parser.add_subcommands()
        for name in arguments.CONVERSIONS:
            inner = _command_parser(name) if name in names[1:] else _new_parser()
            commands_of.add_subcommand(name, inner, help=arguments.TITLES[name])
    return root


def _command_parser(command: str) -> ArgumentParser:
    parser = _new_parser(description=f"{arguments.TITLES[command]}.")
    parser.add_argument("--cfg", type=COMMANDS[command])
    return parser


def _new_parser(**more: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **more)
    parser.add_argument("--config", action="config", help="a YAML file with keys, as --print_config=comments prints it")
    return parser


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


# -- commands ---------------------------------------------------------------------------------------------------------


def _hf_to_mm(cfg: HfToMm, family: str) -> None:
    model = cfg.common_model_config
    language = cfg.llm_hf_config.hf_dir or model.llm_hf_dir
    layout = layout_of(cfg.parallel_config, "parallel_config", cfg.vit_qkv_layout, canonical=_canonical(model),
                       replicate=cfg.replicate_kv)  # fmt: skip
    commands.hf_to_mm(
        Path(cfg.hf_config.hf_dir),
        Path(cfg.mm_dir),
        layout,
        _options(cfg),
        family=family,
        language_dir=Path(language) if language else None,
        vision_only=cfg.save_vit_only,
        kind=cfg.format,
    )


def _mm_to_hf(cfg: MmToHf, family: str) -> None:
    layout = layout_of(cfg.parallel_config, "parallel_config", cfg.vit_qkv_layout,
                       canonical=_canonical(cfg.common_model_config), replicate=cfg.replicate_kv)  # fmt: skip
    directories = Path(cfg.mm_dir), Path(cfg.hf_config.hf_dir), Path(cfg.save_hf_dir)
    commands.mm_to_hf(*directories, layout, _options(cfg), family=family)


def _resplit(cfg: Resplit, family: str) -> None:
    source = layout_of(cfg.source_parallel_config, "source_parallel_config", cfg.source_vit_qkv_layout,
                       replicate=cfg.replicate_kv)  # fmt: skip
    target = layout_of(cfg.target_parallel_config, "target_parallel_config", cfg.target_vit_qkv_layout,
                       replicate=cfg.replicate_kv)  # fmt: skip
    directories, base = (Path(cfg.source_dir), Path(cfg.target_dir)), cfg.hf_config.hf_dir
    hf_dir = Path(base) if base else None
    commands.resplit(*directories, source, target, _options(cfg), hf_dir=hf_dir, family=family, kind=cfg.format)


def _lora_hf_to_mm(cfg: LoraHfToMm, family: str) -> None:
    model = cfg.common_model_config
    if not _canonical(model):
        raise ConfigError(
            "--cfg.common_model_config.enable_canonical_hf_struct must be true: separate adapters for q, k and v "
            "have no equivalent on fused tensors"
        )
    layout = layout_of(cfg.parallel_config, "parallel_config", canonical=True)
    directories = Path(cfg.hf_config.hf_dir), Path(cfg.mm_dir)
    commands.lora_hf_to_mm(
        *directories, layout, _options(cfg), prefix=model.model_prefix, family=family, kind=cfg.format
    )


def _lora_mm_to_hf(cfg: LoraMmToHf, family: str) -> None:
    model, hf_dir = cfg.common_model_config, cfg.hf_config.hf_dir
    commands.lora_mm_to_hf(
        Path(cfg.mm_dir),
        Path(cfg.save_hf_dir),
        layout_of(cfg.parallel_config, "parallel_config", cfg.vit_qkv_layout, canonical=_canonical(model)),
        _options(cfg),
        prefix=model.model_prefix,
        new_names=model.new_transformers_weight_key,
        family=family,
        hf_dir=Path(hf_dir) if hf_dir else None,
    )


def _verify(found: Namespace) -> int:
    cfg: Verify = found.cfg
    hf_dir = Path(cfg.hf_config.hf_dir) if cfg.hf_config.hf_dir else None
    orders = stated(cfg.a_vit_qkv_layout), stated(cfg.b_vit_qkv_layout)
    equal, different = 0, 0
    for one in compare(Path(found.a), Path(found.b), orders=orders, hf_dir=hf_dir, say=_say):
        if isinstance(one, Difference):
            _say(f"{one.name}: {one.text}")
        different += isinstance(one, Difference)
        equal += not isinstance(one, Difference)
    _say(f"{equal} tensor(s) equal, {different} difference(s)")
    return DIFFERENT if different else 0


_CALLS: Final[Mapping[str, Callable[[Any, str], None]]] = {
    "hf_to_mm": _hf_to_mm,
    "mm_to_hf": _mm_to_hf,
    "resplit": _resplit,
    "lora_hf_to_mm": _lora_hf_to_mm,
    "lora_mm_to_hf": _lora_mm_to_hf,
}
_FAMILIES: Final = {name: family for family, name in commands.FAMILIES.items()}
_COMPARABLE: Final = "a Hugging Face directory, a MindSpeed-MM directory, a run of duetvl or one of its checkpoints"


def _canonical(model: CommonModelConfig) -> bool:
    return model.enable_canonical_hf_struct


def _options(cfg: Ours) -> Options:
    workers = int(cfg.workers) or min(os.cpu_count() or 1, 4)
    return Options(cfg.overwrite, cfg.dry_run, workers, _progress, _say)


# -- what is said -----------------------------------------------------------------------------------------------------

_HELP: Final = """usage: mm-convert CONVERTER COMMAND --cfg.KEY VALUE ...
       mm-convert verify A B

Convert weights of Qwen2-VL and Qwen2.5-VL between Hugging Face and MindSpeed-MM.

converters:
  Qwen2VLConverter, Qwen2_5_VLConverter
commands:
{commands}

`mm-convert CONVERTER COMMAND --help` explains every key; docs/mm_convert.md has examples.
Keys may also come from
  --config FILE           a YAML file, as --print_config (or --print_config=comments) prints it
  --cfg.parallel_config '{"tp_size": 2}'   a whole section as JSON
  JSONARGPARSE_DEFAULT_ENV=true MM_CONVERT_QWEN2VLCONVERTER__HF_TO_MM__CFG__PARALLEL_CONFIG__TP_SIZE=2""".replace(
    "{commands}", "\n".join(f"  {name:15}{title}" for name, title in arguments.TITLES.items())
)


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


def _say(text: str, stream: Any = None) -> None:
    out = stream or sys.stdout
    try:
        out.write(text + "\n")
        out.flush()
    except BrokenPipeError:  # no reason to end a conversion
        discard_output()


if __name__ == "__main__":
    sys.exit(main())
