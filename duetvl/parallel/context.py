"""Context parallelism: ranks that run all layers, each on its own rows of a pack, and meet in attention alone.

`ulysses` of them exchange heads for rows (DeepSpeed-Ulysses, arXiv:2309.14509): each then has all rows of these ranks
and some of the heads. Such teams form a ring (arXiv:2310.01889), whose members pass their keys and values round. To
give all of them as much to do, a sequence is cut into twice as many chunks as the ring has members, of which each has
one from the front and the one as far from the back. Nothing has to divide by anything: a chunk may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.collectives import Receive, Send
from duetvl.core.ops import Ops
from duetvl.core.spans import Spans
from duetvl.core.stages import even_range, even_split
from duetvl.models.attention import Attend
from duetvl.models.layout import Move, stay
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.differentiable import Team, all_to_all
from duetvl.parallel.division import Division

Tensor = Any


@dataclass(frozen=True, eq=False)
class Pieces:
    """How the rows of a pack lie on ranks of context parallelism; place = ring place * ulysses + ulysses place.

    lengths (S,) are those of the pack's sequences.
    """

    lengths: np.ndarray
    ring: int
    ulysses: int

    def rows(self, place: int) -> np.ndarray:
        """Those of a rank, ascending: an even piece of its ring place's rows."""
        member, part = divmod(place, self.ulysses)
        rows = self._ring_rows(member)
        own = even_range(len(rows), part, self.ulysses)
        return rows[own.start : own.stop]

    def sizes(self, member: int) -> list[int]:
        """How many rows the ranks of a ring place have."""
        return list(even_split(self.count(member), self.ulysses))

    def count(self, member: int) -> int:
        """The rows of a ring place."""
        front, back = self._chunks(member)
        return int(np.sum(front) + np.sum(back))

    def spans(self, member: int, source: int) -> Spans:
        """Which keys of the ring place `source` the rows of `member` see."""
        if source == member:
            return Spans.of_lengths(sum(self._chunks(member)), causal=True)
        if source < member:  # its front chunks lie before all rows here, its back chunks behind them
            rows = _in_turn(sum(self._chunks(member)), np.zeros_like(self.lengths))
            return Spans.of_lengths(rows, _in_turn(*self._chunks(source)), causal=False)
        keys = _in_turn(np.zeros_like(self.lengths), sum(self._chunks(source)))  # all between the two chunks here
        return Spans.of_lengths(_in_turn(*self._chunks(member)), keys, causal=False)

    @cached_property
    def _cuts(self) -> np.ndarray:
        """(S, 2 * ring) the chunks of each sequence."""
        chunks = [even_split(int(length), 2 * self.ring) for length in self.lengths]
        return np.reshape(np.array(chunks, np.int64), (-1, 2 * self.ring))

    def _chunks(self, member: int) -> tuple[Any, Any]:
        """(S,) rows that a ring place has of each sequence: from the front, and from the back."""
        return self._cuts[:, member], self._cuts[:, 2 * self.ring - 1 - member]

    def _ring_rows(self, member: int) -> np.ndarray:
        owners = np.tile([*range(self.ring), *reversed(range(self.ring))], len(self.lengths))
        return np.flatnonzero(np.repeat(owners, np.ravel(self._cuts)) == member)


def _in_turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a[0], b[0], a[1], b[1], ..."""
    return np.ravel(np.stack([a, b], axis=1))


@dataclass(frozen=True)
class HeadShare:
    """Some query heads of the model, and the key and value heads that they need; `group` query heads share one."""

    queries: range
    keys: range
    group: int

    @classmethod
    def of(cls, heads: Heads, queries: range) -> HeadShare:
        """That of some query heads."""
        group = heads.query // heads.kv
        return cls(queries, range(queries.start // group, -(-queries.stop // group)), group)

    def divided(self, heads: Heads, ranks: int) -> list[HeadShare]:
        """As even as can be."""
        parts = (even_range(len(self.queries), place, ranks) for place in range(ranks))
        return [HeadShare.of(heads, self.queries[part.start : part.stop]) for part in parts]

    @property
    def heads(self) -> int:
        """Of queries, keys and values together."""
        return len(self.queries) + 2 * len(self.keys)

    @cached_property
    def spread(self) -> Sequence[int] | None:
        """For each query head the place of its key head among these; None where each has as many, in their order."""
        places = [head // self.group - self.keys.start for head in self.queries]
        if not places:
            return None
        each, more = divmod(len(self.queries), len(self.keys))
        return places if more or places != [i // each for i in range(len(places))] else None

    @property
    def kv_heads(self) -> int:
        """Those that reach attention: one for each query head where they do not fall evenly."""
        return len(self.keys) if self.spread is None else len(self.queries)

    def each_its_own(self, ops: Ops, x: Tensor) -> Tensor:
        """(T, G, K) -> (T, H, K) where query heads do not fall evenly on key heads, else x."""
        return x if self.spread is None else take_heads(ops, x, self.spread)

    def back_to_keys(self, ops: Ops, d: Tensor) -> Tensor:
        """The adjoint of `each_its_own`: the gradients of a key head's copies, added up."""
        if self.spread is None:
            return d
        copies = ops.split(d, [self.spread.count(place) for place in range(len(self.keys))], 1)
        return ops.concat([ops.sum(x, axis=1, keepdims=True) for x in copies], 1)


