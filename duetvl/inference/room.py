"""How many blocks the engine's cache has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.inference.runner import Generator
from duetvl.inference.scheduler import Limits

SHARE: Final = 0.9  # of a device's free memory, where nobody says how much
HOST_SHARE: Final = 0.25  # of a machine's, which other programs live in too


@dataclass(frozen=True)
class Room:
    """What the user asks for: rows of the cache or bytes of it, or neither; and merged features that are kept."""

    cache_tokens: int | None
    cache_bytes: int | None
    media_tokens: int


def pool_blocks(model: Generator, room: Room, limits: Limits, context: int, spare: int, sharing: int = 1) -> int:
    """Blocks of the pool, beside `spare` ones for the rows that pad a pass, which count among the bytes.

    sharing: how many processes, this one among them, are to have their parts of the device's memory. Raises ConfigError
    where there is no room for a block, or the limits make no sense.
    """
    _check(room, limits, context)
    size = model.backend.kv_cache.block_size
    if room.cache_tokens is not None:
        return -(-room.cache_tokens // size)
    if room.cache_bytes is not None:
        return _blocks(room.cache_bytes, model, spare, f"cache_bytes is {room.cache_bytes}")
    device = model.backend.device
    free, share = device.free_memory() // sharing, HOST_SHARE if device.name == "cpu" else SHARE
    largest = model.pass_bytes(limits.pass_tokens, limits.max_sequences, limits.pass_patches, room.media_tokens)
    for_each = f" for each of {sharing} ranks" if sharing > 1 else ""
    blocks = _blocks(
        int(share * free) - largest,
        model,
        spare,
        f"{free / 2**30:.2f} GiB of {device.name} are free{for_each}, of which {share:.0%} may be used, and the "
        f"largest pass takes {largest / 2**30:.2f} GiB (lower pass_tokens, pass_patches or media_tokens)",
    )
    return min(blocks, limits.max_sequences * -(-context // size))  # more would never be used by what runs


def _blocks(given: int, model: Generator, spare: int, found: str) -> int:
    block = model.cache_block_bytes
    blocks = given // block - spare
    if blocks < 1:
        least = (spare + 1) * block
        raise ConfigError(f"no room for a cache of keys and values: {found}, and the smallest takes {least} bytes")
    return blocks


def _check(room: Room, limits: Limits, context: int) -> None:
    counts = {
        "cache_tokens": room.cache_tokens,
        "cache_bytes": room.cache_bytes,
        "media_tokens": room.media_tokens,
        "context": context,
        "pass_tokens": limits.pass_tokens,
        "pass_patches": limits.pass_patches,
        "max_sequences": limits.max_sequences,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, it must be at least 1")
    if room.cache_tokens is not None and room.cache_bytes is not None:
        raise ConfigError("cache_tokens and cache_bytes are both given; give one of them")
