"""Around jsonargparse: words as shells pass them, names that it would not know, and its errors in one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from duetvl.convert.options import COMMANDS, key_names, key_tree
from duetvl.core.errors import ConfigError, did_you_mean

CONVERTERS: Final = ("Qwen2VLConverter", "Qwen2_5_VLConverter")
TITLES: Final = {
    "hf_to_mm": "Convert Hugging Face weights, or a training checkpoint of duetvl, to MindSpeed-MM",
    "mm_to_hf": "Convert MindSpeed-MM weights to Hugging Face",
    "resplit": "Divide MindSpeed-MM weights over other stages and ranks",
    "lora_hf_to_mm": "Convert a LoRA adapter of peft to MindSpeed-MM",
    "lora_mm_to_hf": "Convert a LoRA adapter of MindSpeed-MM, fused or canonical, to one adapter_model.safetensors",
    "verify": "Compare two checkpoints of any layouts tensor by tensor",
}
CONVERSIONS: Final = tuple(name for name in COMMANDS if name != "verify")
_NEEDLESS: Final = {
    "hf_to_mm_dcp": "training needs no conversion to DCP: it reads each rank's slices straight from the Hugging Face "
    "directory (model.path in the recipe); for MindSpeed-MM's own trainer use hf_to_mm",
    "hf_to_mm_ldt": "the division between edge and cloud is not offered; use hf_to_mm",
}
_LISTS: Final = re.compile(r"--cfg\.(\w+\.)*\w+_pp_layers")
_LONGEST: Final = 200
_CONFIG_LIMIT: Final = 1 << 20


def prepared(argv: Sequence[str]) -> list[str]:
    """The words as the library takes them: a list that the shell has split at blanks is one, a switch alone is true."""
    words: list[str] = []
    switches = {f"--{name}" for tree in _TREES.values() for name in _switches(tree)}
    for word, follows in _pairs(argv):
        if len(words) > 1 and _LISTS.fullmatch(words[-2]) and not word.startswith("--"):
            words[-1] += word
            continue
        words.append(word.replace("skip_null", "skip_unset") if word.startswith("--print_config=") else word)
        if word in switches and (follows or "-").startswith("-"):
            words.append("true")
    return words if words and words[-1] not in CONVERTERS else [*words, "--help"]


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each word, and the one that follows."""
    return zip(words, [*words[1:], None])  # noqa: B905  without words there is nothing to follow


_TREES: Final = {name: key_tree(command) for name, command in COMMANDS.items()}


def _switches(tree: Mapping[str, Any], path: str = "cfg") -> Iterator[str]:
    for name, below in tree.items():
        if isinstance(below, Mapping):
            yield from _switches(below, f"{path}.{name}")
        elif below is bool:
            yield f"{path}.{name}"


# -- names ------------------------------------------------------------------------------------------------------------


def check(words: Sequence[str]) -> list[str]:
    """The names of converter and command, as far as they are there.

    Raises ConfigError for one, or for a key, that there is not, on the command line or in a file.
    """
    names = list(_names(words))
    if names and names[0] not in (*CONVERTERS, "verify"):
        raise ConfigError(f"there is no converter {names[0]!r}{did_you_mean(names[0], [*CONVERTERS, 'verify'])}")
    if names and names[0] in CONVERTERS and len(names) > 1 and names[1] not in CONVERSIONS:
        if names[1] in _NEEDLESS and names[0] == "Qwen2_5_VLConverter":
            raise ConfigError(f"{names[1]}: {_NEEDLESS[names[1]]}")
        raise ConfigError(f"{names[0]} has no command {names[1]!r}{did_you_mean(names[1], CONVERSIONS)}")
    tree = _TREES.get(names[0] if names[:1] == ["verify"] else names[1] if len(names) > 1 else "")
    if tree is None:
        return names[:2]
    known = set(key_names(tree))
    for name, value in _options(words):
        if name == "config" and value is not None:
            _check_file(value, names, tree)
        elif isinstance(section := _below(tree, name), Mapping) and value is not None:
            _check_section(f"--{name}", _section(value), section, name)
        elif name not in (*known, *_GENERAL):
            hint = did_you_mean(f"--{name}", (f"--{key}" for key in known)).partition(" (")[0]  # there are dozens
            raise ConfigError(f"unknown option --{_short(name)}{hint}")
    return names[:2]


_GENERAL: Final = ("config", "print_config", "help", "version")


