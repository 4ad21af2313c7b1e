"""Autoregressive generation of several sequences at once, through the backend's key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import ConfigError, DataError, DuetvlError
from duetvl.core.family import Family
from duetvl.core.kv_cache import Append, Cache
from duetvl.inference.sampling import Sampling, choose

Tensor = Any
OnToken = Callable[[int, int], None]


class Generator(Protocol):
    """What generation needs of a model."""

    @property
    def backend(self) -> Backend: ...

    @property
    def family(self) -> Family: ...

    def create_cache(self, blocks: int) -> Cache: ...

    def features(self, batch: Batch) -> Tensor: ...

    def extend(self, batch: Batch, features: Tensor | None, cache: Cache, append: Append) -> Tensor: ...


@dataclass
class _Sequence:
    """One sequence under way. `next_position` is one past the largest position so far, in all three axes.

    number: that of its prompt; blocks: those of the cache that are its own.
    """

    number: int
    name: str
    blocks: np.ndarray
    prompt: np.ndarray
    next_position: int
    tokens: list[int]

    @property
    def cached(self) -> int:
        """Rows in the cache: the prompt, and all new tokens but the one not yet fed back."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def seen(self) -> np.ndarray:
        return np.concatenate([self.prompt, np.array(self.tokens, self.prompt.dtype)])


def generate(
    model: Generator,
    to_numpy: Callable[[Tensor], np.ndarray],
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, the stop token included where one ended it.

    All prompts go through one packed pass; then every unfinished sequence gets a token a pass. There is no padding,
    so a sequence's tokens do not depend on its neighbours. `on_token(prompt number, token)` hears of each token.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
    if not prompts:
        raise DataError("there is nothing to generate from: no prompts were given")
    sampling = sampling or Sampling()
    batch = model.family.pack(prompts)
    lengths = np.diff(batch.cu_seqlens)
    tables = _tables(lengths + max_new_tokens, model.backend.kv_cache.block_size)
    cache = model.create_cache(int(tables.max()) + 1)
    sequences = [_begin(n, sample, tables[n], model.family) for n, sample in enumerate(prompts)]
    features = model.features(batch) if len(batch.grids) else None
    logits = to_numpy(model.extend(batch, features, cache, Append(tables, np.zeros_like(lengths), lengths)))
    running = sequences
    while running:
        for sequence, row in zip(running, logits, strict=True):
            token = _next_token(sequence, row, sampling)
            sequence.tokens.append(token)
            if on_token is not None:
                on_token(sequence.number, token)
        running = [s for s in running if s.tokens[-1] not in stop and len(s.tokens) < max_new_tokens]
        if running:
            logits = to_numpy(_decode(model, running, cache))
    return [sequence.tokens for sequence in sequences]


def _tables(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Consecutive blocks for sequences of so many rows (S,) -> (S, most blocks) int32, -1 beyond a sequence's own."""
    blocks = -(-rows // block_size)
    place = np.arange(blocks.max())
    return np.where(place < blocks[:, None], (np.cumsum(blocks) - blocks)[:, None] + place, -1).astype(np.int32)


def _begin(number: int, sample: Sample, blocks: np.ndarray, family: Family) -> _Sequence:
    _, following = family.position_index(
        sample.input_ids, sample.image_grid_thw, sample.video_grid_thw, sample.second_per_grid_ts
    )
    return _Sequence(number, f"sequence {number}", blocks, np.asarray(sample.input_ids), following, [])


def _next_token(sequence: _Sequence, logits: np.ndarray, sampling: Sampling) -> int:
    if not np.isfinite(logits).all():  # the argmax of NaN is token 0: "!!!!" for ever
        raise DuetvlError(
            f"prompt {sequence.number}: the logits after {len(sequence.tokens)} new tokens are not finite; the weights "
            f"are damaged, or too large for float16: use bfloat16 or float32"
        )
    return choose(logits, sequence.seen, sampling, sequence.name, len(sequence.tokens))


def _decode(model: Generator, running: Sequence[_Sequence], cache: Cache) -> Tensor:
    """One pass over the last token of every running sequence."""
    ids = np.array([s.tokens[-1] for s in running], np.int32)
    positions = np.array([s.next_position + len(s.tokens) - 1 for s in running], np.int32)
    append = Append(
        tables=np.stack([s.blocks for s in running]),
        before=np.array([s.cached for s in running]),
        new=np.ones(len(running), np.int64),
    )
    batch = Batch.of_tokens(ids, np.broadcast_to(positions, (3, len(running))), append.new)
    return model.extend(batch, None, cache, append)
