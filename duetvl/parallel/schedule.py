"""Pipeline schedules as data: 1F1B (Narayanan et al., arXiv:2104.04473) and its interleaved form with virtual stages.

The model's stages follow each other along the ranks, and with virtual stages come round again: rank r has the stages
r, r + ranks, r + 2 ranks, ... A schedule is made by playing a step through with a forward pass of one unit of time and
a backward pass of two. Each rank makes a forward pass unless it has as many tapes in flight as it may, else a backward
pass. What has been computed travels at the first time at which sender and receiver are
both between two computations; these times are the rounds of the schedule. Each rank makes one exchange of all that is
due in a round, in the order of the rounds, so that no sender needs a buffer and no ranks can wait for each other.

Where nothing is learned, in an evaluation or for a reference, the same is played with forward passes alone.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal

Direction = Literal["forward", "backward"]
_TIME: Final = {"forward": 1, "backward": 2}


@dataclass(frozen=True, order=True)
class Compute:
    """A forward or backward pass of a micro-batch through one of this rank's stages, numbered in the whole model."""

    direction: Direction
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Message:
    """What a pass leaves for another rank: activations going forward, their gradients going back.

    `made_by` is the pass, `peer` the rank at the other end.
    """

    made_by: Compute
    peer: int


@dataclass(frozen=True)
class Exchange:
    """All that a rank sends and receives between two computations."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


Action = Compute | Exchange


@dataclass(frozen=True)
class Timed:
    """A pass in units of a forward pass's time."""

    compute: Compute
    start: int

    @property
    def stop(self) -> int:
        """When it ends."""
        return self.start + _TIME[self.compute.direction]


@dataclass(frozen=True)
class Schedule:
    """What each rank does in a step, in order, and how long the step takes in units of a forward pass.

    starts: when each rank begins each of its passes.
    """

    actions: tuple[tuple[Action, ...], ...]
    length: int
    starts: tuple[tuple[int, ...], ...]

    def timed(self, rank: int) -> list[Timed]:
        """A rank's passes with their times."""
        passes = [action for action in self.actions[rank] if isinstance(action, Compute)]
        return [Timed(one, start) for one, start in zip(passes, self.starts[rank], strict=True)]

    @property
    def idle(self) -> float:
        """The share of the step that a rank waits, on average: the bubble."""
        passes = [action for rank in self.actions for action in rank if isinstance(action, Compute)]
        busy = sum(_TIME[p.direction] for p in passes)
        return 1 - busy / (self.length * len(self.actions)) if busy else 0.0


@lru_cache(maxsize=64)
def one_f_one_b(ranks: int, virtual: int, micro_batches: int) -> Schedule:
    """A step of this number of micro-batches, which may be fewer than the stages and need not divide by anything.

    One rank makes all passes by itself, and without a micro-batch nobody makes any.
    """
    return _Play(ranks, virtual, micro_batches).through()


@lru_cache(maxsize=64)
def forward_only(ranks: int, virtual: int, micro_batches: int) -> Schedule:
    """The forward passes alone: no tapes, so that a rank may be any number of them ahead."""
    return _Play(ranks, virtual, micro_batches, backward=False).through()


def formula(ranks: int, virtual: int, micro_batches: int) -> float:
    """The bubble as a share of the computing time, where `ranks` divides the micro-batches of an interleaved schedule.

    arXiv:2104.04473, section 2.2. It is the same for `one_f_one_b` and `forward_only`.
    """
    return (ranks - 1) / (virtual * micro_batches) if micro_batches else 0.0


def tapes_in_flight(rank: int, ranks: int, virtual: int) -> int:
    """How many forward passes a rank may be ahead of its backward passes, which bounds its memory."""
    if virtual == 1:
        return ranks - rank
    return 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1


def played(
    schedule: Schedule, seconds: Callable[[Compute], float], travel: Callable[[Message], float]
) -> tuple[float, list[float]]:
    """(how long a step takes, how long each rank computes in it) where passes and messages take these times.

    Each rank does what the schedule says in that order. A message travels once sender and receiver are both at their
    exchange, which ends for each of them with the last of its own messages.
    """
    count = len(schedule.actions)
    now, busy, place = [0.0] * count, [0.0] * count, [0] * count
    arrivals: dict[Compute, float] = {}  # of the first of a message's two ranks at its exchange
    ends: dict[Compute, float] = {}
    waiting, ready = [False] * count, deque(range(count))
    while ready:
        rank = ready.popleft()
        actions = schedule.actions[rank]
        while place[rank] < len(actions):
            action = actions[place[rank]]
            if isinstance(action, Compute):
                now[rank] = now[rank] + seconds(action)
                busy[rank] = busy[rank] + seconds(action)
            else:
                messages = (*action.sends, *action.receives)
                if not waiting[rank]:
                    waiting[rank] = True
                    for message in messages:
                        key = message.made_by
                        if key in arrivals:
                            ends[key] = max(arrivals.pop(key), now[rank]) + travel(message)
                            ready.append(message.peer)
                        else:
                            arrivals[key] = now[rank]
                if not all(message.made_by in ends for message in messages):
                    break
                now[rank] = max(now[rank], *(ends[message.made_by] for message in messages))
                waiting[rank] = False
            place[rank] = place[rank] + 1
    assert all(place[rank] == len(schedule.actions[rank]) for rank in range(count)), "a message has no other end"
    return max(now), busy