def shares_of(division: Division) -> list[HeadShare]:
    """Of the heads that a rank has in its layers, those of each of the ranks that exchange heads for rows."""
    return own_share(division).divided(division.heads, division.ulysses)


def own_share(division: Division) -> HeadShare:
    """The heads that a rank has in its layers."""
    heads, mesh = division.heads, division.mesh
    return HeadShare.of(heads, range(heads.query)).divided(heads, mesh.tp)[division.place("tp")]


def take_heads(ops: Ops, x: Tensor, places: Sequence[int]) -> Tensor:
    """Some heads (N,) of x (T, G, K) -> (T, N, K)"""
    if list(places) == list(range(x.shape[1])):
        return x
    heads = ops.take_rows(ops.transpose(x, (1, 0, 2)), ops.from_numpy(np.array(places, np.int32)))
    return ops.transpose(heads, (1, 0, 2))


@dataclass(frozen=True)
class Context:
    """A rank's teams: all ranks of context parallelism, those with which it exchanges heads, and those of its ring."""

    team: Team
    exchange: Team
    ring: Team

    @classmethod
    def of(cls, backend: Backend, groups: Sequence[Sequence[int]], ulysses: int) -> Context:
        """From all teams of context parallelism; `ulysses` ranks of each exchange heads. All ranks call it alike."""
        width = [min(ulysses, len(group)) for group in groups]
        exchange = [g[i : i + u] for g, u in zip(groups, width, strict=True) for i in range(0, len(g), u)]
        rings = [g[i::u] for g, u in zip(groups, width, strict=True) for i in range(u)]
        return cls(*(Team.of(backend, ranks) for ranks in (groups, exchange, rings)))

    def rows(self, lengths: np.ndarray, place: int) -> np.ndarray:
        """Those that the rank at a place has of a pack whose sequences have these lengths."""
        return self._pieces(lengths).rows(place)

    def attend(self, lengths: np.ndarray, heads: Heads, share: HeadShare) -> Attend:
        """Causal attention inside the sequences of a pack; q, k and v have this rank's rows and the heads `share`."""
        ops, team, pieces = self.team.ops, self.exchange, self._pieces(lengths)
        parts, rows = share.divided(heads, team.size), pieces.sizes(self.ring.index)
        queries, keys = [len(part.queries) for part in parts], [len(part.keys) for part in parts]
        needed = [key - share.keys.start for part in parts for key in part.keys]
        within = self._within(pieces, parts[team.index])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (take_heads(ops, x, needed) for x in (k, v))
            out = within(*_heads_for_rows(team, (q, k, v), (queries, keys, keys), rows))
            return all_to_all(team, out, 0, 1, rows, queries)

        return attend

    def bring(self, at_hand: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[np.ndarray, Move]:
        """Of numbered rows that each rank has (ascending) and wants: which ones come here in which order, and the
        function of those at hand that brings them. No row is at hand on two ranks."""
        team = self.team
        if team.size == 1:
            return at_hand[0], stay
        out = [np.flatnonzero(np.isin(at_hand[team.index], rows)) for rows in wanted]
        into = [rows[np.isin(rows, wanted[team.index])] for rows in at_hand]
        index = np.concatenate(out).astype(np.int32)
        sizes = [len(rows) for rows in out], [len(rows) for rows in into]

        def move(x: Tensor) -> Tensor:
            return all_to_all(team, team.ops.take_rows(x, team.ops.from_numpy(index)), 0, 0, *sizes)

        return np.concatenate(into), move

    def _pieces(self, lengths: np.ndarray) -> Pieces:
        return Pieces(np.asarray(lengths, np.int64), self.ring.size, self.exchange.size)

    def _within(self, pieces: Pieces, share: HeadShare) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of whole rows of this rank's ring place, with these heads."""
        place, ops = self.ring.index, self.ring.ops
        if self.ring.size == 1:
            spans, spread = pieces.spans(0, 0), partial(share.each_its_own, ops)
            return lambda q, k, v: ops.attention(q, spread(k), spread(v), spans)[0]
        ring = Ring(self.ring, share, [pieces.spans(place, source) for source in range(self.ring.size)],
                    [pieces.count(source) for source in range(self.ring.size)])  # fmt: skip
        return self.ring.autograd.custom_vjp(ring.forward, ring.backward)


def _heads_for_rows(
    team: Team, tensors: Sequence[Tensor], shares: Sequence[Sequence[int]], rows: Sequence[int]
) -> Sequence[Tensor]:
    """Of tensors (T, H, K) whose heads are cut into `shares`, a share for each rank: this rank's share on all rows, of
    which the ranks have `rows`. All tensors travel in one exchange."""
    if team.size == 1:
        return tensors
    ops = team.ops
    for_ranks = zip(*(ops.split(x, share, 1) for x, share in zip(tensors, shares, strict=True)), strict=True)
    sizes = [sum(heads) for heads in zip(*shares, strict=True)]
    together = ops.concat([piece for pieces in for_ranks for piece in pieces], 1)
    return ops.split(all_to_all(team, together, 1, 0, sizes, rows), [share[team.index] for share in shares], 1)


@dataclass(frozen=True)
class Ring:
    """Attention over a ring of ranks, and its gradient; spans and rows are those of each member's keys.

    Keys and values travel as the model has them, and each query head gets its own copy where it is needed (`share`).
    """

    team: Team
    share: HeadShare
    spans: Sequence[Spans]
    rows: Sequence[int]

    def forward(self, needs: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Own keys first, of which every row sees one at least: so no sum of exponentials is ever empty."""
        ops, held = self.team.ops, (k, v)
        out, lse = ops.attention(q, *self._spread(held), self.spans[self.team.index])
        out = ops.cast(out, "float32")
        for source in self._sources[1:]:
            held = self._pass_on(held, source)
            out, lse = self._merged(out, lse, *ops.attention(q, *self._spread(held), self.spans[source]))
        out = ops.cast(out, ops.dtype_of(q))
        return out, (q, k, v, out, lse)

    def backward(self, needs: tuple[bool, ...], kept: tuple[Tensor, ...], d: Tensor) -> tuple[Tensor, ...]:
        """The gradients of keys and values go round with them, float32, and begin at the first member that is not their
        own: what this one adds to its own waits here."""
        ops, (q, k, v, out, lse) = self.team.ops, kept

        def gradients(keys: Sequence[Tensor], source: int) -> tuple[Tensor, ...]:
            dq, *dkv = ops.attention_grad(d, q, *self._spread(keys), out, lse, self.spans[source])
            return ops.cast(dq, "float32"), *(self.share.back_to_keys(ops, ops.cast(x, "float32")) for x in dkv)

        dq, *own = gradients((k, v), self.team.index)
        held, travelling = (k, v), ()
        for source in self._sources[1:]:
            passed = self._pass_on((*held, *travelling), source)
            held = passed[:2]
            more, *dkv = gradients(held, source)
            dq, travelling = dq + more, _added(passed[2:], dkv) if travelling else tuple(dkv)
        dk, dv = _added(self._pass_on(travelling, self.team.index), own)
        return tuple(ops.cast(x, ops.dtype_of(like)) for x, like in ((dq, q), (dk, k), (dv, v)))

    def _spread(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = (self.share.each_its_own(self.team.ops, x) for x in held)
        return keys, values

    @property
    def _sources(self) -> list[int]:
        """Whose keys are here, one after the other."""
        return [(self.team.index - hop) % self.team.size for hop in range(self.team.size)]

    def _pass_on(self, held: Sequence[Tensor], source: int) -> tuple[Tensor, ...]:
        """What the member before this one has, which is of the keys of `source`, for what is held here."""
        team, ranks = self.team, self.team.collectives.group_ranks(self.team.group)
        after, before = (ranks[(team.index + step) % team.size] for step in (1, -1))
        receives = [Receive((self.rows[source], *x.shape[1:]), team.ops.dtype_of(x), before) for x in held]
        return tuple(team.collectives.exchange([Send(x, after) for x in held], receives))

    def _merged(self, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to two sets of keys, from that to each: out (T, H, K) float32, lse (H, T)."""
        ops = self.team.ops
        largest = ops.where(lse > more_lse, lse, more_lse)
        old, new = ops.exp(lse - largest), ops.exp(more_lse - largest)
        total = old + new

        def weighted(x: Tensor, weight: Tensor) -> Tensor:
            return ops.cast(x, "float32") * ops.transpose(weight / total, (1, 0))[:, :, None]

        return weighted(out, old) + weighted(more, new), largest + ops.log(total)


def _added(some: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(some, others, strict=True))
