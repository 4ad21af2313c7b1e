"""Collectives with gradients, for tensor, sequence and context parallelism. The only file that has them.

A tensor that enters or leaves a parallel region is either *replicated* (the same on every rank of the team), *sharded*
(each rank holds a piece along an axis) or *partial* (the sum over the ranks is meant). With L the loss and an overline
the cotangent, each function below states its map and the adjoint:

    function             forward               backward              used by
    copy_to              replicated, as is     all_reduce            tensor: before column-parallel linear
    reduce_from          partial -> sum        as is                 tensor: after row-parallel linear
    gather_from          pieces -> whole       own piece             tensor: logits or features needed whole
    scatter_to           whole -> own piece    all_gather            sequence: entry to the split stream
    gather_reduce        pieces -> whole       reduce_scatter        sequence: before column-parallel linear
    reduce_scatter_from  partial -> pieces     all_gather            sequence: after row-parallel linear
    all_to_all           pieces -> pieces      inverse all_to_all    context: Ulysses, heads for tokens

gather_from and gather_reduce differ in what follows: after gather_from every rank computes the same, so that each
cotangent is already complete; after gather_reduce every rank computes something else, so that they are summed.
How half precision is summed says core/collectives.py. On a team of one rank each function returns its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from duetvl.core.autograd import Autograd
from duetvl.core.backend import Backend
from duetvl.core.collectives import Collectives, Group
from duetvl.core.ops import Ops

Tensor = Any
Sizes = Sequence[int] | None


@dataclass(frozen=True)
class Team:
    """The ranks that share a piece of work, and the means to do it: one per mesh axis, made once."""

    ops: Ops
    autograd: Autograd
    collectives: Collectives
    group: Group = None

    @classmethod
    def of(cls, backend: Backend, groups: Sequence[Sequence[int]] | None = None) -> Team:
        """This rank's team among `groups` (`mesh.groups("tp")`, on all ranks alike), or all ranks."""
        group = None if groups is None else backend.collectives.groups(groups)
        return cls(backend.ops, backend.autograd, backend.collectives, group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.collectives.group_ranks(self.group))

    @property
    def index(self) -> int:
        """This rank's place among them."""
        return list(self.collectives.group_ranks(self.group)).index(self.collectives.rank)


def copy_to(team: Team, x: Tensor) -> Tensor:
    """x replicated -> x; dx = sum over ranks of dy. Column-parallel input: each rank's columns add to dx."""
    # As a constant over the same storage: returning the argument itself would copy it on MindSpore.
    return _linear_map(team, team.autograd.stop_gradient, lambda d: team.collectives.all_reduce(d, team.group), x)


def reduce_from(team: Team, x: Tensor) -> Tensor:
    """x partial -> y = sum over ranks of x; dx = dy. Row-parallel output, vocabulary-parallel embedding."""
    return _linear_map(team, lambda y: team.collectives.all_reduce(y, team.group), lambda d: d, x)


def gather_from(team: Team, x: Tensor, axis: int = 0, sizes: Sizes = None) -> Tensor:
    """x sharded along `axis` -> the whole, replicated; dx = own piece of dy. `sizes`: each rank's, if they differ."""
    pieces = _pieces(team, x, axis, sizes)
    return _linear_map(team, lambda y: _gather(team, y, axis, pieces), lambda d: _own(team, d, axis, pieces), x)


def scatter_to(team: Team, x: Tensor, axis: int = 0, sizes: Sizes = None) -> Tensor:
    """x replicated -> own piece along `axis`; dx = the ranks' dy joined. Entry to a sequence-parallel stream."""
    pieces = _divide(team, x, axis, sizes)
    return _linear_map(team, lambda y: _own(team, y, axis, pieces), lambda d: _gather(team, d, axis, pieces), x)


def gather_reduce(team: Team, x: Tensor, axis: int = 0, sizes: Sizes = None) -> Tensor:
    """x sharded along `axis` -> the whole; dx = own piece of the sum over ranks of dy.

    Sequence parallel: before a column-parallel linear, in the place of `copy_to`.
    """
    pieces = _pieces(team, x, axis, sizes)
    return _linear_map(
        team, lambda y: _gather(team, y, axis, pieces), lambda d: _reduce_scatter(team, d, axis, pieces), x
    )


def reduce_scatter_from(team: Team, x: Tensor, axis: int = 0, sizes: Sizes = None) -> Tensor:
    """x partial -> own piece along `axis` of the sum over ranks; dx = the ranks' dy joined.

    Sequence parallel: after a row-parallel linear, in the place of `reduce_from`.
    """
    pieces = _divide(team, x, axis, sizes)
    return _linear_map(
        team, lambda y: _reduce_scatter(team, y, axis, pieces), lambda d: _gather(team, d, axis, pieces), x
    )