@dataclass
class _Rank:
    """One rank while a step is played through."""

    number: int
    forward: deque[Compute]
    backward: deque[Compute]
    limit: float
    free_at: int = 0
    running: Compute | None = None
    in_flight: int = 0
    actions: list[Action] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return not self.forward and not self.backward and self.running is None


class _Play:
    """A step played through in time."""

    def __init__(self, ranks: int, virtual: int, micro_batches: int, *, backward: bool = True):
        self.count, self.last, self.backward = ranks, ranks * virtual - 1, backward
        self.ranks = [self._rank(number, virtual, micro_batches) for number in range(ranks)]
        self.here: set[Compute] = set()  # passes whose input is on their rank
        self.waiting: list[tuple[int, int, Compute]] = []  # sender, receiver, the pass that has been made
        self.here.update(Compute("forward", 0, micro_batch) for micro_batch in range(micro_batches))

    def _rank(self, number: int, virtual: int, micro_batches: int) -> _Rank:
        """Forward passes go round by groups of as many micro-batches as there are ranks, backward passes likewise."""
        every = [(n // self.count, chunk, n) for n in range(micro_batches) for chunk in range(virtual)]
        forward = deque(Compute("forward", chunk * self.count + number, n) for _, chunk, n in sorted(every))
        if not self.backward:
            return _Rank(number, forward, deque(), float("inf"))
        back = sorted((group, -chunk, n) for group, chunk, n in every)
        backward = deque(Compute("backward", -chunk * self.count + number, n) for _, chunk, n in back)
        return _Rank(number, forward, backward, tapes_in_flight(number, self.count, virtual))

    def through(self) -> Schedule:
        now = 0
        while not all(rank.done for rank in self.ranks):
            for rank in self.ranks:
                if rank.running is not None and rank.free_at <= now:
                    self._end(rank)
            self._travel()
            for rank in self.ranks:
                if rank.running is None:
                    self._begin(rank, now)
            ends = [rank.free_at for rank in self.ranks if rank.running is not None]
            now = min(ends, default=now)
            assert ends or all(rank.done for rank in self.ranks), "every rank waits for another one"
        actions = tuple(tuple(rank.actions) for rank in self.ranks)
        return Schedule(actions, now, tuple(tuple(rank.starts) for rank in self.ranks))

    def _begin(self, rank: _Rank, now: int) -> None:
        """The next forward pass if it can and may run, else the next backward pass if it can."""
        for queue, may in ((rank.forward, rank.in_flight < rank.limit), (rank.backward, True)):
            if queue and may and queue[0] in self.here:
                rank.running = queue.popleft()
                rank.free_at = now + _TIME[rank.running.direction]
                rank.in_flight = rank.in_flight + (1 if rank.running.direction == "forward" else -1)
                rank.actions.append(rank.running)
                rank.starts.append(now)
                return

    def _end(self, rank: _Rank) -> None:
        """A pass has been made: what it leaves is for the next one of its micro-batch."""
        made, rank.running = rank.running, None
        assert made is not None, "only a running pass ends"
        following = self._following(made)
        if following is None:
            return
        receiver = following.stage % self.count
        if receiver == rank.number:
            self.here.add(following)
        else:
            self.waiting.append((rank.number, receiver, made))

    def _following(self, made: Compute) -> Compute | None:
        stage, micro_batch = made.stage, made.micro_batch
        if made.direction == "forward":
            if stage < self.last:
                return Compute("forward", stage + 1, micro_batch)
            return Compute("backward", stage, micro_batch) if self.backward else None
        return Compute("backward", stage - 1, micro_batch) if stage > 0 else None

    def _travel(self) -> None:
        """Messages whose two ranks are both between computations go; each of these ranks makes one exchange."""
        free = {rank.number for rank in self.ranks if rank.running is None}
        going = [item for item in self.waiting if item[0] in free and item[1] in free]
        self.waiting = [item for item in self.waiting if item[0] not in free or item[1] not in free]
        sends: dict[int, list[Message]] = defaultdict(list)
        receives: dict[int, list[Message]] = defaultdict(list)
        for sender, receiver, made in going:
            sends[sender].append(Message(made, receiver))
            receives[receiver].append(Message(made, sender))
            following = self._following(made)
            assert following is not None, "the last pass leaves nothing"
            self.here.add(following)
        for number in sorted({*sends, *receives}):
            self.ranks[number].actions.append(Exchange(tuple(sends[number]), tuple(receives[number])))
