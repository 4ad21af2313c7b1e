"""Qwen2-VL and Qwen2.5-VL in one: the parts put together, as functions of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch, Pair, Sample
from duetvl.core.kv_cache import Append, Cache
from duetvl.core.params import Parameter, Weights, split_trainable
from duetvl.core.patterns import Parts, require_matching
from duetvl.models.lora import Adapters, is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.language import Attend, Tokens, decoder
from duetvl.models.qwen_vl.vision import VisionInput, vision_input, vision_tower
from duetvl.models.recompute import Mode, towers

Tensor = Any

PARTS: Parts = {  # what `freeze` names, and the paths that belong to it
    "vision": ("visual.patch_embed.", "visual.blocks."),
    "projector": ("visual.merger.",),
    "language": ("model.", "lm_head."),
}


@dataclass(frozen=True, eq=False)
class ModelInput:
    """A batch on the device. `visual` is None where the batch has no pictures.

    ids (T,), targets (N,) and their rows (N,) in the batch; `visual_dst` (V,) token rows take the rows
    `visual_src` (V,) of the vision tower's output, or all of them in order where it is None.
    """

    ids: Tensor
    tokens: Tokens
    visual: VisionInput | None
    visual_dst: Tensor | None
    visual_src: Tensor | None


@dataclass(frozen=True, eq=False)
class Targets:
    """Rows (N,) of a batch whose next token is trained, those tokens (N,), and what their losses count for.

    The weight of each is `weights` (N,) float32, or 1 where it is None, times `scale`.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor | None
    scale: float


