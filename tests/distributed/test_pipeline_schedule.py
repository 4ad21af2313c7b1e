"""Pipeline schedules on paper: every pass once and in order, the bubble by the formula, and no ranks that wait for
each other where nothing is buffered."""

from __future__ import annotations

from collections import Counter

import pytest

from duetvl.parallel.schedule import (
    Compute,
    Direction,
    Exchange,
    Schedule,
    formula,
    forward_only,
    one_f_one_b,
    tapes_in_flight,
)

UNIFORM = [
    (1, 1, 1),
    (2, 1, 4),
    (4, 1, 8),
    (8, 1, 64),
    (4, 2, 8),
    (4, 3, 8),
    (8, 4, 32),
    (64, 1, 64),
    (16, 8, 64),
    (64, 8, 64),
]
UNEVEN = [(1, 3, 5), (3, 2, 0), (4, 1, 3), (4, 2, 7), (3, 2, 5), (5, 3, 13), (4, 4, 1), (7, 1, 2), (64, 2, 9)]
CASES = UNIFORM + UNEVEN


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request: pytest.FixtureRequest) -> tuple[tuple[int, int, int], Schedule]:
    return request.param, one_f_one_b(*request.param)


@pytest.fixture(scope="module", params=CASES, ids=str)
def forward(request: pytest.FixtureRequest) -> tuple[tuple[int, int, int], Schedule]:
    return request.param, forward_only(*request.param)


def following(made: Compute, last: int) -> Compute | None:
    if made.direction == "forward" and made.stage < last:
        return Compute("forward", made.stage + 1, made.micro_batch)
    if made.direction == "backward" and made.stage > 0:
        return Compute("backward", made.stage - 1, made.micro_batch)
    return None


def test_every_pass_is_made_once_on_its_rank(made: tuple[tuple[int, int, int], Schedule]) -> None:
    (ranks, virtual, micro_batches), schedule = made
    check_passes(ranks, virtual, micro_batches, schedule, ("forward", "backward"))


def test_forward_passes_alone_are_made_once_each(forward: tuple[tuple[int, int, int], Schedule]) -> None:
    (ranks, virtual, micro_batches), schedule = forward
    check_passes(ranks, virtual, micro_batches, schedule, ("forward",))


def check_passes(
    ranks: int, virtual: int, micro_batches: int, schedule: Schedule, directions: tuple[Direction, ...]
) -> None:
    assert len(schedule.actions) == ranks
    for rank, actions in enumerate(schedule.actions):
        passes = Counter(action for action in actions if isinstance(action, Compute))
        assert passes == Counter(
            Compute(direction, chunk * ranks + rank, n)
            for direction in directions
            for chunk in range(virtual)
            for n in range(micro_batches)
        )


def test_tapes_in_flight_are_bounded(made: tuple[tuple[int, int, int], Schedule]) -> None:
    (ranks, virtual, _), schedule = made
    for rank, actions in enumerate(schedule.actions):
        in_flight = 0
        for action in actions:
            if isinstance(action, Compute):
                in_flight += 1 if action.direction == "forward" else -1
                assert 0 <= in_flight <= tapes_in_flight(rank, ranks, virtual)


def test_messages_arrive_before_they_are_needed_with_nothing_buffered(
    made: tuple[tuple[int, int, int], Schedule],
) -> None:
    simulate(*made)


def test_messages_of_forward_passes_alone_arrive_before_they_are_needed(
    forward: tuple[tuple[int, int, int], Schedule],
) -> None:
    simulate(*forward)


def simulate(made_for: tuple[int, int, int], schedule: Schedule) -> None:
    """Ranks run at any speed; an exchange ends when every rank in it has come to its own, with the same messages."""
    ranks, virtual, micro_batches = made_for
    last = ranks * virtual - 1
    here: list[set[Compute]] = [set() for _ in range(ranks)]
    here[0] |= {Compute("forward", 0, n) for n in range(micro_batches)}
    at = [0] * ranks

    def current(rank: int) -> Compute | Exchange | None:
        return schedule.actions[rank][at[rank]] if at[rank] < len(schedule.actions[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while isinstance(action := current(rank), Compute):
                if action.direction == "backward" and action.stage == last:
                    assert Compute("forward", last, action.micro_batch) in here[rank]
                else:
                    assert action in here[rank], (rank, action)
                here[rank].add(action)
                after = following(action, last)
                if after is not None and after.stage % ranks == rank:
                    here[rank].add(after)
                at[rank] += 1
                moved = True
        moved |= meet(schedule, at, here, last)
    assert at == [len(actions) for actions in schedule.actions]


def meet(schedule: Schedule, at: list[int], here: list[set[Compute]], last: int) -> bool:
    """Let the exchanges go that all their ranks have come to."""
    present = {
        rank: actions[at[rank]]
        for rank, actions in enumerate(schedule.actions)
        if at[rank] < len(actions) and isinstance(actions[at[rank]], Exchange)
    }
    ready = dict(present)
    while True:
        kept = {rank: one for rank, one in ready.items() if complete(rank, one, ready)}
        if kept == ready:
            break
        ready = kept
    for rank, exchange in ready.items():
        for message in exchange.receives:
            after = following(message.made_by, last)
            assert after is not None
            here[rank].add(after)
        at[rank] += 1
    return bool(ready)


def complete(rank: int, exchange: Exchange, present: dict[int, Exchange]) -> bool:
    """Whether every message of it has its other half in its peer's exchange."""
    sent = all(
        m.peer in present and (rank, m.made_by) in {(r.peer, r.made_by) for r in present[m.peer].receives}
        for m in exchange.sends
    )
    received = all(
        m.peer in present and (rank, m.made_by) in {(s.peer, s.made_by) for s in present[m.peer].sends}
        for m in exchange.receives
    )
    return sent and received


@pytest.mark.parametrize(("ranks", "virtual", "micro_batches"), UNIFORM)
def test_the_bubble_is_that_of_the_formula(ranks: int, virtual: int, micro_batches: int) -> None:
    """(p - 1) / (v m) of the computing time, arXiv:2104.04473 section 2.2."""
    expected = pytest.approx((ranks - 1) / (virtual * micro_batches))
    assert formula(ranks, virtual, micro_batches) == expected
    for make in (one_f_one_b, forward_only):
        schedule = make(ranks, virtual, micro_batches)
        assert schedule.idle / (1 - schedule.idle) == expected
