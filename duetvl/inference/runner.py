"""The one file of the engine that touches a model: a pass becomes copies, features, and logits. Every rank has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.core.family import Family
from duetvl.core.kv_cache import AT_ONCE, Append, Cache, Recorder
from duetvl.inference.passes import Pass, Shown, Taken, media_batch

Tensor = Any


class Generator(Protocol):
    """What generation needs of a model."""

    @property
    def backend(self) -> Backend:
        """What it computes with."""
        ...

    @property
    def family(self) -> Family:
        """Its host side."""
        ...

    @property
    def dtype(self) -> str:
        """Of weights and cache."""
        ...

    @property
    def context(self) -> int:
        """Rows that a sequence may have."""
        ...

    @property
    def cache_block_bytes(self) -> int:
        """Bytes of a block of `create_cache`."""
        ...

    def pass_bytes(self, tokens: int, sequences: int, patches: int, kept: int) -> int:
        """The most that a pass over these numbers of tokens, sequences and patches makes, with `kept` features."""
        ...

    def create_cache(self, blocks: int) -> Cache:
        """A cache of blocks."""
        ...

    def features(self, batch: Batch) -> Tensor:
        """Merged features of the batch's media, in their order."""
        ...

    def extend(self, batch: Batch, features: Tensor | None, cache: Cache, append: Append, recorder: Recorder) -> Tensor:
        """Logits (S, V) after each sequence of a pass, whose rows are put into the cache. `recorder` runs it."""
        ...


class Runner:
    """Runs passes on models that share one cache: the model itself at "", and the same with an adapter by its name."""

    def __init__(self, models: Mapping[str, Generator], blocks: int, *, record: bool = False):
        """`blocks`: those of the cache, those among them that hold rows which pad a pass. `record`: passes may be kept
        and repeated, by a rank that has all of the model."""
        self.models = models
        model = models[""]
        self.ops, self.store = model.backend.ops, model.backend.kv_cache
        self.cache = model.create_cache(blocks)
        self.features: dict[bytes, Tensor] = {}
        self.recorders = {name: self.store.recorder(self.cache) for name in models} if record else {}

    def run(self, work: Pass) -> Tensor:
        """The logits (S, vocabulary) after each sequence of a pass."""
        for key in work.forget:
            self.features.pop(key, None)  # a pass that failed may not have computed it
        for copy in work.copies:
            self.store.cache_copy(self.cache, *copy)
        model = self.models[work.adapter]
        for media in work.encode:
            self._encode(model, media)
        recorder = AT_ONCE if work.taken else self.recorders.get(work.adapter, AT_ONCE)
        return model.extend(work.batch, self._taken(work.taken), self.cache, work.append, recorder)

    def rows(self, logits: Tensor, wanted: Sequence[int]) -> Tensor:
        """Some rows of logits, ascending."""
        if list(wanted) == list(range(len(wanted))):
            return logits if len(wanted) == logits.shape[0] else logits[: len(wanted)]
        return self.ops.take_rows(logits, self.ops.from_numpy(np.array(wanted, np.int32)))

    def _encode(self, model: Generator, media: Sequence[Shown]) -> None:
        features = model.features(media_batch(media))
        start = 0
        for one in media:
            rows = np.arange(start, start + one.tokens, dtype=np.int32)
            # Rows of their own: a slice would keep the features of all media alive.
            own = features if len(media) == 1 else self.ops.take_rows(features, self.ops.from_numpy(rows))
            self.features[one.key] = own
            start = start + one.tokens

    def _taken(self, taken: Sequence[Taken]) -> Tensor | None:
        parts = []
        for key, start, stop in taken:
            features = self.features[key]
            parts.append(features if stop - start == features.shape[0] else features[start:stop])
        return None if not parts else parts[0] if len(parts) == 1 else self.ops.concat(parts, 0)
