"""Random numbers that do not depend on a framework: numpy's Philox, keyed by what they are for."""

from __future__ import annotations

import zlib

import numpy as np


def philox(seed: int, stream: str, counter: int = 0) -> np.random.Generator:
    """A generator that gives the same numbers wherever and whenever it is made for the same arguments.

    `stream` says what the numbers are for ("data order", a parameter's path), `counter` which draw it is (an
    epoch, a step). Philox 4x64 is counter-based (Salmon et al., SC 2011), so all streams are independent.
    """
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(stream.encode())], counter=[0, 0, 0, counter]))
