"""How the ranks of a run on CPU find each other: at the scheduler, the process that msrun starts beside them.

MindSpore's own way takes six seconds, and its scheduler ends ranks whose peers are slow.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack

from duetvl.core.host_transport import Address

_HELLO = struct.Struct("!8si")  # a mark, and the rank that msrun has numbered, or -1
_MARK = b"duetvl 1"
_RANK = struct.Struct("!i")
_ADDRESS = len(Address("", 0, b"").packed())


def meet(scheduler: tuple[str, int], number: int, address: Address, count: int, limit: float) -> Meeting:
    """Tell the scheduler this rank's address, and learn all of them. OSError where that takes more than `limit` s."""
    deadline = time.monotonic() + limit
    connection = _call(scheduler, deadline)
    connection.sendall(_HELLO.pack(_MARK, number) + address.packed())
    (rank,) = _RANK.unpack(_exactly(connection, _RANK.size, deadline))
    rows = _exactly(connection, count * _ADDRESS, deadline)
    addresses = [Address.unpack(rows[i * _ADDRESS : (i + 1) * _ADDRESS]) for i in range(count)]
    return Meeting(connection, rank, addresses)


class Meeting:
    """The scheduler stays until every rank has closed this."""

    def __init__(self, connection: socket.socket, rank: int, addresses: Sequence[Address]):
        """What the scheduler has told."""
        self._connection, self.rank, self.addresses = connection, rank, addresses

    def close(self) -> None:
        """Leave."""
        self._connection.close()


def schedule(scheduler: tuple[str, int], count: int, limit: float) -> None:
    """Be the scheduler of `count` ranks: tell each of them all addresses, and return once they have left.

    OSError where they do not come within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    family = socket.getaddrinfo(*scheduler, type=socket.SOCK_STREAM)[0][0]
    with ExitStack() as open_things:
        listener = open_things.enter_context(socket.create_server(("", scheduler[1]), family=family, backlog=count))
        came: list[tuple[socket.socket, int, bytes]] = []
        while len(came) < count:
            listener.settimeout(_left(deadline))
            connection = open_things.enter_context(listener.accept()[0])
            if (hello := _hello(connection, deadline)) is not None:
                came.append((connection, *hello))
        seated = _seated(came, count)
        everything = b"".join(address for _, address in seated)
        for rank, (connection, _) in enumerate(seated):
            connection.settimeout(None)
            connection.sendall(_RANK.pack(rank) + everything)
        for connection, _ in seated:
            _wait_for_end(connection)


def _seated(came: Sequence[tuple[socket.socket, int, bytes]], count: int) -> list[tuple[socket.socket, bytes]]:
    """In the order of the ranks: those that msrun has numbered, and the others in between as they came."""
    seats: dict[int, tuple[socket.socket, bytes]] = {}
    for connection, number, address in came:
        if number >= 0:
            if number in seats or number >= count:
                raise OSError(f"two processes, or one too many, are rank {number} of {count}")
            seats[number] = connection, address
    free = iter(rank for rank in range(count) if rank not in seats)
    for connection, number, address in came:
        if number < 0:
            seats[next(free)] = connection, address
    return [seats[rank] for rank in range(count)]


def _hello(connection: socket.socket, deadline: float) -> tuple[int, bytes] | None:
    """A rank's number and address; None from a stranger, who must not hold up the run."""
    try:
        data = _exactly(connection, _HELLO.size + _ADDRESS, min(deadline, time.monotonic() + 5.0))
    except OSError:
        return None
    mark, number = _HELLO.unpack(data[: _HELLO.size])
    return (number, data[_HELLO.size :]) if mark == _MARK else None


def _call(scheduler: tuple[str, int], deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(scheduler, timeout=_left(deadline))
        except OSError:  # it may not be there yet
            if time.monotonic() + 0.1 >= deadline:
                raise
            time.sleep(0.1)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        connection.settimeout(_left(deadline))
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the other side has left")
        data += piece
    return data


def _wait_for_end(connection: socket.socket) -> None:
    try:
        while connection.recv(1):
            pass
    except OSError:
        return  # however it ended


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("nobody came in time")
    return left
