"""Tensor parallelism (Megatron's, arXiv:1909.08053) of a model on one rank: what its tree and its passes must know.

How each tensor is cut says the table beside the model (models/qwen_vl/sharding.py). Attention and MLP begin with
column-parallel layers and end with a row-parallel one, whose parts are summed; embedding and vocabulary are cut along
the vocabulary, and no logits are put together for a loss. Features of pictures are placed before the embedding's parts
are summed, each by the rank that has it, so that they need no communication of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.boxes import LocalPart, Shape
from duetvl.core.ops import Ops
from duetvl.core.params import Parameter
from duetvl.core.spans import Spans
from duetvl.core.stages import even_range, even_split
from duetvl.models.attention import Attend
from duetvl.models.layout import UNDIVIDED, Layout, Move, Rows, Trained
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.sharding import FEATURES, shard_of
from duetvl.parallel.context import Context, HeadShare, own_share
from duetvl.parallel.differentiable import (
    Team,
    copy_to,
    gather_from,
    gather_reduce,
    reduce_from,
    reduce_scatter_from,
)
from duetvl.parallel.division import Division, dealt
from duetvl.parallel.gathering import Gathers

Tensor = Any

VOCABULARY: Final = ("model.embed_tokens", "lm_head")
NO_TOKEN: Final = -1


def layout_of(division: Division, backend: Backend) -> Layout:
    """How the model of a rank lies, for its `layout`. All ranks of the run call it together."""
    mesh = division.mesh
    if mesh.pp == mesh.tp == mesh.cp == division.zero == 1:
        return UNDIVIDED
    context = Context.of(backend, mesh.groups("cp"), division.ulysses)
    return RankLayout(division, Team.of(backend, mesh.groups("tp")), context, Gathers.of(division, backend))


@dataclass(frozen=True)
class RankLayout:
    """A `models.layout.Layout`: over a team that lies along the grid's axis `tp`, and ranks along `cp`; `gathers` are
    of the weights that replicas divide."""

    division: Division
    team: Team
    context: Context
    gathers: Gathers = field(default_factory=Gathers)

    @property
    def peers(self) -> Sequence[RankLayout]:
        """Those along `cp`."""
        division = self.division
        along = division.mesh.ranks_along("cp", rank=division.rank)
        return [replace(self, division=division.of_rank(rank)) for rank in along]

    def own_rows(self, lengths: np.ndarray) -> np.ndarray:
        """This rank's piece."""
        return self.context.rows(lengths, self.division.place("cp"))

    def causal(self, ops: Ops, spans: Spans) -> Attend:
        """Over the ranks along `cp`."""
        return self.context.attend(spans.lengths, self.division.heads, self._share)

    def bring(self, at_hand: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[np.ndarray, Move]:
        """By one exchange along `cp`."""
        return self.context.bring(at_hand, wanted)

    def trained(self, of: np.ndarray, lengths: np.ndarray) -> Trained:
        """Those of this rank's rows."""
        own = np.isin(of, self.own_rows(lengths))
        return Trained(np.flatnonzero(own), partial(reduce_from, self.context.team))

    def holds(self, path: str) -> bool:
        """What the division says."""
        return self.division.holds(path)

    def part(self, path: str, shape: Shape) -> LocalPart:
        """What the division says."""
        return self.division.part(path, shape)

    def records(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Any]:
        """`leave` beside the weight of each row-parallel layer, `shard` beside the vocabulary's matrices, `gather` in
        blocks whose weights are divided among replicas."""
        found: dict[str, Any] = {**self.gathers.records(parameters)}
        for path, parameter in parameters.items():
            module, _, leaf = path.rpartition(".")
            if leaf != "weight" or parameter.part is None or is_adapter(path):
                continue
            used = self.division.used(path, parameter.part.whole)
            if used.is_all:
                continue
            if module in VOCABULARY:
                found[f"{module}.shard"] = VocabularyPart(self.team, used.whole[0])
            elif shard_of(path).axis == 1:
                scatter = module == FEATURES or (self.division.sequence and path.startswith("model."))
                found[f"{module}.leave"] = LeaveRegion(self.team, used.slices.boxes[0].offset[1], scatter)
        return found

    def whole(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        """Gathered where replicas divide it."""
        return self.gathers.whole(path, shape, tensor)

    def attend(self, attend: Attend) -> Attend:
        """Where this rank's query heads do not fall evenly on its key and value heads, each gets its own copy."""
        share, ops = self._share, self.team.ops
        return lambda layer, q, k, v: attend(layer, q, share.each_its_own(ops, k), share.each_its_own(ops, v))

    def kv_heads(self, whole: int) -> int:
        """Those that this rank has, or one for each of its query heads."""
        return self._share.kv_heads

    def rows(self, count: int) -> Rows:
        """Pieces of them with sequence parallelism, else all of them on every rank."""
        return RowPieces(self.team, count) if self.division.sequence else RowsEverywhere(self.team)

    def looked_up(self, ids: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """No rank's embedding knows a row that one of them fills with a feature."""
        if self.team.size == 1:
            return ids
        ids = ids.copy()
        ids[filled] = NO_TOKEN  # numpy
        return ids

    def enter_vision(self, x: Tensor) -> Tensor:
        """x; where the layers are divided, the gradients that the ranks' columns give it are summed."""
        return copy_to(self.team, x) if self.division.vision == "shard" else x

    def frames(self, patches: Sequence[int]) -> Sequence[int] | None:
        """Those dealt to this rank: among all of `cp` and `tp`, or of `cp` alone where the layers are divided."""
        place, ranks = self.division.place("cp"), self.context.team.size
        if self.division.vision == "divide":
            place, ranks = place * self.team.size + self.team.index, ranks * self.team.size
        return None if ranks == 1 else dealt(patches, ranks)[place]

    def features(self, count: int) -> range:
        """All of this rank's frames, or a piece of all where the layers are divided."""
        return self.share(count) if self.division.vision == "shard" else range(count)

    def share(self, count: int) -> range:
        """An even piece."""
        return even_range(count, self.team.index, self.team.size)

    def all_features(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """The sum over the ranks of rows that one of them has."""
        summed = _whole(self.team, x, rows, count)
        return self.team.collectives.all_reduce(summed, self.context.team.group)

    def all_rows(self, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
        """Likewise, over the ranks along `cp`."""
        return _whole(self.context.team, x, rows, count)

    @cached_property
    def _share(self) -> HeadShare:
        return own_share(self.division)


def _whole(team: Team, x: Tensor, rows: np.ndarray, count: int) -> Tensor:
    """(count, ...) whose `rows` are x on this rank, and others on others."""
    ops = team.ops
    blank = ops.zeros((count, *x.shape[1:]), ops.dtype_of(x))
    return team.collectives.all_reduce(ops.scatter_rows(blank, ops.from_numpy(rows.astype(np.int32)), x), team.group)


@dataclass(frozen=True)
class LeaveRegion:
    """A `models.linear.Leave`. scatter: each rank keeps an even piece of the sum's rows."""

    team: Team
    column: int
    scatter: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.scatter:
            return reduce_scatter_from(self.team, x, 0, even_split(x.shape[0], self.team.size))
        return reduce_from(self.team, x)

    def norms(self, own: Tensor) -> Tensor:
        """The root of the sum of squares."""
        squares = self.team.collectives.all_reduce(own * own, self.team.group)
        return squares * self.team.ops.rsqrt(squares)


@dataclass(frozen=True)
class RowsEverywhere:
    """The `models.layout.Rows` of a team whose ranks all have all rows."""

    team: Team

    def join(self, x: Tensor) -> Tensor:
        """The sum."""
        return reduce_from(self.team, x)

    def enter(self, x: Tensor) -> Tensor:
        """x; the gradients that the ranks' columns give it are summed."""
        return copy_to(self.team, x)

    def here(self, rows: np.ndarray) -> np.ndarray:
        """All."""
        return rows

    def collect(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """x; the gradients that the ranks' parts of the vocabulary give it are summed."""
        return copy_to(self.team, x)


@dataclass(frozen=True)
class RowPieces:
    """The same where `count` rows are divided along the sequence (arXiv:2205.05198), as evenly as can be."""

    team: Team
    count: int

    def join(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum."""
        return reduce_scatter_from(self.team, x, 0, self._sizes)

    def enter(self, x: Tensor) -> Tensor:
        """All rows; of their gradients this rank gets its own, summed."""
        return gather_reduce(self.team, x, 0, self._sizes)

    def here(self, rows: np.ndarray) -> np.ndarray:
        """Those of this rank's piece."""
        first, last = self._bounds(rows)[self.team.index : self.team.index + 2]
        return rows[first:last] - even_range(self.count, self.team.index, self.team.size).start

    def collect(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """The ranks' rows joined; of their gradients this rank gets its own, summed."""
        return gather_reduce(self.team, x, 0, [int(count) for count in np.diff(self._bounds(rows))])

    @property
    def _sizes(self) -> Sequence[int]:
        return even_split(self.count, self.team.size)

    def _bounds(self, rows: np.ndarray) -> np.ndarray:
        """Where in `rows` those of each rank begin, and their end."""
        return np.searchsorted(rows, np.cumsum([0, *self._sizes]))


@dataclass(frozen=True)
class VocabularyPart:
    """A `models.vocabulary.VocabularyShard`: this rank's rows of `whole` ones."""

    team: Team
    whole: int

    def embed(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Rows that are here, and zeros."""
        ops = self.team.ops
        inside, local = self._local(ids)
        rows = ops.take_rows(weight, local)
        return rows * ops.cast(inside, ops.dtype_of(rows))[:, None]

    def logits(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """The ranks' logits joined."""
        return gather_from(self.team, self.team.ops.linear(hidden, weight), 1, even_split(self.whole, self.team.size))

    def logprobs(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """From each rank's logits of the labels that are its own, and its log of summed exponentials (N,)."""
        ops = self.team.ops
        inside, local = self._local(labels)

        def forward(needs: tuple[bool, ...], h: Tensor, w: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            logp, lse = ops.linear_logprobs(h, w, local)
            whole = self._joined(lse)
            return self._sum((logp + lse) * ops.cast(inside, "float32")) - whole, (h, w, whole)

        def backward(needs: tuple[bool, ...], kept: tuple[Any, ...], d: Tensor) -> tuple[Any, ...]:
            h, w, whole = kept
            return ops.linear_logprobs_grad(d, h, w, labels - self._rows.start, whole, (needs[0], needs[1]))

        return self.team.autograd.custom_vjp(forward, backward)(hidden, weight)

    @property
    def _rows(self) -> range:
        return even_range(self.whole, self.team.index, self.team.size)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(1 for tokens that are here and 0 for others, int32; their rows here, row 0 for others)"""
        cast, rows = self.team.ops.cast, self._rows
        inside = cast(ids >= rows.start, "int32") * cast(ids < rows.stop, "int32")
        return inside, (ids - rows.start) * inside

    def _joined(self, lse: Tensor) -> Tensor:
        """log of the sum over the ranks of exp(lse), without overflow."""
        largest = self.team.collectives.all_reduce(lse, self.team.group, "max")
        return largest + self.team.ops.log(self._sum(self.team.ops.exp(lse - largest)))

    def _sum(self, x: Tensor) -> Tensor:
        return self.team.collectives.all_reduce(x, self.team.group)
