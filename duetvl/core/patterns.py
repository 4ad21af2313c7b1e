"""Parameters chosen by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from duetvl.core.errors import ConfigError

Parts = Mapping[str, tuple[str, ...]]  # name of a part -> the prefixes of its parameters' paths

_RANGE = re.compile(r"(\d+)-(\d+)")


def matching(pattern: str, paths: Iterable[str], parts: Parts) -> list[str]:
    """The paths that a pattern names, in their order.

    A pattern is the name of a part; or the path of a parameter or of a module, which stands for all below it, in
    which `*` is any text, `?` any character, and a step `0-7` any of these layers; or one step of paths, wherever
    it occurs (`bias`, `q_proj`, `*norm*`).
    """
    if pattern in parts:
        return [path for path in paths if path.startswith(parts[pattern])]
    body = r"\.".join(map(_step, pattern.split(".")))
    anywhere = r"(?:.*\.)?" if "." not in pattern else ""
    found = re.compile(rf"{anywhere}{body}(?:\..*)?")
    return [path for path in paths if found.fullmatch(path)]


def require_matching(field: str, patterns: Iterable[str], paths: Sequence[str], parts: Parts) -> dict[str, list[str]]:
    """`matching` of each pattern. Raises ConfigError, which names `field`, where one matches nothing."""
    found = {pattern: matching(pattern, paths, parts) for pattern in patterns}
    for pattern, chosen in found.items():
        if not chosen:
            raise ConfigError(f"{field}: {pattern!r} matches no parameter{_hint(pattern, paths, parts)}")
    return found


def _step(step: str) -> str:
    """One step of a path as a regular expression."""
    if layers := _RANGE.fullmatch(step):
        first, last = int(layers[1]), int(layers[2])
        return f"(?:{'|'.join(map(str, range(first, last + 1)))})" if first <= last else "(?!)"
    return re.escape(step).replace(r"\*", ".*").replace(r"\?", ".")


def _hint(pattern: str, paths: Sequence[str], parts: Parts) -> str:
    """What the pattern may have meant: parts, modules and steps of paths; layers are written `*`."""
    steps = [[re.sub(r"^\d+$", "*", step) for step in path.split(".")] for path in paths]
    modules = {".".join(path[:end]) for path in steps for end in range(1, len(path) + 1)}
    known = (modules | {step for path in steps for step in path} | set(parts)) - {"*"}
    plain = re.sub(r"(?<=\.)[\d*?-]+(?=\.|$)", "*", pattern)
    near = get_close_matches(plain, sorted(known), n=3, cutoff=0.6)
    layers = _layer_hint(plain, modules, paths)
    if layers:
        return f"; {layers}"
    names = near or sorted({*parts, *(path[0] for path in steps)})
    return f"; {'did you mean' if near else 'there are'} {', '.join(names)}{'?' if near else ''}"


def _layer_hint(plain: str, modules: set[str], paths: Sequence[str]) -> str:
    """Where a pattern fails by its layer numbers alone: which there are."""
    if plain not in modules or "*" not in plain:
        return ""
    head = plain.partition("*")[0]
    numbers = {int(path[len(head) :].partition(".")[0]) for path in paths if path.startswith(head)}
    return f"{head}* has layers {min(numbers)}-{max(numbers)}"
