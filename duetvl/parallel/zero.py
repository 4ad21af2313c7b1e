"""ZeRO-1 (arXiv:1910.02054): the ranks that hold a parameter together divide its update among themselves.

Of every trained parameter a rank owns some rows: it sums their gradients, keeps their moments and master weights, and
updates them, as tensors of their own. The new rows of all ranks are then gathered and written into the whole tensors.
A parameter that one rank alone holds is owned by it as it is, so that in a run of one process nothing of this happens.

What travels are buckets of parameters, in an order that follows from the list of parameters alone: in the reverse of
their use, so that the backward pass fills them one after the other and each can go while it still runs. In a pipeline
they go after all backward passes: a rank that waited in a bucket would keep another from the pass that fills it. So
they do where blocks are gathered in these passes (parallel/gathering.py), which all ranks must do in one order; what is
gathered there is owned by one rank as it is, and not in a bucket. A
tied embedding, which is on two stages, goes last, since the stages have no other bucket in common.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.collectives import Pending
from duetvl.core.errors import ConfigError
from duetvl.core.ops import Ops
from duetvl.core.params import Parameter
from duetvl.parallel.differentiable import Team
from duetvl.parallel.division import ENDS, Division, Sharing
from duetvl.parallel.units import Together, Unit, cut, joined

Tensor = Any
Teams = Mapping[tuple[str, ...], Team]

BUCKET: Final = 2**25  # numbers in a bucket, unless a single parameter has more: 128 MB of gradients


class Zero:
    """Gradients and updates of the trained parameters over the ranks of a division.

    A step is `begin`, `ready` for each parameter of the last micro-batch, `reduce`, an update of `owned`, `publish`.
    All ranks do the same, those without a micro-batch too. `owned`: path -> the rows that this rank updates, a
    Parameter of the storage dtype whose `part` says where they lie; the model's own Parameter where no other rank
    holds it. A parameter of which this rank owns no row is absent.
    """

    def __init__(self, backend: Backend, division: Division, parameters: Iterable[Parameter], *, bucket: int = BUCKET):
        """`parameters`: those of this rank that are trained, in the order of their use; the ranks of a stage give the
        same list. All ranks of the run call it together.

        Raises ConfigError where the division is one over another number of ranks than the run has.
        """
        size = backend.collectives.size
        if division.mesh.size != size:
            raise ConfigError(
                f"the model is divided over {division.mesh.size} ranks and the run has {size}; give the division of "
                f"this run, whose degrees multiply to {size}"
            )
        # Made in one order on all ranks, which meet parameters in different ones.
        teams = {axes: Team.of(backend, division.groups(axes)) for axes in division.teams}
        shared = [_share(backend, division, teams, p) for p in parameters]
        self.owned: Mapping[str, Parameter] = {s.owned.path: s.owned for s in shared if s.owned is not None}
        travelling = [s for s in reversed(shared) if s.team.size > 1]
        self._buckets = _buckets(backend.ops, travelling, bucket * size)
        self._bucket_of = {s.parameter.path: b for b in self._buckets for s in b.members}
        self._early = division.mesh.pp == 1 and division.zero == 1  # buckets may go while the backward pass runs
        self._arrived: Counter[Bucket] = Counter()
        self._due: deque[Bucket] = deque()
        self._sent: deque[tuple[Bucket, Pending]] = deque()
        self._updated: Sequence[Bucket] = ()

    def begin(self, conditional: bool) -> None:
        """A step begins, in which some rank has a gradient of the conditional parameters, or none has.

        Without any they are not sent: their main_grad stays None, and an update leaves them alone.
        """
        self._arrived.clear()
        self._sent.clear()
        self._due = deque(b for b in self._buckets if conditional or not b.conditional)
        self._updated = tuple(self._due)

    def ready(self, parameter: Parameter) -> None:
        """The parameter's main_grad is complete on this rank. It is None from here on, where other ranks need it."""
        bucket = self._bucket_of.get(parameter.path)
        if bucket is None:
            return
        self._arrived.update([bucket])
        while self._early and self._due and self._arrived[self._due[0]] == len(self._due[0].members):
            self._send()

    def reduce(self) -> None:
        """Send what is left, with zeros for what this rank has no gradient of, and wait for all: from here on the
        main_grad of owned rows is that of the whole step."""
        while self._due:
            self._send()
        while self._sent:
            bucket, pending = self._sent.popleft()
            bucket.receive(pending.wait())

    def publish(self) -> None:
        """The owned rows have new values: gather those of all ranks, and write them into the whole tensors."""
        for bucket in self._updated:
            bucket.publish()

    def _send(self) -> None:
        bucket = self._due.popleft()
        self._sent.append((bucket, bucket.send()))