def all_to_all(
    team: Team, x: Tensor, split_axis: int, concat_axis: int, split_sizes: Sizes = None, concat_sizes: Sizes = None
) -> Tensor:
    """Piece i of x along `split_axis` goes to rank i; those received are joined along `concat_axis`; dx is the inverse.

    Two axes re-shard: x holds its share of `concat_axis` and all of `split_axis`, the result all of `concat_axis` and
    its share of `split_axis`; the sizes are all ranks' shares of the two (split evenly, and equal, unless given).
    Context parallel (Ulysses): (T / n, H, K) with split_axis 1 and concat_axis 0 -> (T, H / n, K), and back by 0, 1.
    One axis moves rows: `split_sizes` go out to each rank, `concat_sizes` come in from each.
    """
    out = _divide(team, x, split_axis, split_sizes)
    if concat_sizes is not None:
        into = list(concat_sizes)
    else:
        into = out if split_axis == concat_axis else [x.shape[concat_axis]] * team.size
    return _linear_map(
        team,
        lambda y: _swap(team, y, split_axis, concat_axis, out, into),
        lambda d: _swap(team, d, concat_axis, split_axis, into, out),
        x,
    )


def _linear_map(team: Team, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """y = forward(x), differentiated as dx = adjoint(dy)."""
    if team.size == 1:
        return x
    return team.autograd.custom_vjp(lambda needs, y: (forward(y), ()), lambda needs, kept, d: (adjoint(d),))(x)


def _pieces(team: Team, x: Tensor, axis: int, sizes: Sizes) -> list[int]:
    """Every rank's size along `axis`, where x is this rank's piece."""
    pieces = [x.shape[axis]] * team.size if sizes is None else list(sizes)
    if len(pieces) != team.size or x.shape[axis] != pieces[team.index]:
        raise ValueError(f"rank {team.index} of {team.size} has {x.shape[axis]} along axis {axis}, sizes say {pieces}")
    return pieces


def _divide(team: Team, x: Tensor, axis: int, sizes: Sizes) -> list[int]:
    """Every rank's size along `axis`, where x is the whole."""
    length = x.shape[axis]
    if sizes is None and length % team.size:
        raise ValueError(f"axis {axis} of size {length} does not divide by {team.size} ranks; give the sizes")
    pieces = [length // team.size] * team.size if sizes is None else list(sizes)
    if len(pieces) != team.size or sum(pieces) != length:
        raise ValueError(f"axis {axis} has size {length}, the pieces of {team.size} ranks are {pieces}")
    return pieces


def _own(team: Team, x: Tensor, axis: int, pieces: Sequence[int]) -> Tensor:
    start = list(accumulate(pieces, initial=0))[team.index]
    index = [slice(None)] * (axis % x.ndim) + [slice(start, start + pieces[team.index])]
    return x[tuple(index)]


def _gather(team: Team, x: Tensor, axis: int, pieces: Sequence[int]) -> Tensor:
    return _along_rows(team, lambda y: team.collectives.all_gather(y, team.group, pieces), x, axis)


def _reduce_scatter(team: Team, x: Tensor, axis: int, pieces: Sequence[int]) -> Tensor:
    return _along_rows(team, lambda y: team.collectives.reduce_scatter(y, team.group, pieces), x, axis)


def _along_rows(team: Team, call: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """Collectives cut along axis 0: change places with `axis` before and after."""
    axis %= x.ndim
    if axis == 0:
        return call(x)
    order = list(range(x.ndim))
    order[0], order[axis] = axis, 0
    return team.ops.transpose(call(team.ops.transpose(x, order)), order)


def _swap(team: Team, x: Tensor, split_axis: int, concat_axis: int, out: Sequence[int], into: Sequence[int]) -> Tensor:
    """Pieces travel flat, one after the other, so that neither axis has to be the first."""
    ops, shapes = team.ops, []
    for size in into:
        shape = list(x.shape)
        shape[split_axis] = out[team.index]
        shape[concat_axis] = size
        shapes.append(shape)
    pieces = [ops.reshape(piece, (-1,)) for piece in ops.split(x, list(out), split_axis)]
    send, receive = [piece.shape[0] for piece in pieces], [math.prod(shape) for shape in shapes]
    flat = team.collectives.all_to_all(ops.concat(pieces, 0), team.group, send, receive)
    got = ops.split(flat, receive, 0)
    return ops.concat([ops.reshape(y, shape) for y, shape in zip(got, shapes, strict=True)], concat_axis)


__all__ = [
    "Team",
    "all_to_all",
    "copy_to",
    "gather_from",
    "gather_reduce",
    "reduce_from",
    "reduce_scatter_from",
    "scatter_to",
]
