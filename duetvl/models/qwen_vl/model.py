"""Qwen2-VL and Qwen2.5-VL in one: the pieces put together, as functions of the parameters.

T tokens, N rows whose next token is trained, D width, M merged features, S sequences.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch, Pair, Sample
from duetvl.core.boxes import Shape
from duetvl.core.kv_cache import AT_ONCE, Append, Cache, Recorder
from duetvl.core.params import Parameter, Weights
from duetvl.core.patterns import require_matching
from duetvl.models import vocabulary
from duetvl.models.attention import Attend
from duetvl.models.layout import UNDIVIDED, Layout, Trained
from duetvl.models.lora import Adapters, is_adapter
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.inputs import ModelInput, model_input, text_input, vision_input
from duetvl.models.qwen_vl.memory import BYTES, Load, generation_pass
from duetvl.models.qwen_vl.parameters import PARTS, parameter_shapes
from duetvl.models.qwen_vl.sharding import Tower
from duetvl.models.qwen_vl.stage import AllHere, Relay, Stage
from duetvl.models.qwen_vl.tables import vision_tables
from duetvl.models.recompute import RecomputeMode, towers
from duetvl.models.vocabulary import LastStage

Tensor = Any


class QwenVL:
    """A model on one backend. `parameters` maps the Hugging Face name of each weight to it.

    `adapters` says which layers have a low-rank adapter; its tensors are parameters like others. Of a model whose
    layers lie on several ranks, `parameters` are those of this rank.
    """

    parts = PARTS

    def __init__(
        self, config: ModelConfig, backend: Backend, parameters: Mapping[str, Parameter], dtype: str | None = None
    ):
        """`dtype` is that of the weights of all ranks, by default the one of these."""
        self.config = config
        self.backend = backend
        self.parameters = dict(parameters)
        self.family = QwenVLFamily(config)
        self.adapters: Adapters | None = None
        weights = (p.tensor for path, p in self.parameters.items() if not is_adapter(path))
        self.dtype = dtype or next(map(backend.ops.dtype_of, weights), "float32")
        self.layout: Layout = UNDIVIDED  # over ranks; the parameters are this rank's parts
        whole = Stage.whole(config)
        self.stages: Mapping[int, Stage] = {0: whole}  # those that this rank runs
        self.relay: Relay = AllHere(whole)  # how a pass without a tape goes through the stages of all ranks
        self.recompute: RecomputeMode = "none"  # what a pass on a tape does not keep
        self.source: ModelDirectory | None = None  # what it was read from
        self._mark_conditional()

    def freeze(self, patterns: Sequence[str]) -> None:
        """Train everything but what the patterns name, see `core.patterns.matching`; with adapters, those alone.

        The parts are `PARTS`. Raises ConfigError where a pattern matches nothing, on whatever rank.
        """
        found = require_matching("model.freeze", patterns, list(self.shapes), self.parts)
        frozen = {path for chosen in found.values() for path in chosen}
        for path, parameter in self.parameters.items():
            may = self.adapters is None or is_adapter(path)
            parameter.trainable = may and path not in frozen

    def put_adapters(self, adapters: Adapters | None, parameters: Mapping[str, Parameter]) -> None:
        """Lay adapters (their parameters by path, float32) beside the weights in the place of any before, and train
        them alone. None and no parameters: the model without adapters, all of it trained."""
        kept = {path: parameter for path, parameter in self.parameters.items() if not is_adapter(path)}
        self.parameters = kept | dict(parameters)
        self.adapters = adapters
        self.__dict__.pop("_weights", None)
        self._mark_conditional()
        self.freeze(())

    def without_adapters(self) -> QwenVL:
        """The model that the adapters were laid beside, sharing its weights: a reference for preference training."""
        base = {path: parameter for path, parameter in self.parameters.items() if not is_adapter(path)}
        plain = QwenVL(self.config, self.backend, base, self.dtype)
        plain.layout, plain.stages, plain.relay = self.layout, self.stages, self.relay
        return plain

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every parameter of the whole model, whatever this rank has of it, in the order of computation; those of
        adapters last."""
        shapes = parameter_shapes(self.config)
        return shapes | (self.adapters.shapes(shapes) if self.adapters else {})

    def _mark_conditional(self) -> None:
        for path, parameter in self.parameters.items():
            # A step without a picture does not run the vision tower.
            parameter.conditional = path.startswith("visual.")

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end. Raises DataError naming a sample whose tokens and media disagree."""
        return self.family.pack(samples)

    # -- what a batch gives -----------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, last: LastStage, *, key: tuple[int, ...] = (), sees: bool = False
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """What `last` makes of the batch's trained rows, and the tape that leads back to the parameters.

        `key` names the random numbers of this pass, for the dropout of adapters; without one there is none. `sees`: the
        vision tower runs in any case, on no rows where the batch has no picture.
        """
        (only,) = self.stages.values()
        return self.run(only, self.input(batch, sees=sees), None, last, key=key)

    def evaluate(self, batch: Batch, last: LastStage, *, sees: bool = False) -> tuple[Tensor, ...]:
        """The same without a tape and without dropout."""
        (only,) = self.stages.values()
        return self.run_untaped(only, self.input(batch, sees=sees), None, last)

    def input(self, batch: Batch, *, sees: bool = False) -> StageInput:
        """What the stages of this rank need of a batch; `sees` as of `forward`."""
        ops, tower = self.backend.ops, any(stage.vision for stage in self.stages.values())
        given = model_input(ops, self.family, batch, self.dtype, self.layout, tower=tower, sees=sees)
        own = self.layout.own_rows(np.diff(batch.cu_seqlens))
        return StageInput(given, trained_rows(batch.targets[own]))

    def run(
        self,
        stage: Stage,
        given: StageInput,
        x: Tensor | None,
        last: LastStage,
        *,
        key: tuple[int, ...] = (),
        needs: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """Run a stage on a tape, from what the stage before it handed on (None: nothing). `needs`: the tape leads to
        that too. Gives what the stage hands on, and of the last one what `last` makes of the trained rows."""
        inputs = () if x is None else (x,)
        vision, language = towers(self.recompute, self.backend.autograd.checkpoint)
        again = replace(given, model=given.model.recomputing(vision, language))

        def fn(leaves: Mapping[str, Tensor], *handed: Tensor) -> Any:
            return self._run(stage, self._tree(leaves, key, given.model.rows_of), again, *handed or (None,), last=last)

        return self.backend.autograd.run_stage(fn, inputs, self.parameters_of(stage), [needs] * len(inputs))

    def run_untaped(self, stage: Stage, given: StageInput, x: Tensor | None, last: LastStage) -> tuple[Tensor, ...]:
        """The same without a tape and without dropout."""
        with self.backend.autograd.no_grad():
            return self._run(stage, self._weights, given, x, last=last)

    def parameters_of(self, stage: Stage) -> tuple[Parameter, ...]:
        """Those that a stage uses."""
        if len(self.stages) == 1:
            return tuple(self.parameters.values())
        tied = self.config.tie_word_embeddings
        return tuple(p for path, p in self.parameters.items() if stage.has(path, tied))

    def _run(
        self, stage: Stage, w: Weights, given: StageInput, x: Tensor | None, *, last: LastStage
    ) -> tuple[Tensor, ...]:
        out = stage.run(self.backend.ops, self.config, w, given.model, x)
        if not stage.ends:
            return (out,)
        return last(self._normed(w, given.model, given.trained, out), self._vocabulary(w))

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities (N,) float32 of the N trained tokens in the order of `batch.targets`, without a tape."""
        ops, trained = self.backend.ops, trained_rows(batch.targets)
        here = np.arange(len(trained))[self.trained(batch).here]
        labels = ops.from_numpy(batch.targets[trained[here]])
        found = self.evaluate(batch, lambda hidden, w: (vocabulary.logprobs(ops, w, hidden, labels),))[0]
        return self.layout.all_rows(found, here, len(trained))

    def trained(self, batch: Batch) -> Trained:
        """Which of the batch's trained tokens `forward` and `evaluate` give to `last` on this rank."""
        return self.layout.trained(trained_rows(batch.targets), np.diff(batch.cu_seqlens))

    def logits(self, batch: Batch) -> Tensor:
        """Logits (T, vocabulary) of every token, in the weights' dtype."""
        rows = self.layout.own_rows(np.diff(batch.cu_seqlens))
        with self.backend.autograd.no_grad():
            own = self._logits("vision", self.input(batch).model, np.arange(len(rows)))
            return self.layout.all_rows(own, rows, batch.tokens)

    def features(self, batch: Batch) -> Tensor:
        """Merged features (M, D) of the batch's images and videos, in the order of `batch.grids`."""
        ops = self.backend.ops
        tables = vision_tables(self.config.vision, batch.grids)
        given, here = vision_input(ops, self.family, batch, tables, self.dtype, self.layout)
        vision, count = self.config.vision, len(batch.pixel_rows) // self.config.vision.merge**2

        def run(stage: Stage, x: Tensor | None) -> Tensor:
            out = stage.see(ops, self.config, self._weights, given, x)
            return self.layout.all_features(out, here, count) if stage.merges else out

        patches, end = (len(given.cos), vision.hidden_size), (count, vision.out_hidden_size)
        with self.backend.autograd.no_grad():
            merged = self.relay("vision", "vision", run, None, lambda stage: patches, end, self.dtype)
            return merged if tables.inverse is None else ops.take_rows(merged, ops.from_numpy(tables.inverse))

    # -- sequences that grow ----------------------------------------------------------------------------------------

    def create_cache(self, blocks: int) -> Cache:
        """A key-value cache of `blocks` blocks of the backend's `kv_cache.block_size` tokens."""
        text, kv_cache = self.config.text, self.backend.kv_cache
        return kv_cache.cache_create(
            layers=len(self._own_layers),
            blocks=blocks,
            block_size=kv_cache.block_size,
            kv_heads=self.layout.kv_heads(text.num_kv_heads),
            head_size=text.head_dim,
            dtype=self.dtype,
        )

    @property
    def cache_block_bytes(self) -> int:
        """What a block of `create_cache` takes, keys and values of all layers that this rank has."""
        text = self.config.text
        row = self.layout.kv_heads(text.num_kv_heads) * text.head_dim * BYTES[self.dtype]
        return 2 * len(self._own_layers) * self.backend.kv_cache.block_size * row

    def pass_bytes(self, tokens: int, sequences: int, patches: int, kept: int) -> int:
        """What a pass of `extend` over `tokens` tokens takes at most, and the tower's before it over `patches` patches,
        while `kept` merged features are kept."""
        made = generation_pass(self.config, self.dtype, Load(tokens, sequences, patches))
        return made + kept * self.config.text.hidden_size * BYTES[self.dtype]

    @property
    def context(self) -> int:
        """Rows that a sequence may have."""
        return self.config.text.max_positions

    def extend(
        self, batch: Batch, features: Tensor | None, cache: Cache, append: Append, recorder: Recorder = AT_ONCE
    ) -> Tensor:
        """Put a pass of tokens behind what the cache has: whole prompts, parts of them, single tokens, in any mixture.

        `batch` has the new rows of the sequences in `append`, end to end, with their positions; `features` (M, D) those
        that `batch.visual_src` counts, None where it counts none. Its pixels and targets are not looked at. Returns
        the logits (S, vocabulary) after the last row of each sequence. Raises ConfigError where a sequence does not
        fit into its blocks. `recorder`: of this model and cache; for passes without features.
        """

        def prepare() -> ModelInput:
            attend = self._attend_cached(cache, append)
            return text_input(self.backend.ops, self.family, batch, attend, self.layout)

        def run(given: ModelInput) -> Tensor:
            return self._logits("language", given, batch.cu_seqlens[1:] - 1, features)

        if self.layout is not UNDIVIDED:
            recorder = AT_ONCE  # a pass moves rows between ranks
        with self.backend.autograd.no_grad():
            return recorder.run(append, prepare, run)

    def _attend_cached(self, cache: Cache, append: Append) -> Attend:
        store = self.backend.kv_cache
        plan, number = store.plan(cache, append), {layer: place for place, layer in enumerate(self._own_layers)}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store.cache_append(cache, number[layer], k, v, plan)
            return store.attention_cached(q, cache, number[layer], plan)

        return attend

    @property
    def _own_layers(self) -> list[int]:
        """The layers of the language model that this rank runs."""
        return [layer for stage in self.stages.values() for layer in stage.language]

    # -- the model as a function of its weights ---------------------------------------------------------------------

    def _normed(self, w: Weights, given: ModelInput, rows: np.ndarray, x_TD: Tensor) -> Tensor:
        """Hidden states (N, D) behind the final norm, of some ascending rows of x (T, D): the others meet neither it
        nor the vocabulary."""
        ops, lie = self.backend.ops, given.tokens.rows
        here = lie.here(rows)
        all_rows = len(here) == x_TD.shape[0]
        x_ND = x_TD if all_rows else ops.take_rows(x_TD, ops.from_numpy(here.astype(np.int32)))
        return lie.collect(ops.rms_norm(x_ND, w.model.norm.weight, eps=self.config.text.norm_eps), rows)

    def _vocabulary(self, w: Weights) -> Weights:
        """The leaf record of the last product's matrix."""
        head: Weights = w.model.embed_tokens if self.config.tie_word_embeddings else w.lm_head
        return head

    def _logits(self, begin: Tower, given: ModelInput, rows: np.ndarray, features: Tensor | None = None) -> Tensor:
        """Logits (N, V) of some rows, from the first stage with layers of a tower on, into which features may go."""
        ops, w = self.backend.ops, self._weights

        def run(stage: Stage, x: Tensor | None) -> Tensor:
            out = stage.run(ops, self.config, w, given, x)
            return vocabulary.logits(ops, self._vocabulary(w), self._normed(w, given, rows, out)) if stage.ends else out

        def between(stage: Stage) -> Shape | None:
            return stage.hands_on(self.config, given)

        end = len(rows), self.config.text.vocab_size
        return self.relay(begin, "language", run, features, between, end, self.dtype)

    @cached_property
    def _weights(self) -> Weights:
        return self._tree({path: parameter.tensor for path, parameter in self.parameters.items()})

    def _tree(
        self,
        leaves: Mapping[str, Tensor],
        key: Sequence[int] = (),
        rows_of: Callable[[str], np.ndarray | None] = lambda module: None,
    ) -> Weights:
        """The tensors, and what `linear` must know of adapters in the pass that `key` names, and of other ranks."""
        adapters = self.adapters.leaves(key, rows_of) if self.adapters else {}
        records = {**adapters, **self.layout.records(self.parameters)}
        return Weights(ChainMap(dict[str, Any](records), leaves))  # type: ignore[arg-type]  # it is never written to


@dataclass(frozen=True, eq=False)
class StageInput:
    """What the stages of a rank need of a batch: its part of the input, and which rows (N,) of it are trained."""

    model: ModelInput
    trained: np.ndarray


def trained_rows(targets: np.ndarray) -> np.ndarray:
    """The rows (N,) whose next token is trained."""
    return np.flatnonzero(targets != IGNORE)
