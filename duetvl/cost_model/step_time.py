"""Seconds of a training step of a layout: arithmetic, memory and links of a kind of device (docs/planning.md).

The pipeline is the schedule that a run follows, played with each stage's own times; bytes are those of
`parallel/traffic.py`. Nothing overlaps, as in a run: a rank that sends does not compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from duetvl.cost_model.devices import DeviceType
from duetvl.cost_model.links import Team, collective, message
from duetvl.cost_model.passes import Operations, Passes
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.flops import Amounts
from duetvl.models.qwen_vl.memory import BYTES, Load, Trained
from duetvl.models.recompute import RUNS_AGAIN, RecomputeMode
from duetvl.parallel.division import REPLICAS, Division
from duetvl.parallel.schedule import Compute, Message, forward_only, one_f_one_b, played
from duetvl.parallel.traffic import Shared, crossing, first_to_learn, pass_traffic, shared_numbers
from duetvl.parallel.zero import BUCKET

_Held = Mapping[tuple[str, ...], Shared]
_PLAYED: Final = 4  # rounds of a pipeline that are played; what more of them take is the same for each round
_FORWARD: Final = 1 / 3  # of what a pass sends and waits for, forward and backward together


@dataclass(frozen=True)
class Work:
    """What a replica does in a step: micro-batches of these amounts, of which the largest frame has `frame` patches.

    reference: a forward pass of the same model goes before each, as DPO asks for where it keeps no cache.
    """

    amounts: Amounts
    micro_batches: int
    frame: int = 0
    reference: bool = False

    @property
    def load(self) -> Load:
        """A micro-batch as memory is estimated from it."""
        tokens, trained, patches = (
            math.ceil(number) for number in (self.amounts.tokens, self.amounts.trained, self.amounts.patches)
        )
        return Load(tokens, trained, patches, self.frame)


@dataclass(frozen=True)
class Optimizing:
    """What is updated in a step, and how."""

    recompute: RecomputeMode = "none"
    dtype: str = "float32"  # of the weights
    state_dtype: str = "float32"
    offload: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and of what: of the rank that computes longest, the rest being its wait for the others.

    again: what is computed twice. sums: between ranks of `tp`; pieces: of `cp`; blocks: weights gathered (ZeRO-3);
    gradients: summed, and new weights handed out; update: the optimizer's. bubble: what ranks wait for
    others while passes are made, as a share of the time that passes take them.
    """

    seconds: float
    compute: float
    again: float
    sums: float
    pieces: float
    blocks: float
    gradients: float
    update: float
    reference: float
    bubble: float
    sent: int  # bytes, of that rank

    @property
    def waiting(self) -> float:
        """Seconds in which that rank neither computes nor sends: the pipeline's, its messages among them."""
        known = self.compute + self.again + self.sums + self.pieces + self.blocks
        return max(0.0, self.seconds - known - self.gradients - self.update - self.reference)


@dataclass(frozen=True)
class _RankTime:
    """Of one rank and one micro-batch: seconds of its stages forward and backward, and their parts over all of them.

    gradients, update: at the end of a step. sent: bytes of a pass, and at the end.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    compute: float
    again: float
    sums: float
    pieces: float
    blocks: float
    gradients: float
    update: float
    sent: float
    sent_at_end: float

    @property
    def total(self) -> float:
        return sum(self.forward) + sum(self.backward)


class CostModel:
    """What steps of one recipe take, in whatever layout."""

    def __init__(self, config: ModelConfig, trained: Trained, work: Work, optimizing: Optimizing, device: DeviceType):
        """`trained` are the parameters of the whole model. Raises ConfigError where nothing is known of the dtype."""
        self.config, self.trained, self.work, self.optimizing = config, trained, work, optimizing
        self.device = device
        self.operations = device.operations(optimizing.dtype)
        self.memory = device.bandwidth * device.shares.memory
        self.passes = Passes(config, trained, work.amounts, optimizing.recompute, work.frame)

    def at_least(self, division: Division) -> float:
        """Seconds that a step takes at the least: without what ranks wait for each other while a pipeline runs full."""
        ranks, count = _Grid(self, division).ranks, self.work.micro_batches
        before, longest = 0.0, 0.0
        for rank in ranks:
            longest = max(longest, before + count * rank.total)
            before = before + rank.forward[0] + rank.backward[0]
        return longest + max(rank.gradients for rank in ranks) + max(rank.update for rank in ranks)

    def step(self, division: Division, micro_batches: int | None = None) -> StepTime:
        """`division` as any rank of the layout sees it; `micro_batches` of a replica, by default the work's."""
        count = self.work.micro_batches if micro_batches is None else micro_batches
        grid = _Grid(self, division)
        passes, computing = grid.played(count)
        reference = grid.reference(count) if self.work.reference else 0.0
        gradients, update = (max(getattr(rank, part) for rank in grid.ranks) for part in ("gradients", "update"))
        own, whole = max(grid.ranks, key=lambda rank: rank.total), passes + gradients + update + reference
        idle = passes * len(computing) - sum(computing)
        return StepTime(
            seconds=whole,
            **{name: count * getattr(own, name) for name in ("compute", "again", "sums", "pieces", "blocks")},
            gradients=gradients,
            update=update,
            reference=reference,
            bubble=idle / sum(computing) if idle > 0 else 0.0,
            sent=round(own.sent_at_end + count * own.sent),
        )