def _below(tree: Mapping[str, Any], name: str) -> Any:
    """What a tree has by the name of an option."""
    first, *rest = name.split(".")
    found: Any = tree if first == "cfg" else None
    for part in rest:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _section(value: str) -> Any:
    """A section as JSON or YAML, or a file that has it."""
    return _read_yaml(value, value.encode() if not Path(value).is_file() else None)


def _names(words: Sequence[str]) -> Iterator[str]:
    """The words before the first option, but for --config FILE."""
    rest = iter(words)
    for word in rest:
        if word == "--config":
            next(rest, None)
        elif not word.startswith("--config="):
            if word.startswith("-"):
                return
            yield word


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names without dashes, and the word that follows each or is joined to it."""
    for word, follows in _pairs(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name.removesuffix("+"), value if equals else follows


def _check_file(file: str, names: Sequence[str], tree: Mapping[str, Any]) -> None:
    """The library takes a file's unknown keys for something else, and passes over a section that is none."""
    value = _read_yaml(file)
    for name in names[:2]:  # whichever of these levels the file has
        if isinstance(value, dict) and set(value) == {name}:
            value = value[name]
    unknown = sorted(str(key) for key in value if key != "cfg") if isinstance(value, dict) else None
    if unknown is None or unknown:
        found = f"the key {unknown[0]!r}" if unknown else _short(repr(value))
        raise ConfigError(f"{file}: expected a section cfg, found {found}; --print_config=comments prints such a file")
    _check_section(file, value["cfg"], tree, "cfg")


def _read_yaml(file: str, content: bytes | None = None) -> Any:
    import yaml

    where = _short(file)
    try:
        if content is None and Path(file).stat().st_size > _CONFIG_LIMIT:
            raise ConfigError(f"{where}: is too large for a file of keys")
        if content is None and not Path(file).is_file():
            raise ConfigError(f"{where}: is not a file of keys")
        text = Path(file).read_bytes() if content is None else content
        if twice := _given_twice(yaml.compose(text, yaml.SafeLoader)):
            raise ConfigError(f"{where}: the key {_short(twice)!r} is given twice in one section; keep one of them")
        return yaml.safe_load(text)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{where}: cannot be read as YAML: {_short(cause or type(error).__name__)}") from None


def _given_twice(root: Any) -> str | None:
    """A key that a mapping below a node of YAML has twice, of which its readers take the last in silence."""
    seen, pending = set(), [root]
    while pending:
        node = pending.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))  # an alias may lead back to what it is in
        pairs = [pair for pair in node.value if isinstance(pair, tuple)]
        keys = Counter(str(key.value) for key, _ in pairs)
        if keys and keys.most_common(1)[0][1] > 1:
            return keys.most_common(1)[0][0]
        pending += [value for _, value in pairs] or node.value
    return None


def _check_section(file: str, value: Any, tree: Mapping[str, Any], path: str) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {path} is {_short(repr(value))}, expected a section")
    for name, below in value.items():
        if name not in tree:
            raise ConfigError(f"{file}: there is no key {path}.{_short(str(name))}{did_you_mean(str(name), tree)}")
        if isinstance(tree[name], Mapping):
            _check_section(file, below, tree[name], f"{path}.{name}")


# -- errors -----------------------------------------------------------------------------------------------------------


def in_one_line(text: str) -> str:
    """What the library says of a mistake: the key, what was found, what is expected."""
    if missing := re.search(r"arguments are required: (.*)", text):
        keys = [re.sub(r"^((Qwen\w+|\w+_to_\w+|resplit|verify)\.)*", "", key) for key in missing[1].split(", ")]
        return f"missing: {', '.join(f'--{key}' if key.startswith('cfg') else key for key in keys)}"
    if extra := re.search(r"unrecognized arguments: (.*)", text, re.DOTALL):
        return f"unexpected argument {_short(extra[1])!r}: each option takes one value"
    keys = re.findall(r'[Kk]ey "(cfg[\w.]*)"', text)
    where = f"--{max(keys, key=len)}: " if keys else ""
    if own := re.search(r"Not of type \w+: (.*)", text):
        return where + _short(own[1])
    if choice := re.search(r"Expected a typing.Literal\[(.*?)\]\. Got value: (.*)", text):
        choices = " or ".join(re.findall(r"'(\w+)'", choice[1]))
        return f"{where}expected {choices}, found {_short(choice[2])!r}"
    if switch := re.search(r"Expected a <class 'bool'>\. Got value: (.*)", text):
        return f"{where}expected true or false, found {_short(switch[1])!r}"
    return where + _short(text)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
