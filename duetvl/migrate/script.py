"""The command with which a script starts training, and the options that it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.simple import Script, Start
from duetvl.migrate.shell.values import Text

OTHER_TASKS: Final = {"inference": "inference", "evaluate": "evaluation", "eval": "evaluation"}


def training_start(script: Script, path: object) -> Start:
    """The one command that trains. Raises ConfigError where there is none, or several."""
    with_files = [start for start in script.starts if any(word.text.startswith("--mm-") for word in start.arguments)]
    found = with_files or script.starts
    if not found:
        ends = f"exits at line {script.ended} before it starts training, as it is read without arguments"
        starts = "starts no Python program with options, such as torchrun ... pretrain_vlm.py --lr 1e-5"
        raise ConfigError(f"{path}: {ends if script.ended else starts}")
    if len(found) > 1:
        lines = ", ".join(str(line) for line in dict.fromkeys(start.line for start in found))
        raise ConfigError(
            f"{path}: starts a program {len(found)} times (line {lines}), and a recipe is one run; keep one of them in "
            f"a copy of the script, or give the variables that decide here, as NAME=VALUE"
        )
    task = PurePosixPath(found[0].program).name.split("_")[0]
    if task in OTHER_TASKS:
        raise ConfigError(
            f"{path}: starts {OTHER_TASKS[task]} ({found[0].program}), which is not imported; give the script of a "
            f"training run, such as finetune_qwen2_5_vl_7b.sh"
        )
    return found[0]


def advice(missing: str, script: Script) -> str:
    """What to do about a value that the script does not say."""
    name, _, rest = missing.partition(" ")
    if name in script.variables.values or rest.startswith("is not set in the script"):
        return f"; give it here: {name}=..."
    return "; write it into a copy of the script" if missing else ""


def setting(script: Script, name: str, value: object) -> str:
    """How to give a variable another value: here, where the script has it, else in a copy of the script."""
    known = name in script.variables.values
    return f"give {name}={value} here" if known else "correct it in a copy of the script"


def options(words: Iterable[Text]) -> Iterator[tuple[str, list[Text]]]:
    """`--name value value` and `--name=value` as (name, values); words before the first option have the name ""."""
    name, values = "", list[Text]()
    for word in words:
        if word.text.startswith("--"):
            if name or values:
                yield name, values
            name, equals, rest = word.text.partition("=")
            values = [Text(rest, word.missing)] if equals else []
        else:
            values.append(word)
    if name or values:
        yield name, values
