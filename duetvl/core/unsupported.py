"""A gap is declared in one line, where a reader looks: `attention_grad = unsupported("needs CANN 8.2")`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from duetvl.core.errors import BackendError


class Gap:
    """Stands in a class for a method that it does not have; calling it raises BackendError with the reason."""

    def __init__(self, reason: str):
        self.reason = reason
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Gap | Callable[..., NoReturn]:
        if instance is None:
            return self

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise BackendError(f"{owner.__name__} has no {self.name}: {self.reason}")

        return refuse


def unsupported(reason: str) -> Any:
    """Declare that a backend lacks an operation, and why. The conformance suite and docs/backends.md read it."""
    return Gap(reason)


def declared_gaps(implementation: type) -> dict[str, str]:
    """Operation -> reason."""
    members = {name: getattr(implementation, name, None) for name in dir(implementation)}
    return {name: gap.reason for name, gap in members.items() if isinstance(gap, Gap)}


def gaps_table(rows: Mapping[tuple[str, str], tuple[Iterable[str], Iterable[type]]]) -> str:
    """Markdown: what each backend lacks. (backend, device) -> (dtypes that are only stored, implementations)."""
    lines = [
        "| backend | device | stored, but computed in float32 | not supported |",
        "|---|---|---|---|",
    ]
    for (backend, device), (storage_only, implementations) in rows.items():
        gaps = {name: reason for kind in implementations for name, reason in declared_gaps(kind).items()}
        missing = "; ".join(f"`{name}`: {reason}" for name, reason in sorted(gaps.items()))
        stored = ", ".join(sorted(storage_only))
        lines.append(f"| `{backend}` | {device} | {stored or 'none'} | {missing or 'nothing'} |")
    return "\n".join(lines)