@dataclass
class _Grid:
    """A layout under a cost model: one rank for each place of the pipeline, those alike computed once."""

    model: CostModel
    seen: Division
    _same: dict[tuple[object, ...], _RankTime] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> list[_RankTime]:
        """Of the first rank at each place."""
        stride = self.seen.mesh.size // self.seen.mesh.pp
        return [self._rank(self.seen.of_rank(place * stride)) for place in range(self.seen.mesh.pp)]

    def played(self, micro_batches: int) -> tuple[float, list[float]]:
        """(seconds of all passes, what each place computes of them); long steps by the rounds that they repeat."""
        mesh, virtual = self.seen.mesh, self.seen.virtual
        if mesh.pp == 1:
            seconds = micro_batches * self.ranks[0].total
            return seconds, [seconds]
        rounds = _PLAYED * mesh.pp
        fewer = micro_batches - max(0, -(-(micro_batches - rounds) // mesh.pp)) * mesh.pp
        seconds, busy = self._play(fewer, virtual)
        if fewer < micro_batches:
            more, busier = self._play(fewer + mesh.pp, virtual)
            repeated = (micro_batches - fewer) / mesh.pp
            seconds = seconds + repeated * (more - seconds)
            busy = [one + repeated * (two - one) for one, two in zip(busy, busier, strict=True)]
        return seconds, busy

    def _play(self, micro_batches: int, virtual: int) -> tuple[float, list[float]]:
        schedule = one_f_one_b(self.seen.mesh.pp, virtual, micro_batches)
        return played(schedule, self._seconds, self._travel)

    def reference(self, micro_batches: int) -> float:
        """Seconds of the forward passes of a reference."""
        mesh, virtual = self.seen.mesh, self.seen.virtual
        if mesh.pp == 1:
            return micro_batches * sum(self.ranks[0].forward)
        few = min(micro_batches, _PLAYED * mesh.pp)
        seconds, busy = played(forward_only(mesh.pp, virtual, few), self._seconds, self._travel)
        return seconds + (micro_batches - few) * max(busy) / few

    def _seconds(self, one: Compute) -> float:
        rank = self.ranks[one.stage % self.seen.mesh.pp]
        return (rank.forward if one.direction == "forward" else rank.backward)[one.stage // self.seen.mesh.pp]

    def _travel(self, one: Message) -> float:
        """Of what a pass leaves for the stage behind it or before it."""
        boundary = one.made_by.stage - (one.made_by.direction == "backward")
        mesh = self.seen.mesh
        stride = mesh.size // mesh.pp
        ranks = (boundary % mesh.pp * stride, (boundary + 1) % mesh.pp * stride)
        return message(self.model.device, *ranks, self._crossings[boundary, one.made_by.direction])

    @cached_property
    def _crossings(self) -> dict[tuple[int, str], float]:
        """Bytes over the boundary behind each stage, forward and backward."""
        model, own, first = self.model, self._own_load(), first_to_learn(self.model.trained, self.seen)
        crossings: dict[tuple[int, str], float] = {}
        for stage in range(self.seen.stages.count - 1):
            sent = model.trained.narrow * crossing(model.config, self.seen, stage, own)
            crossings[stage, "forward"] = sent
            crossings[stage, "backward"] = sent * (stage >= first)
        return crossings

    def _own_load(self) -> Load:
        """What ranks of `cp` have of a micro-batch."""
        load, cp = self.model.work.load, self.seen.mesh.cp
        return Load(math.ceil(load.tokens / cp), math.ceil(load.trained / cp), math.ceil(load.patches / cp))

    def _rank(self, division: Division) -> _RankTime:
        """Computed once for all ranks with as much of everything."""
        operations, stages = self.model.passes.of_rank(division), division.stages
        kind = tuple(
            (one, stage == 0, stage == stages.count - 1, stages.vision[stage], self.model.passes.updated(stages, stage))
            for stage, one in operations.items()
        )
        if kind not in self._same:
            self._same[kind] = self._timed(division, list(operations.values()))
        return self._same[kind]

    def _timed(self, division: Division, operations: Sequence[Operations]) -> _RankTime:
        """Arithmetic, what is sent inside passes, and the gradients that are added to those of other micro-batches."""
        model, mesh = self.model, division.mesh
        traffic = pass_traffic(model.config, model.trained, division, model.work.load, model.optimizing.recompute)
        held = shared_numbers(model.trained, division)
        calls = _Calls.of(model, division)
        sums = self._team(division, ("tp",), traffic.activations, calls.sums * 2 * (mesh.tp - 1))
        pieces = self._team(division, ("cp",), traffic.pieces, calls.exchanges * (mesh.cp - 1))
        blocks = self._team(division, REPLICAS, traffic.blocks, calls.gathers * (mesh.dp * mesh.cp - 1))
        sending, added = sums + pieces + blocks, self._added(held.values())
        ahead = [one.forward / model.operations for one in operations]
        back = [(one.backward + one.again) / model.operations for one in operations]
        again = sum(one.again for one in operations) / model.operations
        total = sum(ahead) + sum(back)
        parts = [(f + b) / total if total else 1 / len(operations) for f, b in zip(ahead, back, strict=True)]
        rest = (1 - _FORWARD) * sending + added
        gradients, sent_at_end = self._gradients(division, held)
        return _RankTime(
            forward=tuple(f + part * _FORWARD * sending for f, part in zip(ahead, parts, strict=True)),
            backward=tuple(b + part * rest for b, part in zip(back, parts, strict=True)),
            compute=total - again + added,
            again=again,
            sums=sums,
            pieces=pieces,
            blocks=blocks,
            gradients=gradients,
            update=self._update(division, held),
            sent=traffic.total,
            sent_at_end=sent_at_end,
        )

    def _added(self, held: Iterable[Shared]) -> float:
        """Seconds in which a pass adds its gradients to the float32 ones: reads both, writes one."""
        numbers = sum(one.own + one.adapters for one in held)
        return numbers * (8 + self.model.trained.narrow) / self.model.memory

    def _team(self, division: Division, axes: Sequence[str], sent: float, rounds: float) -> float:
        team = Team.of(division.team(axes), self.model.device.node)
        return collective(self.model.device, team, sent, rounds)

    def _gradients(self, division: Division, held: _Held) -> tuple[float, float]:
        """(seconds at the end of a step, bytes sent then): gradients summed to those who update, new weights handed
        out."""
        seconds = sent = 0.0
        for axes, shared in held.items():
            others = len(division.team(axes)) - 1
            gradients, weights = shared.sent(others + 1, self.model.trained.narrow)
            rounds = 2 * (1 + gradients // (4 * BUCKET)) * others
            seconds = seconds + self._team(division, axes, gradients + weights, rounds)
            sent = sent + gradients + weights
        return seconds, sent

    def _update(self, division: Division, held: _Held) -> float:
        """Seconds of AdamW over what a rank updates: its state read and written, gradients read, weights written."""
        model, narrow = self.model, self.model.trained.narrow
        moments, seconds = 2 * BYTES[model.optimizing.state_dtype], 0.0
        for axes, shared in held.items():
            ranks = len(division.team(axes))
            for numbers, width in ((shared.own / ranks, narrow), (shared.adapters / ranks, 4)):
                state = moments + 4  # the masters of what is stored in half precision, or the weights themselves
                touched = 2 * state + 2 * 4 + (width if width < 4 else 0)  # gradients are read for their norm as well
                seconds = seconds + numbers * touched / model.memory
                if model.optimizing.offload:
                    seconds = seconds + 2 * numbers * state / model.device.host
        return seconds


@dataclass(frozen=True)
class _Calls:
    """Collectives of a pass forward and backward on a rank."""

    sums: int
    exchanges: int
    gathers: int

    @classmethod
    def of(cls, model: CostModel, division: Division) -> _Calls:
        """In each block two sums each way, four exchanges of heads, or as many rounds of keys and values as `cp` has
        ranks; and one gather each way with the sum of its gradients."""
        vision_again, language_again = (mode == "block" for mode in RUNS_AGAIN[model.optimizing.recompute])
        whole, pictures = division.stages.count == 1, model.work.amounts.patches > 0
        vision, language = (
            (model.config.vision.depth, model.config.text.num_layers)
            if whole
            else (
                sum(division.stages.vision[stage] for stage in division.own_stages),
                sum(division.stages.language[stage] for stage in division.own_stages),
            )
        )
        tower = vision if pictures and division.vision == "shard" else 0
        sums = language * (4 + language_again) + tower * (4 + vision_again)
        exchanges = language * (2 if division.ulysses == 1 else 4) * (1 + language_again / 2)
        gathers = (vision * pictures * (2 + vision_again) + language * (2 + language_again)) * (division.zero == 3)
        return cls(sums, round(exchanges), round(gathers))
