"""Messages between the ranks of a run over TCP, for what must not or cannot go through a framework's collectives.

They carry what the data threads exchange, as a framework belongs to the main thread, and what MindSpore's own
collectives lack on a CPU: tensors lie in host memory there, so numpy views of them are sent and received without a
copy. Every rank has one connection to every other. A message is its length in eight bytes and then its bytes; receiver
and sender must agree on the length. Waiting for a rank that is alive ends after `limit` seconds without progress,
waiting for one that has left ends at once; either way with a BackendError, and this rank's connections close, so that
others notice too.
"""

from __future__ import annotations

import pickle
import secrets
import select
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from duetvl.core.errors import BackendError

_LENGTH = struct.Struct("!Q")
_HELLO = struct.Struct("!Q16s")  # the caller's rank, and the token that the called rank announced
_ADDRESS = struct.Struct("!64sH16s")
_EAGER = 8  # non-blocking attempts before the kernel is asked to wait: small messages need no selector


class Address(NamedTuple):
    """Where a rank listens, and the token that its callers must show."""

    host: str
    port: int
    token: bytes

    def packed(self) -> bytes:
        """The same number of bytes for every address."""
        return _ADDRESS.pack(self.host.encode(), self.port, self.token)

    @classmethod
    def unpack(cls, data: bytes) -> Address:
        """The inverse of `packed`."""
        host, port, token = _ADDRESS.unpack(data)
        return cls(host.rstrip(b"\0").decode(), port, token)


class Outgoing(NamedTuple):
    """An array for a rank."""

    rank: int
    array: np.ndarray


class Incoming(NamedTuple):
    """A C-contiguous array to be filled with the next message of a rank."""

    rank: int
    array: np.ndarray


