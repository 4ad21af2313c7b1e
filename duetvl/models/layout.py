"""How a model lies on the ranks of tensor parallelism, as its layers see it: a value in the tree, like an adapter.

A layer does not know of ranks. Entering a divided region is a function that its input brings (`Tokens.enter`,
`VisionInput.enter`), leaving it one that its leaf record may have (models/linear.py, models/vocabulary.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from duetvl.models.attention import Attend

Tensor = Any


class Layout(Protocol):
    """What a model asks of its division over ranks."""

    def records(self, paths: Iterable[str]) -> Mapping[str, Any]:
        """What `linear` and the vocabulary must know of the parameters of these paths, by the path of the record."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Rows that all ranks have, as the input of column-parallel layers."""
        ...

    def attend(self, attend: Attend) -> Attend:
        """Attention of this rank's query heads, each to its own key and value head."""
        ...

    def kv_heads(self, whole: int) -> int:
        """Key and value heads that `attend` hands on, of a model that has `whole`."""
        ...


class Undivided:
    """The layout of a model that one rank has whole."""

    def records(self, paths: Iterable[str]) -> Mapping[str, Any]:
        """None."""
        return {}

    def enter(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def attend(self, attend: Attend) -> Attend:
        """The same."""
        return attend

    def kv_heads(self, whole: int) -> int:
        """All of them."""
        return whole


UNDIVIDED: Layout = Undivided()


def stay(x: Tensor) -> Tensor:
    """x: there is no region to enter."""
    return x
