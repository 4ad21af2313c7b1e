"""Python values over a socket between two processes of one machine; large arrays go through shared memory.

A message is its pickle (protocol 5) with the arrays beside it. From a megabyte on they are written to an anonymous
file in memory (memfd, on Linux) whose descriptor is sent: the receiver maps it, and nothing is copied on its side. It
has no name, so nothing is left behind when a process is killed, and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
from typing import Any, Final

_HEAD: Final = struct.Struct("<QI?")  # bytes of the pickle, number of buffers, whether they come as a descriptor
_LARGE: Final = 1 << 20
_HAS_MEMFD: Final = hasattr(os, "memfd_create") and hasattr(socket, "send_fds")


def send(connection: socket.socket, value: Any) -> None:
    """Send one value. Raises OSError where nobody is at the other end."""
    buffers: list[memoryview] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    sizes = [buffer.nbytes for buffer in buffers]
    by_descriptor = _HAS_MEMFD and sum(sizes) >= _LARGE
    start = _HEAD.pack(len(head), len(sizes), by_descriptor) + struct.pack(f"<{len(sizes)}Q", *sizes)
    connection.sendall(start + head)
    if by_descriptor:
        _send_descriptor(connection, buffers)
    else:
        for buffer in buffers:
            connection.sendall(buffer)


def receive(connection: socket.socket) -> Any:
    """Receive one value; its arrays may be written to. Raises EOFError where the other end is gone."""
    length, count, by_descriptor = _HEAD.unpack(_exactly(connection, _HEAD.size))
    sizes = struct.unpack(f"<{count}Q", _exactly(connection, 8 * count))
    head = _exactly(connection, length)
    if not by_descriptor:
        return pickle.loads(head, buffers=[_exactly(connection, size) for size in sizes])
    whole, at, buffers = memoryview(_receive_descriptor(connection, sum(sizes))), 0, []
    for size in sizes:
        buffers.append(whole[at : at + size])
        at += size
    return pickle.loads(head, buffers=buffers)


def _send_descriptor(connection: socket.socket, buffers: list[memoryview]) -> None:
    descriptor = os.memfd_create("duetvl", os.MFD_CLOEXEC)
    try:
        for buffer in buffers:
            rest = buffer
            while rest.nbytes:
                rest = rest[os.write(descriptor, rest) :]
        socket.send_fds(connection, [b"."], [descriptor])
    finally:
        os.close(descriptor)


def _receive_descriptor(connection: socket.socket, size: int) -> mmap.mmap:
    message, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not message:
        raise EOFError
    try:
        return mmap.mmap(descriptors[0], size)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


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