class HostTransport:
    """The connections of one rank. Make one, give `address` to the others, then `connect` with the addresses of all."""

    def __init__(self, rank: int, size: int, reach: str, limit: float, *, patient: bool = False):
        """`reach` is a host that all ranks can reach (the scheduler's): the interface towards it is the one used.

        A patient one has no limit once it is connected; another thread can look after it with `check_waiting`.
        """
        self.rank, self.size, self.limit, self.patient = rank, size, limit, patient
        self._peers: dict[int, _Peer] = {}
        self._waiting: _Waiting | None = None
        family, host = _interface_towards(reach)
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(size)
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_bytes(16))

    def connect(self, addresses: Sequence[Address]) -> None:
        """Call the ranks below, then answer those above. The listeners are open, so nobody waits for an answer."""
        deadline = time.monotonic() + self.limit
        try:
            for rank in range(self.rank):
                self._peers[rank] = _Peer(rank, self._call(addresses[rank]))
            while len(self._peers) < self.size - 1:
                self._answer(deadline)
        except OSError as error:
            missing = sorted(set(range(self.size)) - set(self._peers) - {self.rank})
            self.close()
            raise BackendError(
                f"rank {self.rank} has no connection to ranks {missing} ({error}); all ranks must reach each other "
                f"by TCP on the interface of {self.address.host}"
            ) from None
        finally:
            self._listener.close()

    def swap(self, sends: Iterable[Outgoing], receives: Iterable[Incoming]) -> None:
        """Send and receive all of it at once. Between two ranks, messages keep their order."""
        busy: set[_Peer] = set()
        for rank, array in sends:
            peer = self._peer(rank)
            peer.send(array)
            busy.add(peer)
        for rank, array in receives:
            peer = self._peer(rank)
            peer.receive(array)
            busy.add(peer)
        try:
            for _ in range(_EAGER):
                busy = {peer for peer in busy if not peer.advance()}
                if not busy:
                    return
            self._wait_for(busy)
        except BackendError:
            self.close()
            raise
        finally:
            self._waiting = None

    def swap_objects(self, value: Any, ranks: Sequence[int]) -> list[Any]:
        """Every rank's picklable value, in the order of `ranks`, this one among them."""
        others = [rank for rank in ranks if rank != self.rank]
        found = self.swap_values(dict.fromkeys(others, value)) | {self.rank: value}
        return [found[rank] for rank in ranks]

    def swap_values(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """A picklable value for each of some ranks, for one from each of them. Arrays are not copied into a pickle.

        A value that goes to several ranks is pickled once.
        """
        pickled = {id(value): _pickled(value) for value in values.values()}
        parts = {rank: pickled[id(value)] for rank, value in values.items()}
        counts = {rank: np.empty(1, np.int64) for rank in values}
        self._swap_each({r: [np.array([len(p)])] for r, p in parts.items()}, {r: [c] for r, c in counts.items()})
        sizes = {rank: np.empty(int(count[0]), np.int64) for rank, count in counts.items()}
        lengths = {r: [np.array([part.size for part in p])] for r, p in parts.items()}
        self._swap_each(lengths, {r: [s] for r, s in sizes.items()})
        pieces = {rank: [np.empty(size, np.uint8) for size in found.tolist()] for rank, found in sizes.items()}
        self._swap_each(parts, pieces)
        return {rank: pickle.loads(head.data, buffers=rest) for rank, (head, *rest) in pieces.items()}

    def send_value(self, value: Any, ranks: Sequence[int]) -> None:
        """A picklable value to some ranks, each of which calls `receive_value`. Arrays are not copied into a pickle."""
        parts = _pickled(value)
        sizes = np.array([part.size for part in parts])
        arrays = [np.array([len(parts)]), sizes, *parts]
        self._swap_each(dict.fromkeys(ranks, arrays), {})

    def receive_value(self, rank: int) -> Any:
        """The next value that a rank sends by `send_value`."""
        count = np.empty(1, np.int64)
        self._swap_each({}, {rank: [count]})
        sizes = np.empty(int(count[0]), np.int64)
        self._swap_each({}, {rank: [sizes]})
        head, *rest = (np.empty(size, np.uint8) for size in sizes.tolist())
        self._swap_each({}, {rank: [head, *rest]})
        return pickle.loads(head.data, buffers=rest)

    def wait_for_end(self) -> int:
        """Return once a rank has closed its connection; which one. What it has sent is left to be received.

        For another thread than the one that sends and receives.
        """
        poll = select.poll()
        numbers = {peer.socket.fileno(): peer.rank for peer in self._peers.values()}
        for number in numbers:
            poll.register(number, select.POLLRDHUP)
        return numbers[poll.poll()[0][0]]

    def _swap_each(self, sends: Mapping[int, Sequence[np.ndarray]], into: Mapping[int, Sequence[np.ndarray]]) -> None:
        self.swap(
            [Outgoing(rank, array) for rank, arrays in sends.items() for array in arrays],
            [Incoming(rank, array) for rank, arrays in into.items() for array in arrays],
        )

    def check_waiting(self, since: float) -> None:
        """Raise BackendError where nothing has come for `limit` seconds from ranks that this one waits for.

        Counted from `since` (of time.monotonic) at the earliest. For another thread than the one that waits.
        """
        waiting = self._waiting
        if waiting is not None and time.monotonic() - max(since, waiting.since) >= self.limit:
            raise self._waited_too_long(waiting.ranks)

    def abandon(self) -> None:
        """End what is sent and received, here and at the others. For another thread than the one that waits."""
        for peer in list(self._peers.values()):
            with suppress(OSError):  # it has ended already
                peer.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave. Ranks that wait for this one notice it on their connection."""
        self._listener.close()
        for peer in self._peers.values():
            peer.socket.close()
        self._peers.clear()

    def _peer(self, rank: int) -> _Peer:
        if rank not in self._peers:
            raise BackendError(f"rank {self.rank} has no connection to rank {rank}: an earlier call failed")
        return self._peers[rank]

    def _wait_for(self, busy: set[_Peer]) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in busy:
                selector.register(peer.socket, peer.wants, peer)
            while busy:
                self._waiting = _Waiting(time.monotonic(), sorted(peer.rank for peer in busy))
                ready = selector.select(None if self.patient else self.limit)
                if not ready:
                    raise self._waited_too_long(self._waiting.ranks)
                for key, _ in ready:
                    peer = key.data
                    if peer.advance():
                        selector.unregister(peer.socket)
                        busy.discard(peer)
                    elif key.events != peer.wants:
                        selector.modify(peer.socket, peer.wants, peer)

    def _waited_too_long(self, ranks: Sequence[int]) -> BackendError:
        return BackendError(
            f"rank {self.rank} has waited {self.limit:.0f} s for ranks {list(ranks)}; see their logs, or allow more "
            "with DUETVL_PEER_TIMEOUT"
        )

    def _call(self, address: Address) -> socket.socket:
        connection = socket.create_connection((address.host, address.port), timeout=self.limit)
        connection.sendall(_HELLO.pack(self.rank, address.token))
        return connection

    def _answer(self, deadline: float) -> None:
        self._listener.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, _ = self._listener.accept()
        connection.settimeout(5.0)  # a stranger who says nothing must not hold up the run
        try:
            rank, token = _HELLO.unpack(_read_exactly(connection, _HELLO.size))
        except (OSError, struct.error):
            rank, token = -1, b""
        if token == self.address.token and rank not in self._peers:
            self._peers[rank] = _Peer(rank, connection)
        else:
            connection.close()


class _Waiting(NamedTuple):
    """Since when nothing has come, and the ranks that it is to come from."""

    since: float
    ranks: Sequence[int]


class _Peer:
    """One connection, and what is still to go out and to come in on it."""

    def __init__(self, rank: int, connection: socket.socket):
        self.rank, self.socket = rank, connection
        self.out: deque[memoryview] = deque()
        self.into: deque[memoryview] = deque()  # the messages expected; their lengths come first, into `length`
        self.length = memoryview(bytearray(_LENGTH.size))
        self.got = 0  # bytes of the first expected message, its length included
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)

    def send(self, array: np.ndarray) -> None:
        data = _bytes_of(np.ascontiguousarray(array))
        self.out.append(memoryview(_LENGTH.pack(len(data))))
        self.out.append(data)

    def receive(self, array: np.ndarray) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("a message must go into a C-contiguous array")
        self.into.append(_bytes_of(array))

    @property
    def wants(self) -> int:
        """What to wait for."""
        return (selectors.EVENT_WRITE if self.out else 0) | (selectors.EVENT_READ if self.into else 0)

    def advance(self) -> bool:
        """Do what can be done without waiting; whether nothing is left."""
        try:
            self._write()
            self._read()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise BackendError(f"rank {self.rank} has gone ({error.strerror or error}); see its log") from None
        return not self.out and not self.into

    def _write(self) -> None:
        try:
            while self.out:
                self._written(self.socket.sendmsg(list(self.out)[:16]))
        except (BlockingIOError, InterruptedError):
            pass

    def _written(self, count: int) -> None:
        while self.out and count >= len(self.out[0]):
            count -= len(self.out.popleft())
        if count:
            self.out[0] = self.out[0][count:]

    def _read(self) -> None:
        while self.into:
            head = self.got - _LENGTH.size
            target = self.length[self.got :] if head < 0 else self.into[0][head:]
            if len(target):
                count = self.socket.recv_into(target)
                if count == 0:
                    raise ConnectionError("it closed the connection")
                self.got += count
            if self.got == _LENGTH.size:
                self._check_length()
            if self.got == _LENGTH.size + len(self.into[0]):
                self.into.popleft()
                self.got = 0

    def _check_length(self) -> None:
        (found,) = _LENGTH.unpack(self.length)
        if found != len(self.into[0]):
            raise BackendError(
                f"rank {self.rank} sent {found} bytes where {len(self.into[0])} were expected: "
                "the ranks are not making the same calls with the same shapes and dtypes"
            )


def _pickled(value: Any) -> list[np.ndarray]:
    """The pickle of a value without the bytes of its arrays, and these."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [np.frombuffer(head, np.uint8), *(np.asarray(buffer.raw()) for buffer in buffers)]


def _bytes_of(array: np.ndarray) -> memoryview:
    # By way of uint8, as the buffer protocol knows no bfloat16 and memoryview casts no empty arrays.
    return array.reshape(-1).view(np.uint8).data


def _interface_towards(host: str) -> tuple[socket.AddressFamily, str]:
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing; the kernel chooses the interface
        return family, probe.getsockname()[0]


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data
