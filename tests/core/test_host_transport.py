"""Messages between ranks over TCP, the ranks being threads of this process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from duetvl.core.errors import BackendError
from duetvl.core.host_transport import Address, HostTransport, Incoming, Outgoing

SIZE = 3


@pytest.fixture
def ranks() -> Iterator[list[HostTransport]]:
    """Three connected ranks that wait two seconds for each other."""
    made = [HostTransport(rank, SIZE, "127.0.0.1", limit=2.0) for rank in range(SIZE)]
    together(lambda t: t.connect([other.address for other in made]), made)
    yield made
    for transport in made:
        transport.close()


def together(fn: Callable[[HostTransport], Any], ranks: list[HostTransport]) -> list[Any]:
    with ThreadPoolExecutor(SIZE) as pool:
        return [future.result() for future in [pool.submit(fn, transport) for transport in ranks]]


def others(transport: HostTransport) -> list[int]:
    return [rank for rank in range(SIZE) if rank != transport.rank]


def test_large_messages_cross_in_both_directions(ranks: list[HostTransport]) -> None:
    def swap(t: HostTransport) -> None:
        mine = np.full(1 << 21, t.rank, np.float32)
        got = {r: np.empty_like(mine) for r in others(t)}
        t.swap([Outgoing(r, mine) for r in others(t)], [Incoming(r, got[r]) for r in others(t)])
        assert all((got[r] == r).all() for r in others(t))

    together(swap, ranks)


def test_many_small_and_empty_messages_keep_order(ranks: list[HostTransport]) -> None:
    def swap(t: HostTransport) -> None:
        sizes = [i % 5 for i in range(100)]
        got = {r: [np.empty(n, np.int64) for n in sizes] for r in others(t)}
        sends = [Outgoing(r, np.full(n, 1000 * t.rank + i)) for i, n in enumerate(sizes) for r in others(t)]
        t.swap(sends, [Incoming(r, array) for r in others(t) for array in got[r]])
        for r in others(t):
            assert [a.tolist() for a in got[r]] == [[1000 * r + i] * n for i, n in enumerate(sizes)]

    together(swap, ranks)


def test_a_strided_array_is_sent_by_value(ranks: list[HostTransport]) -> None:
    table, got = np.arange(12).reshape(3, 4), np.empty(3, np.int64)
    ranks[0].swap([Outgoing(1, table[:, 1])], [])
    ranks[1].swap([], [Incoming(0, got)])
    assert got.tolist() == [1, 5, 9]


def test_objects(ranks: list[HostTransport]) -> None:
    found = together(lambda t: t.swap_objects({"rank": t.rank}, range(SIZE)), ranks)
    assert found == [[{"rank": rank} for rank in range(SIZE)]] * SIZE


def test_values_with_arrays_of_every_kind_to_each_rank_another(ranks: list[HostTransport]) -> None:
    arrays = [np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.arange(8)[::2], np.full(1 << 20, 7, np.uint8)]

    def swap(t: HostTransport) -> dict[int, Any]:
        return t.swap_values({rank: (t.rank, rank, arrays) for rank in others(t)})

    for rank, found in enumerate(together(swap, ranks)):
        assert sorted(found) == others(ranks[rank])
        for source, (sender, receiver, values) in found.items():
            assert (sender, receiver) == (source, rank)
            for value, expected in zip(values, arrays, strict=True):
                np.testing.assert_array_equal(value, expected)
                value += 1  # it may be written to


def test_another_length_than_expected_is_named(ranks: list[HostTransport]) -> None:
    ranks[0].swap([Outgoing(1, np.zeros(3, np.float32))], [])
    with pytest.raises(BackendError, match="rank 0 sent 12 bytes where 16 were expected"):
        ranks[1].swap([], [Incoming(0, np.zeros(4, np.float32))])


def test_a_rank_that_leaves_is_noticed_at_once_by_all(ranks: list[HostTransport]) -> None:
    ranks[2].close()
    with pytest.raises(BackendError, match="rank 2 has gone"):
        ranks[1].swap([], [Incoming(2, np.zeros(4))])
    with pytest.raises(BackendError, match="rank 1 has gone"):  # it closed too, so that nobody waits for it
        ranks[0].swap([], [Incoming(1, np.zeros(4))])
    with pytest.raises(BackendError, match="an earlier call failed"):
        ranks[0].swap([Outgoing(2, np.zeros(4))], [])


def test_a_rank_that_says_nothing_is_named_after_the_limit(ranks: list[HostTransport]) -> None:
    with pytest.raises(BackendError, match=r"rank 0 has waited 2 s for ranks \[1\].*DUETVL_PEER_TIMEOUT"):
        ranks[0].swap([], [Incoming(1, np.zeros(4))])


def test_a_patient_rank_waits_until_another_thread_finds_it_too_long(patient: list[HostTransport]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patient[0].swap, [], [Incoming(1, np.zeros(4))])
        begun = time.monotonic()
        with pytest.raises(BackendError, match=r"rank 0 has waited 0 s for ranks \[1\]"):
            look(patient[0], begun)
        patient[1].check_waiting(begun)  # which waits for nobody
        assert not waiting.done()
        patient[0].abandon()
        with pytest.raises(BackendError, match="rank 1 has gone"):
            waiting.result()


def look(transport: HostTransport, begun: float) -> None:
    while time.monotonic() - begun < 30:
        transport.check_waiting(begun)
        time.sleep(0.01)


@pytest.fixture
def patient() -> Iterator[list[HostTransport]]:
    made = [HostTransport(rank, 2, "127.0.0.1", limit=0.3, patient=True) for rank in range(2)]
    together(lambda t: t.connect([other.address for other in made]), made)
    yield made
    for transport in made:
        transport.close()


def test_missing_ranks_are_named_after_the_limit() -> None:
    alone = HostTransport(0, 2, "127.0.0.1", limit=0.2)
    with pytest.raises(BackendError, match=r"no connection to ranks \[1\]"):
        alone.connect([alone.address, Address("127.0.0.1", 9, b"")])


def test_a_stranger_is_not_let_in() -> None:
    first, second = (HostTransport(rank, 2, "127.0.0.1", limit=2.0) for rank in range(2))
    with socket.create_connection(first.address[:2]) as stranger:
        stranger.sendall(bytes(24))
        addresses = [Address.unpack(t.address.packed()) for t in (first, second)]
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(t.connect, addresses) for t in (first, second)]:
                future.result()
    second.swap([Outgoing(0, np.ones(2))], [])
    got = np.zeros(2)
    first.swap([], [Incoming(1, got)])
    assert got.tolist() == [1.0, 1.0]
    first.close()
    second.close()


def test_values_of_one_rank_and_its_end(ranks: list[HostTransport]) -> None:
    """Values go one way, whatever they are; another thread hears of an end, and of nothing else."""
    sent = [{"ids": np.arange(5, dtype=np.int32), "none": np.zeros((0, 3))}, None, "text" * 10000, b""]

    def receive(t: HostTransport) -> list[Any]:
        return [t.receive_value(0) for _ in sent]

    with ThreadPoolExecutor(SIZE) as pool:
        ended = pool.submit(ranks[0].wait_for_end)
        received = [pool.submit(receive, transport) for transport in ranks[1:]]
        for value in sent:
            ranks[0].send_value(value, [1, 2])
        for found in (future.result() for future in received):
            assert found[1:] == sent[1:]
            assert all((found[0][key] == sent[0][key]).all() for key in sent[0])
            found[0]["ids"][0] = 7  # it is the receiver's own
        ranks[2].send_value("before it goes", [0])
        assert not ended.done()
        ranks[2].close()
        assert ended.result() == 2
        assert ranks[0].receive_value(2) == "before it goes"
        with pytest.raises(BackendError, match="rank 2 has gone"):
            ranks[0].receive_value(2)
