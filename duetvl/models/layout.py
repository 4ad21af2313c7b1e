"""How a model lies on ranks that divide a pass among them, as its layers see it: a value in the tree, like an adapter.

A layer does not know of ranks. Entering a divided region is a function that its input brings (`Tokens.rows`,
`VisionInput.enter`), leaving it one that its leaf record may have (models/linear.py, models/vocabulary.py). Where a
rank runs the layers on some of a batch's rows alone, its input has those, and attention sees the others. Where it has
rows of a block's weights alone, the block's record has `gather`, which brings them together. On one rank each of these
is the identity.

T tokens, N rows whose next token is trained, D width, M merged features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from duetvl.core.boxes import LocalPart, Shape
from duetvl.core.ops import Ops
from duetvl.core.params import Parameter, Weights
from duetvl.core.spans import Spans
from duetvl.models.attention import Attend, attend_within

Tensor = Any
Move = Callable[[Tensor], Tensor]


def stay(x: Tensor) -> Tensor:
    """x: there is no region to enter, and nowhere to go."""
    return x


def gathered(w: Weights) -> Weights:
    """A block's leaves as it computes with them: its leaf `gather`, where it has one, brings together what ranks hold
    of each. Called inside of what is run again, which keeps none of them."""
    gather = w.get("gather")
    return w if gather is None else gather(w)


@dataclass(frozen=True, eq=False)
class Trained:
    """Which of a batch's N trained tokens a rank's pass has, as an index of arrays (N,).

    `sum` gives, of what the ranks that have the other ones add up each from its own, the sum; the gradient of that is
    the gradient of each part.
    """

    here: np.ndarray | slice
    sum: Move = stay


EVERY_TOKEN: Final = Trained(slice(None))


class Rows(Protocol):
    """How the rows of a pass's T tokens lie on the ranks where layers are not divided: at norms and residuals."""

    def join(self, x: Tensor) -> Tensor:
        """(T, D), of which each rank has a part of the sum -> the rows of the sum that this rank keeps."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """The rows that this rank keeps -> all (T, D), as the input of column-parallel layers."""
        ...

    def here(self, rows: np.ndarray) -> np.ndarray:
        """Which of these ascending rows (N,) are kept here, counted from the first that is."""
        ...

    def collect(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """x: those of the rows (N,) that are kept here -> all (N, D), as the vocabulary's input."""
        ...


class Divided(Protocol):
    """What reading a model's weights asks of its division."""

    def holds(self, path: str) -> bool:
        """Whether this rank has any of a parameter."""
        ...

    def part(self, path: str, shape: Shape) -> LocalPart:
        """What this rank has of a parameter whose whole has this shape."""
        ...


class Layout(Divided, Protocol):
    """What a model asks of its division over ranks."""

    def records(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Any]:
        """What `linear`, the vocabulary and `gathered` must know of these parameters, by the path of the record."""
        ...

    def whole(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        """What layers compute with of a parameter that this rank holds as `tensor`; `shape`: of the whole of it. The
        ranks that hold parts of it call it together."""
        ...

    def attend(self, attend: Attend) -> Attend:
        """Attention of this rank's query heads, each to its own key and value head."""
        ...

    def kv_heads(self, whole: int) -> int:
        """How many key and value heads reach that attention; `whole`: those of the whole model."""
        ...

    @property
    def peers(self) -> Sequence[Layout]:
        """That of each rank that runs the same layers on other rows of a batch, and this one's among them."""
        ...

    def own_rows(self, lengths: np.ndarray) -> np.ndarray:
        """Which rows this rank runs of a batch whose sequences (S,) have these lengths, ascending."""
        ...

    def causal(self, ops: Ops, spans: Spans) -> Attend:
        """Attention of the rows that this rank runs to those of all, inside of the batch's sequences."""
        ...

    def bring(self, at_hand: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[np.ndarray, Move]:
        """Of features, which each of `peers` has and wants (their numbers, those at hand ascending): which come here,
        and the function of those at hand here that brings them."""
        ...

    def trained(self, of: np.ndarray, lengths: np.ndarray) -> Trained:
        """Which of the trained rows (N,) of a batch, of sequences (S,) of these lengths, are among `own_rows`."""
        ...

    def rows(self, count: int) -> Rows:
        """The rows of a pass with `count` tokens."""
        ...

    def looked_up(self, ids: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """The ids (T,) that the embedding looks up, where the rows `filled` will take features in its place."""
        ...

    def enter_vision(self, x: Tensor) -> Tensor:
        """Rows of the vision tower, as the input of column-parallel layers."""
        ...

    def frames(self, patches: Sequence[int]) -> Sequence[int] | None:
        """Which of a batch's frames this rank's tower runs, ascending; None: all. `patches`: of each frame."""
        ...

    def features(self, count: int) -> range:
        """Which of the `count` merged rows that this rank's tower runs come out of it here."""
        ...

    def share(self, count: int) -> range:
        """Which of the `count` features that every rank has this one places."""
        ...

    def all_features(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """x: the rows of (count, D) that came out here -> all of them, on every rank. Not differentiable."""
        ...

    def all_rows(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """x: the rows of (count, ...) that `own_rows` led to -> all of them, on every rank. Not differentiable."""
        ...


class Undivided:
    """The layout of a model that one rank has whole."""

    def holds(self, path: str) -> bool:
        """It has every one."""
        return True

    def part(self, path: str, shape: Shape) -> LocalPart:
        """All of it."""
        return LocalPart.all_of(shape)

    def records(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Any]:
        """None."""
        return {}

    def whole(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        """tensor."""
        return tensor

    def attend(self, attend: Attend) -> Attend:
        """The same."""
        return attend

    def kv_heads(self, whole: int) -> int:
        """All."""
        return whole

    @property
    def peers(self) -> Sequence[Layout]:
        """Itself."""
        return [self]

    def own_rows(self, lengths: np.ndarray) -> np.ndarray:
        """All."""
        return np.arange(int(np.sum(lengths)))

    def causal(self, ops: Ops, spans: Spans) -> Attend:
        """Within the spans."""
        return attend_within(ops, lambda layer: spans)

    def bring(self, at_hand: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[np.ndarray, Move]:
        """They stay."""
        return at_hand[0], stay

    def trained(self, of: np.ndarray, lengths: np.ndarray) -> Trained:
        """All."""
        return EVERY_TOKEN

    def rows(self, count: int) -> Rows:
        """All of them are here."""
        return ALL_HERE

    def looked_up(self, ids: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """ids."""
        return ids

    def enter_vision(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def frames(self, patches: Sequence[int]) -> Sequence[int] | None:
        """All."""
        return None

    def features(self, count: int) -> range:
        """All."""
        return range(count)

    def share(self, count: int) -> range:
        """All."""
        return range(count)

    def all_features(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """x."""
        return x

    def all_rows(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """x."""
        return x


class AllHere:
    """The `Rows` of one rank."""

    def join(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def here(self, rows: np.ndarray) -> np.ndarray:
        """All."""
        return rows

    def collect(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """x."""
        return x


UNDIVIDED: Layout = Undivided()
ALL_HERE: Rows = AllHere()
