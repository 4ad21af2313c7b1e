"""How much memory a model's parts take, counted from its configuration: no framework, no weights.

Counted is what the torch backend keeps and makes: tensors by their shapes, and of the passing ones the largest. A
part with nothing trainable in or before it keeps nothing; a linear layer keeps its input where its weight is trained or
has an adapter. All sizes are bytes on one rank, which may hold a part of the model (`Held`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from duetvl.core.boxes import Shape
from duetvl.core.composed.ops import LEAST_ROWS, LOGIT_BUDGET
from duetvl.core.patterns import matching
from duetvl.models.lora import Adapters, is_adapter
from duetvl.models.qwen_vl.config import ModelConfig, TextConfig, VisionConfig
from duetvl.models.qwen_vl.parameters import PARTS, parameter_shapes
from duetvl.models.recompute import RUNS_AGAIN, Again, RecomputeMode

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds. `trained` tokens meet the vocabulary; `frame`: the patches of the largest frame, which
    lies on one rank."""

    tokens: int
    trained: int
    patches: int = 0
    frame: int = 0


@dataclass(frozen=True)
class Trained:
    """The parameters of a model in a dtype, adapters in float32: which there are, and which of them are trained."""

    shapes: Mapping[str, Shape]
    paths: frozenset[str]
    narrow: int  # bytes of a number of the model's own

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: str, freeze: Iterable[str] = (), adapters: Adapters | None = None
    ) -> Trained:
        """As `QwenVL.freeze` and `QwenVL.put_adapters` have it."""
        shapes = dict(parameter_shapes(config))
        if adapters is not None:
            shapes |= adapters.shapes(shapes)
        frozen = {path for pattern in freeze for path in matching(pattern, shapes, PARTS)}
        chosen = (path for path in shapes if path not in frozen and (adapters is None or is_adapter(path)))
        return cls(shapes, frozenset(chosen), BYTES[dtype])

    def cut(self, part: Callable[[str, Shape], Shape]) -> Trained:
        """The same parameters where a rank holds parts of them, of the shapes that `part` says."""
        return replace(self, shapes={path: part(path, shape) for path, shape in self.shapes.items()})

    def only(self, which: Callable[[str], bool]) -> Trained:
        """Those that a rank has."""
        shapes = {path: shape for path, shape in self.shapes.items() if which(path)}
        return replace(self, shapes=shapes, paths=self.paths & shapes.keys())

    def under(self, *prefixes: str) -> bool:
        """Whether anything below these paths, each with its last dot, is trained."""
        return not self._modules.isdisjoint(prefixes)

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The paths of everything that a trained parameter is in, each with its last dot."""
        return frozenset(path[: dot + 1] for path in self.paths for dot, letter in enumerate(path) if letter == ".")

    def numbers(self, paths: Iterable[str]) -> int:
        """Elements of these parameters."""
        return sum(math.prod(self.shapes[path]) for path in paths)

    def stored(self, paths: Iterable[str]) -> int:
        """Bytes of these parameters."""
        listed = list(paths)
        own = self.numbers(path for path in listed if is_adapter(path))
        return 4 * own + self.narrow * (self.numbers(listed) - own)

    def gradients(self) -> int:
        """Bytes of the gradients, which are float32."""
        return 4 * self.numbers(self.paths)

    def optimizer_state(self, dtype: str) -> int:
        """Bytes of both moments, in this dtype, and of float32 masters of what is stored in half precision."""
        halves = (path for path in self.paths if not is_adapter(path)) if self.narrow < 4 else ()
        return 2 * BYTES[dtype] * self.numbers(self.paths) + 4 * self.numbers(halves)


@dataclass(frozen=True)
class Held:
    """What one rank has of the sizes inside a model's blocks. The width of the residual stream is never cut.

    heads, kv_heads, inner, vocabulary: of the language model; vision_heads, vision_inner: of the vision tower. rows:
    its share of the rows of norms and residuals in the language model; patches: of the patches. vision_layers,
    language_layers: which it has; None: all.
    """

    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    vision_heads: int
    vision_inner: int
    rows: float = 1.0
    patches: float = 1.0
    vision_layers: frozenset[int] | None = None
    language_layers: frozenset[int] | None = None

    def has(self, layers: frozenset[int] | None, number: int) -> bool:
        """Whether it has a layer of a tower."""
        return layers is None or number in layers

    @classmethod
    def all_of(cls, config: ModelConfig) -> Held:
        """Of a model that one rank has whole."""
        text, vision = config.text, config.vision
        inner = (text.intermediate_size, text.vocab_size)
        return cls(text.num_heads, text.num_kv_heads, *inner, vision.num_heads, vision.intermediate_size)


@dataclass(frozen=True)
class Activations:
    """Bytes of a pass: what the tape holds, and the most that is made on top of it.

    `forward` at the vocabulary, `backward` in the backward pass (with what one block makes again), `end` once the
    tape is empty.
    """

    kept: int
    forward: int
    backward: int
    end: int


def activations(
    config: ModelConfig, trained: Trained, load: Load, recompute: RecomputeMode = "none", held: Held | None = None
) -> Activations:
    """What a pass forward and backward over a load keeps and makes; `held` of a model that is divided over ranks."""
    held = held or Held.all_of(config)
    load = replace(load, patches=max(math.ceil(load.patches * held.patches), min(load.frame, load.patches)))
    tape = _tape(config, held, load, trained, recompute)
    forward, backward, end = _passing(config, held, load, trained)
    return Activations(tape.bytes, forward, backward + tape.again, end)


def generation_pass(config: ModelConfig, dtype: str, load: Load) -> int:
    """Bytes that a pass of generation makes: `tokens` through the language model, `trained` of them through the
    vocabulary; before that, `patches` through the vision tower."""
    narrow, text, vision = BYTES[dtype], config.text, config.vision
    heads = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    row = narrow * (3 * text.hidden_size + max(heads, 3 * text.intermediate_size)) + 8 * text.head_dim
    language = load.tokens * row + load.trained * text.vocab_size * (narrow + 4)
    patch = narrow * (
        vision.patch_row + 3 * vision.hidden_size + max(4 * vision.hidden_size, 3 * vision.intermediate_size)
    )
    return max(language, load.patches * (patch + 4 * vision.patch_row + 8 * vision.head_dim))


# -- what is kept for the backward pass -------------------------------------------------------------------------------


@dataclass
class _Tape:
    """Bytes that the tape holds, and the most that one block makes again."""

    bytes: int = 0
    again: int = 0
    flows: bool = False  # whether gradients flow through what comes next

    def add_block(self, whole: int, mlp: int, entry: int, mode: Again) -> None:
        """A block that keeps `whole` bytes, `mlp` of them in its MLP; `entry` is its input alone."""
        if mode == "block":
            self.bytes, self.again = self.bytes + entry, max(self.again, whole)
        elif mode == "mlp":
            self.bytes, self.again = self.bytes + whole - mlp, max(self.again, mlp)
        else:
            self.bytes += whole


def _tape(config: ModelConfig, held: Held, load: Load, trained: Trained, recompute: RecomputeMode) -> _Tape:
    narrow, tape, text = trained.narrow, _Tape(), config.text
    vision_mode, language_mode = RUNS_AGAIN[recompute]
    if load.patches:
        _keep_vision(tape, config.vision, held, load.patches, trained, vision_mode)
    tape.flows = tape.flows or trained.under("model.embed_tokens.")
    for layer in range(text.num_layers):
        prefix = f"model.layers.{layer}."
        tape.flows = tape.flows or trained.under(prefix)
        if tape.flows and held.has(held.language_layers, layer):
            whole, mlp = _language_layer(text, held, load.tokens, _inputs(trained, prefix), narrow)
            entry = round(held.rows * load.tokens) * narrow * text.hidden_size
            tape.add_block(whole, mlp, entry, language_mode)
    if held.has(held.language_layers, text.num_layers - 1):
        tape.bytes += round((held.rows + 1) * load.trained) * narrow * text.hidden_size  # before and after the norm
    tape.bytes += 4 * load.tokens * text.head_dim  # rotary tables
    return tape


def _keep_vision(tape: _Tape, config: VisionConfig, held: Held, patches: int, trained: Trained, mode: Again) -> None:
    width, narrow = config.hidden_size, trained.narrow
    if held.has(held.vision_layers, 0):
        rounded = narrow if narrow < 4 and trained.under("visual.patch_embed.") else 0  # the embedding's input
        tape.bytes += (rounded + 4) * patches * config.patch_row
    tape.bytes += 4 * patches * config.head_dim * (held.vision_layers is None or len(held.vision_layers) > 0)
    tape.flows = trained.under("visual.patch_embed.")
    for layer in range(config.depth):
        prefix = f"visual.blocks.{layer}."
        tape.flows = tape.flows or trained.under(prefix)
        if tape.flows and held.has(held.vision_layers, layer):
            whole, mlp = _vision_block(config, held, patches, _inputs(trained, prefix), narrow)
            tape.add_block(whole, mlp, narrow * patches * width, mode)
    if tape.flows or trained.under("visual.merger."):
        tape.flows = True
    if tape.flows and held.has(held.vision_layers, config.depth - 1):
        whole = 4 * narrow * patches * width  # norm's input, both layers' inputs, the activation's
        tape.add_block(whole, 0, narrow * patches * width, "block" if mode == "block" else "nothing")


def _inputs(trained: Trained, prefix: str) -> Callable[..., bool]:
    """Whether any of some linear layers below a prefix needs its input again."""
    return lambda *names: trained.under(*(f"{prefix}{name}." for name in names))


def _language_layer(
    config: TextConfig, held: Held, tokens: int, needs: Callable[..., bool], narrow: int
) -> tuple[int, int]:
    """Bytes that a layer keeps, and those of its MLP among them."""
    width, inner = config.hidden_size, held.inner
    attention = 2 * round(held.rows * width)  # the residual stream before and after
    attention += 2 * (held.heads + held.kv_heads) * config.head_dim  # q, out; k, v
    attention += width * needs("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = 2 * inner + width * needs("mlp.gate_proj", "mlp.up_proj") + inner * needs("mlp.down_proj")
    return tokens * (narrow * (attention + mlp) + 4 * (held.heads + 2)), tokens * narrow * mlp


def _vision_block(
    config: VisionConfig, held: Held, patches: int, needs: Callable[..., bool], narrow: int
) -> tuple[int, int]:
    """The same of a block of the vision tower; v is a part of qkv, which is kept whole."""
    width, inner = config.hidden_size, held.vision_inner
    attention = 2 * width + (3 + 2 + 1) * held.vision_heads * config.head_dim + width * needs("attn.qkv")
    first, second = ("gate_proj", "up_proj"), "down_proj"
    if config.mlp == "plain":
        first, second = ("fc1", "fc1"), "fc2"
    mlp = (2 if config.mlp == "gated" else 1) * inner + width * needs(*(f"mlp.{name}" for name in first))
    mlp += inner * needs(f"mlp.{second}")
    return patches * (narrow * (attention + mlp) + 4 * (held.vision_heads + 4)), patches * narrow * mlp


# -- what passes ------------------------------------------------------------------------------------------------------


def _passing(config: ModelConfig, held: Held, load: Load, trained: Trained) -> tuple[int, int, int]:
    """The most on top of what is kept: at the vocabulary, at the start of the backward pass, and at its end."""
    text, narrow = config.text, trained.narrow
    vocabulary = held.vocabulary * text.hidden_size
    head = trained.under("model.embed_tokens." if config.tie_word_embeddings else "lm_head.")
    rows = min(load.trained, max(LEAST_ROWS, LOGIT_BUDGET // held.vocabulary))
    half = narrow if narrow < 4 else 0
    logits = rows * held.vocabulary * (3 * 4 + half)  # logits, softmax, its gradient, and that in the weight's dtype
    sums = 4 * vocabulary * (1 if rows == load.trained else 3) + half * vocabulary  # the weight's gradient, added up
    hidden = 4 * load.trained * text.hidden_size
    has_language, has_vision = held.language_layers != frozenset(), held.vision_layers != frozenset()
    widest = max(load.tokens * held.inner * has_language, load.patches * held.vision_inner * has_vision)
    block = 6 * narrow * widest  # SwiGLU's gradient
    if not held.has(held.language_layers, text.num_layers - 1):
        return block, block, trained.under("model.embed_tokens.") * narrow * vocabulary
    forward = logits + hidden + head * sums
    backward = hidden + head * (2 * 4 + half) * vocabulary
    waiting = head * narrow * vocabulary  # of a tied weight, until the embedding's gradient comes
    end = (2 if config.tie_word_embeddings else 1) * trained.under("model.embed_tokens.") * narrow * vocabulary
    return forward, max(backward, (waiting if config.tie_word_embeddings else 0) + block), end
