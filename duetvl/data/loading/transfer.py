"""Python values over a socket between two processes of one machine.

A message is its pickle (protocol 5) and then the arrays' bytes, so that they are copied by the system alone. Pixels
are bytes on the way: a picture of 448 x 448 is 0.6 MB, which costs both sides together some 0.2 ms of a CPU, and 4 ms
to decode and encode. Shared memory (memfd), which was tried, cost 0.6 ms, in page faults.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any, Final

_HEAD: Final = struct.Struct("<QI")  # bytes of the pickle, number of buffers


def send(connection: socket.socket, value: Any) -> None:
    """Send one value. Raises OSError where nobody is at the other end."""
    buffers: list[memoryview] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    sizes = [buffer.nbytes for buffer in buffers]
    connection.sendall(_HEAD.pack(len(head), len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes) + head)
    for buffer in buffers:
        connection.sendall(buffer)


def receive(connection: socket.socket) -> Any:
    """Receive one value; its arrays may be written to. Raises EOFError where the other end is gone."""
    length, count = _HEAD.unpack(_exactly(connection, _HEAD.size))
    sizes = struct.unpack(f"<{count}Q", _exactly(connection, 8 * count))
    head = _exactly(connection, length)
    return pickle.loads(head, buffers=[_exactly(connection, size) for size in sizes])


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """The next `size` bytes."""
    found = bytearray(size)
    rest = memoryview(found)
    while rest.nbytes:
        try:
            got = connection.recv_into(rest)
        except ConnectionResetError:
            got = 0
        if not got:
            raise EOFError
        rest = rest[got:]
    return found