class QwenVL:
    """A model on one backend. `parameters` maps the Hugging Face name of each weight to it.

    `adapters` says which layers have a low-rank adapter; its tensors are parameters like others.
    """

    parts = PARTS

    def __init__(self, config: ModelConfig, backend: Backend, parameters: Mapping[str, Parameter]):
        self.config = config
        self.backend = backend
        self.parameters = dict(parameters)
        self.family = QwenVLFamily(config)
        self.adapters: Adapters | None = None
        self.recompute: Mode = "none"  # what a pass on a tape does not keep
        self.source: Path | None = None  # the directory it was read from
        self._mark_conditional()

    def freeze(self, patterns: Sequence[str]) -> None:
        """Train everything but what the patterns name, see `core.patterns.matching`; with adapters, those alone.

        The parts are `PARTS`. Raises ConfigError where a pattern matches nothing.
        """
        found = require_matching("model.freeze", patterns, list(self.parameters), self.parts)
        frozen = {path for chosen in found.values() for path in chosen}
        for path, parameter in self.parameters.items():
            may = self.adapters is None or is_adapter(path)
            parameter.trainable = may and path not in frozen

    def put_adapters(self, adapters: Adapters | None, tensors: Mapping[str, Tensor]) -> None:
        """Lay adapters (their tensors by path, float32) beside the weights in the place of any before, and train them
        alone. None and no tensors: the model without adapters, all of it trained."""
        kept = {path: parameter for path, parameter in self.parameters.items() if not is_adapter(path)}
        self.parameters = kept | {path: Parameter(path, tensor) for path, tensor in tensors.items()}
        self.adapters = adapters
        self.__dict__.pop("_weights", None)
        self._mark_conditional()
        self.freeze(())

    def without_adapters(self) -> QwenVL:
        """The model that the adapters were laid beside, sharing its weights: a reference for preference training."""
        base = {path: parameter for path, parameter in self.parameters.items() if not is_adapter(path)}
        return QwenVL(self.config, self.backend, base)

    def _mark_conditional(self) -> None:
        for path, parameter in self.parameters.items():
            # A step without a picture does not run the vision tower.
            parameter.conditional = path.startswith("visual.")

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end. Raises DataError naming a sample whose tokens and media disagree."""
        return self.family.pack(samples)

    # -- what a batch gives -----------------------------------------------------------------------------------------

    def vision(self, batch: Batch) -> Tensor:
        """Merged features (M, D) of the batch's images and videos, in the order of `batch.grids`."""
        ops = self.backend.ops
        tables = self.family.vision_tables(batch.grids)
        with self.backend.autograd.no_grad():
            merged = vision_tower(ops, self.config.vision, self._weights.visual, self._vision_input(batch, tables))
            return merged if tables.inverse is None else ops.take_rows(merged, ops.from_numpy(tables.inverse))

    def logits(self, batch: Batch) -> Tensor:
        """Logits (T, vocabulary) of every token, in the weights' dtype."""
        with self.backend.autograd.no_grad():
            hidden = self._hidden(self._weights, self._input(batch))
            return self._head(self._weights, hidden)

    def eval_loss(self, batch: Batch, *, weights: np.ndarray | None = None) -> Tensor:
        """Sum of the trained tokens' cross-entropies, float32, without a tape; see `forward_loss`."""
        with self.backend.autograd.no_grad():
            return self._loss(self._weights, self._input(batch), self._targets(batch, weights))

    def forward_loss(
        self, batch: Batch, *, weights: np.ndarray | None = None, key: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tape]:
        """Sum of the trained tokens' cross-entropies, float32, and the tape that leads back to the parameters.

        `weights` (N,) float32 multiplies those of the N trained positions, in their order. `key` names the random
        numbers of this pass, for the dropout of adapters; without one there is none.
        """
        (loss,), tape = self._record(batch, self._loss, weights, key)
        return loss, tape

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities (N,) float32 of the N tokens in `batch.targets` that are trained, without a tape."""
        with self.backend.autograd.no_grad():
            return self._logprobs(self._weights, self._input(batch), self._targets(batch))

    def forward_logprobs(
        self, batch: Batch, objective: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """What `objective` makes of the log-probabilities (N,) of the trained tokens, and the tape of both."""
        return self._record(batch, lambda *given: objective(self._logprobs(*given)))

    def _record(
        self,
        batch: Batch,
        fn: Callable[..., Any],
        weights: np.ndarray | None = None,
        key: tuple[int, ...] = (),
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """`fn(weights, input, targets)` on a tape."""
        trainable, frozen = split_trainable(self.parameters.values())
        given, targets = self._recorded_input(batch), self._targets(batch, weights)
        paths = [p.path for p in (*trainable, *frozen)]

        def stage(*tensors: Tensor) -> Any:
            return fn(self._tree(dict(zip(paths, tensors, strict=True)), key), given, targets)

        return self.backend.autograd.run_stage(stage, (), trainable, frozen)

    # -- generation -------------------------------------------------------------------------------------------------

    def create_cache(self, slots: int, capacity: int) -> Cache:
        """A key-value cache for `slots` sequences of at most `capacity` tokens."""
        text = self.config.text
        return self.backend.kv_cache.cache_create(
            layers=text.num_layers,
            slots=slots,
            capacity=capacity,
            kv_heads=text.num_kv_heads,
            head_size=text.head_dim,
            dtype=self.dtype,
        )

    def prefill(self, batch: Batch, cache: Cache, append: Append) -> Tensor:
        """Run whole prompts into the cache; logits (S, vocabulary) after the last token of each."""
        given = self._input(batch, self._attend_cached(cache, append))
        return self._next_logits(given, batch.cu_seqlens[1:] - 1)

    def decode(self, ids: np.ndarray, position_ids: np.ndarray, cache: Cache, append: Append) -> Tensor:
        """One more token of each sequence: ids (S,), position_ids (3, S) -> logits (S, vocabulary)."""
        given = ModelInput(
            ids=self.backend.ops.from_numpy(ids.astype(np.int32)),
            tokens=self._tokens(*self.family.rope_tables(position_ids), self._attend_cached(cache, append)),
            visual=None,
            visual_dst=None,
            visual_src=None,
        )
        return self._next_logits(given, np.arange(len(ids)))

    def _next_logits(self, given: ModelInput, rows: np.ndarray) -> Tensor:
        ops = self.backend.ops
        with self.backend.autograd.no_grad():
            hidden = self._hidden(self._weights, given)
            return self._head(self._weights, ops.take_rows(hidden, ops.from_numpy(rows.astype(np.int32))))

    def _attend_cached(self, cache: Cache, append: Append) -> Attend:
        store = self.backend.kv_cache

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store.cache_append(cache, layer, k, v, append)
            return store.attention_cached(q, cache, layer, append)

        return attend

    # -- the model as a function of its weights ---------------------------------------------------------------------

    def _loss(self, w: Weights, given: ModelInput, targets: Targets) -> Tensor:
        hidden, vocabulary = self._trained_rows(w, given, targets), self._vocabulary(w)
        loss = self.backend.ops.linear_cross_entropy(hidden, vocabulary, targets.labels, targets.weights)
        return loss * targets.scale

    def _logprobs(self, w: Weights, given: ModelInput, targets: Targets) -> Tensor:
        hidden = self._trained_rows(w, given, targets)
        return self.backend.ops.linear_logprobs(hidden, self._vocabulary(w), targets.labels)[0]

    def _trained_rows(self, w: Weights, given: ModelInput, targets: Targets) -> Tensor:
        """Only the rows that are trained meet the final norm and the vocabulary."""
        return self._norm(w, self.backend.ops.take_rows(self._hidden(w, given), targets.rows))

    def _hidden(self, w: Weights, given: ModelInput) -> Tensor:
        """Hidden states (T, D) before the final norm."""
        ops = self.backend.ops
        x_TD = ops.take_rows(w.model.embed_tokens.weight, given.ids)
        if given.visual is not None:
            features = vision_tower(ops, self.config.vision, w.visual, given.visual)
            if given.visual_src is not None:
                features = ops.take_rows(features, given.visual_src)
            x_TD = ops.scatter_rows(x_TD, given.visual_dst, features)
        return decoder(ops, self.config.text, w.model, x_TD, given.tokens)

    def _norm(self, w: Weights, x: Tensor) -> Tensor:
        return self.backend.ops.rms_norm(x, w.model.norm.weight, eps=self.config.text.norm_eps)

    def _vocabulary(self, w: Weights) -> Tensor:
        return w.model.embed_tokens.weight if self.config.tie_word_embeddings else w.lm_head.weight

    def _head(self, w: Weights, hidden: Tensor) -> Tensor:
        return self.backend.ops.linear(self._norm(w, hidden), self._vocabulary(w))

    # -- batches on the device --------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        """The storage dtype of the weights."""
        return self.backend.ops.dtype_of(self.parameters["model.embed_tokens.weight"].tensor)

    @cached_property
    def _weights(self) -> Weights:
        return self._tree({path: parameter.tensor for path, parameter in self.parameters.items()})

    def _tree(self, tensors: Mapping[str, Tensor], key: Sequence[int] = ()) -> Weights:
        """The tensors, and with adapters what `linear` must know of them in the pass that `key` names."""
        return Weights({**tensors, **(self.adapters.leaves(key) if self.adapters else {})})

    def _input(self, batch: Batch, attend: Attend | None = None) -> ModelInput:
        ops = self.backend.ops
        tables = self.family.prepare(batch)
        spans = tables.language.spans
        visual = dst = src = None
        if len(batch.grids):
            visual = self._vision_input(batch, tables.vision)
            dst, src = (None if x is None else ops.from_numpy(x) for x in _routes(batch, tables.vision.inverse))
        attend = attend or (lambda layer, q, k, v: ops.attention(q, k, v, spans)[0])
        return ModelInput(
            ids=ops.from_numpy(batch.input_ids),
            tokens=self._tokens(tables.language.cos, tables.language.sin, attend),
            visual=visual,
            visual_dst=dst,
            visual_src=src,
        )

    def _tokens(self, cos: np.ndarray, sin: np.ndarray, attend: Attend) -> Tokens:
        return Tokens(self.backend.ops.from_numpy(cos), self.backend.ops.from_numpy(sin), attend)

    def _recorded_input(self, batch: Batch) -> ModelInput:
        """The input of a pass on a tape, which runs again what `recompute` says."""
        vision, language = towers(self.recompute, self.backend.autograd.checkpoint)
        given = self._input(batch)
        visual = None if given.visual is None else replace(given.visual, recompute=vision)
        return replace(given, visual=visual, tokens=replace(given.tokens, recompute=language))

    def _vision_input(self, batch: Batch, tables: Any) -> VisionInput:
        return vision_input(self.backend.ops, batch.pixel_rows, tables, self.dtype)

    def _targets(self, batch: Batch, weights: np.ndarray | None = None) -> Targets:
        make = self.backend.ops.from_numpy
        rows = np.flatnonzero(batch.targets != IGNORE).astype(np.int32)
        scale = 1.0 if weights is None else float(np.max(weights, initial=0.0))
        # The largest weight is taken out, to be applied in float32: the gradients of logits may be float16 numbers.
        relative = None if weights is None or (weights == scale).all() else make(weights / np.float32(scale))
        return Targets(make(rows), make(batch.targets[rows]), relative, scale)


def _routes(batch: Batch, inverse: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Where the tower's output rows go: (token rows, output rows), the latter None for all in order."""
    src = batch.visual_src if inverse is None else inverse[batch.visual_src]
    by_row = np.argsort(src, kind="stable")
    if np.array_equal(src[by_row], np.arange(len(src))):  # each feature is used once: no gather is needed
        return batch.visual_dst[by_row], None
    return batch.visual_dst, src.astype(np.int32)
