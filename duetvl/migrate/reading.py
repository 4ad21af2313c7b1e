"""The three files of a run: data.json and model.json as flat keys, the script as its program's arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.migrate.report import Report
from duetvl.migrate.script import OTHER_TASKS, advice, options
from duetvl.migrate.shell.run import read_script
from duetvl.migrate.shell.simple import Script, Start
from duetvl.migrate.shell.values import Text
from duetvl.migrate.tables import SCRIPT
from duetvl.storage.files import read_object
from duetvl.training.recipe.text import show

_MARKS: Final = {
    "evaluation": ("evaluation_dataset", "evaluation_model", "result_output_path"),
    "inference": ("pipeline_class", "prompts", "generation_config"),
    "data": ("dataset_param", "dataloader_param"),
    "model": ("text_decoder", "image_encoder"),
}
_LARGEST: Final = 8 * 2**20
_ORDER: Final = "the order is data.json model.json script.sh"


def read_keys(path: Path, kind: str) -> dict[str, Any]:
    """The keys of a data.json or model.json, dotted; an empty object stands for itself.

    ConfigError for a file of another kind, which is named, and where a key is given twice.
    """
    check_task(path)
    if path.suffix == ".sh":
        raise ConfigError(f"{path}: is a script, where {kind}.json is expected; {_ORDER}")
    values = read_object(path, ConfigError)
    if kind not in (found := _kinds(values)):
        what = f"is a {found[0]}.json" if found else f"has none of {', '.join(_MARKS[kind])}, as a {kind}.json has"
        raise ConfigError(f"{path}: {what}, where {kind}.json is expected; {_ORDER}")
    return flat_keys(values)


def check_task(path: Path) -> None:
    """Raise ConfigError for a file that cannot be read, and for one of inference or evaluation, whatever its place."""
    _check_file(path)
    name = path.name.partition("_")[0]
    task = OTHER_TASKS.get(name, "") if path.suffix == ".sh" else ""
    if path.suffix == ".json":
        found = _kinds(read_object(path, ConfigError))
        task = next((kind for kind in found if kind in OTHER_TASKS.values()), "")
    if task:
        raise ConfigError(
            f"{path}: describes {task}, which is not imported: `duetvl infer --from-mindspeed` takes inference_*.json, "
            f"`duetvl eval --from-mindspeed` evaluate_*.json; give the files of a training run"
        )


def _kinds(values: Mapping[str, Any]) -> list[str]:
    return [kind for kind, marks in _MARKS.items() if any(name in values for name in marks)]


def _check_file(path: Path) -> None:
    """Reading a pipe or device may never end, and these files are small."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    if not path.is_file():
        raise ConfigError(f"{path}: is not a file; write it to one and give that")
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path}: is larger than {_LARGEST // 2**20} MiB, which no file of a run is; {_ORDER}")


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested objects by dotted keys; an empty object stands for itself."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def follow_script(path: Path, variables: Mapping[str, str], report: Report) -> Script:
    """Follow a script with the user's variables. ConfigError for one that cannot be read, or lacks a variable."""
    _check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if b"\0" in content:
        raise ConfigError(f"{path}: is not UTF-8 text (it may be UTF-16); save it as UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape")  # comments in another encoding are no matter, as to bash
    if text.lstrip().startswith('{"') or re.match(r"\{\s*\"", text.lstrip()):
        raise ConfigError(f"{path}: is JSON, where a shell script is expected; {_ORDER}")
    try:
        read = read_script(text, variables)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name in variables:
        if not (name.isidentifier() and re.search(rf"\b{name}\b", text)):
            names = sorted(read.variables.values.keys() - variables.keys())
            raise ConfigError(f"{path}: has no variable {show(name)}{did_you_mean(name, names)}")
    _note(read, "\r\n" in text, report)
    return read


def _note(read: Script, windows: bool, report: Report) -> None:
    """What the script does to its environment, and what it was taken to be started with."""
    environment = "variables of the environment are for its programs and devices"
    for name in dict.fromkeys([*read.exported, *(f"source {file}" for file in read.sourced)]):
        report.add("not needed", name, environment)
    for name, taken in read.variables.assumed.items():
        report.add("assumed", f"argument {name}" if name.isdigit() else name, taken)
    if windows:
        report.add("changed", "line ends", "are those of Windows, over which the shell stumbles; read as ends of lines")


def program_arguments(read: Script, start: Start, path: Path, report: Report) -> dict[str, Any]:
    """The program's arguments by name: True for a switch, a text, or a list of texts."""
    found: dict[str, Any] = {}
    for name, words in options(start.arguments):
        taken, stray = _split(name, words)
        if stray:
            missing = next((word.missing for word in stray if word.missing), "")
            said = " ".join(word.text for word in stray).strip()
            what = f"{missing}, so what it adds is not known" if missing else f"{show(said)} belongs to no option"
            after = f" after {name}" if name else ""
            if not report.allow_unknown:
                hint = advice(missing, read) or _hint(stray)
                raise ConfigError(f"{path}: {what}{after}{hint}; --allow-unknown ignores it")
            report.add("unknown", said or "a variable", f"{what}{after}")
        if not name:
            continue
        value = _value(name, taken, path, read)
        if found.get(name, value) != value:
            report.add("contradiction", name, f"given twice; the last one counts: {value}")
        found[name] = value
    return found


def _hint(stray: Sequence[Text]) -> str:
    """What may have made words of what was meant for the shell."""
    if any(word.text.startswith("#") for word in stray):
        return "; # begins no comment within quotes"
    if any(word.text == "\\" for word in stray):
        return "; a backslash continues a line only where it is the last character"
    return ""


def _split(name: str, words: Sequence[Text]) -> tuple[Sequence[Text], Sequence[Text]]:
    """The values of an argument, and words that are none of it."""
    if name not in set(SCRIPT.known()):
        return (words, ()) if name else ((), words)
    most = {"switch": 0, "one": 1, "many": len(words)}[SCRIPT.arity(name)]
    return words[:most], words[most:]


def _value(name: str, words: Sequence[Text], path: Path, read: Script) -> Any:
    arity = SCRIPT.arity(name)
    if arity == "switch" or (not words and name not in SCRIPT.used):
        return True
    missing = next((word.missing for word in words if word.missing), "")
    if name in SCRIPT.used and (missing or not words):
        raise ConfigError(f"{path}: {name}: {missing or 'it has no value'}{advice(missing, read)}")
    return [word.text for word in words] if arity == "many" else " ".join(word.text for word in words)