@dataclass(frozen=True, eq=False)
class Shared:
    """A parameter, its unit, the team that shares it, and the rows that this rank updates (None: it has none)."""

    parameter: Parameter
    unit: Unit
    team: Team
    owned: Parameter | None

    def take_gradient(self) -> Tensor:
        """The flat gradient of the unit, zeros where this rank has none; the parameter's own is given up."""
        ops, gradient = self.team.ops, self.parameter.main_grad
        self.parameter.main_grad = None
        if gradient is None:
            return ops.zeros((sum(self.unit.sizes),))
        return self.unit.widened(ops, gradient)

    def receive(self, gradient: Tensor) -> None:
        """The flat gradient of the owned rows, summed over the ranks."""
        assert self.owned is not None
        copies = self.unit.sharing.copies
        complete = gradient if copies == 1 else gradient * (1.0 / copies)
        self.owned.main_grad = self.team.ops.reshape(complete, self.owned.shape)

    def write(self, unit: Tensor) -> None:
        """Overwrite the parameter from the flat unit."""
        self.team.ops.assign(self.parameter.tensor, self.unit.narrowed(self.team.ops, unit))


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters of one team that travel together."""

    members: Sequence[Shared]

    @property
    def conditional(self) -> bool:
        """Whether its parameters are."""
        return self.members[0].parameter.conditional

    @property
    def team(self) -> Team:
        """Who shares it."""
        return self.members[0].team

    @cached_property
    def together(self) -> Together:
        """How they travel."""
        return Together([member.unit for member in self.members])

    def send(self) -> Pending:
        """Begin to sum the members' gradients over the ranks."""
        team = self.team
        flat = self.together.by_rank(team.ops, [member.take_gradient() for member in self.members])
        return team.collectives.reduce_scatter_later(flat, team.group, self.together.sizes)

    def receive(self, gradient: Tensor) -> None:
        """The flat gradient of what this rank owns."""
        pieces = self.together.of_rank(self.team.ops, gradient, self.team.index)
        for member, piece in zip(self.members, pieces, strict=True):
            if piece:
                member.receive(piece[0])

    def publish(self) -> None:
        """Gather the owned rows of all ranks, and write them into the whole tensors."""
        team, ops = self.team, self.team.ops
        own = [ops.reshape(m.owned.tensor, (-1,)) for m in self.members if m.owned is not None]
        dtype = ops.dtype_of(self.members[0].parameter.tensor)
        flat = joined(ops, own) if own else ops.zeros((0,), dtype)
        whole = team.collectives.all_gather(flat, team.group, self.together.sizes)
        for member, unit in zip(self.members, self.together.by_unit(ops, whole), strict=True):
            member.write(unit)


def _buckets(ops: Ops, shared: Sequence[Shared], size: int) -> list[Bucket]:
    """In the order in which the backward pass fills them, given the parameters in that order.

    They are the same on all ranks, whatever these hold of a parameter: else two of them could wait for each other in
    different buckets. So its whole numbers are counted, once for each rank that shares it, up to `size` in a bucket.
    """
    filling: dict[tuple[Any, ...], list[int]] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    full: list[list[int]] = []
    for number, each in enumerate(shared):
        p = each.parameter
        kind = (each.unit.sharing.axes, p.conditional, ops.dtype_of(p.tensor))
        count = math.prod(p.place.whole) * each.team.size
        if kind in filling and counts[kind] + count > size:
            full.append(filling.pop(kind))
            counts[kind] = 0
        filling.setdefault(kind, []).append(number)
        counts.update({kind: count})
    full.extend(filling.values())
    full.sort(key=lambda numbers: (ENDS in shared[numbers[0]].unit.sharing.axes, numbers[-1]))
    return [Bucket([shared[number] for number in numbers]) for numbers in full]


def _share(backend: Backend, division: Division, teams: Teams, p: Parameter) -> Shared:
    sharing = division.sharing(p.path, p.place.whole)
    team = teams[sharing.axes]
    unit = Unit.of(sharing, p.shape, team.size, p.path)
    if team.size == 1:
        return Shared(p, unit, team, p)
    whole = _whole_unit(teams["tp",], division, p) if _overlaps(division, p, sharing) else p.tensor
    return Shared(p, unit, team, _owned(backend.ops, p, sharing, whole, unit.rows[team.index]))


def _owned(ops: Ops, p: Parameter, sharing: Sharing, unit: Tensor, rows: range) -> Parameter | None:
    """A parameter of its own with these rows of the unit."""
    if not rows:
        return None
    part = sharing.unit.rows(rows.start, rows.stop)
    tensor = ops.zeros(part.shape, ops.dtype_of(p.tensor))
    (own,) = cut(ops, unit, [rows.start, len(rows), unit.shape[0] - rows.stop])[1]
    ops.assign(tensor, own)
    return Parameter(p.path, tensor, conditional=p.conditional, part=part)


def _overlaps(division: Division, p: Parameter, sharing: Sharing) -> bool:
    """Whether any of the ranks that share a parameter holds but some rows of it; the same on all of them."""
    team = division.team(sharing.axes)
    return any(division.of_rank(rank).part(p.path, p.place.whole).shape != sharing.unit.shape for rank in team)


def _whole_unit(team: Team, division: Division, p: Parameter) -> Tensor:
    """All rows of what the ranks of a team, which lie along `tp`, hold overlapping rows of. They call it together."""
    mesh, whole = division.mesh, p.place.whole
    views = [division.of_rank(rank) for rank in mesh.ranks_along("tp", rank=division.rank)]
    firsts = [view.sharing(p.path, whole).first for view in views]
    counts = [view.part(p.path, whole).shape[0] for view in views]
    held = team.collectives.all_gather(p.tensor, team.group, counts)
    numbers = np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)])
    places = np.unique(numbers, return_index=True)[1]  # of each row of the unit, where it was gathered to first
    return team.ops.take_rows(held, team.ops.from_numpy(places.astype(np.int32)))
