"""How much memory a recipe needs on a rank, counted from the configuration: no framework, no weights.

Counted is what the torch backend keeps and makes: tensors by their shapes, and of the passing ones the largest. A
part with nothing trainable in or before it keeps nothing; a linear layer keeps its input where its weight is trained or
has an adapter. benchmarks/results/memory_estimate.md compares with measured runs.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duetvl.core.composed.ops import LEAST_ROWS, LOGIT_BUDGET
from duetvl.core.patterns import matching
from duetvl.data.draft import Draft
from duetvl.models.lora import Adapters, is_adapter
from duetvl.models.qwen_vl.config import ModelConfig, TextConfig, VisionConfig
from duetvl.models.qwen_vl.model import PARTS
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.training.recipe.sections import Recipe

Shape = tuple[int, ...]
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Load:
    """The largest micro-batch of a step, and how many there are in one. `trained` tokens meet the vocabulary."""

    tokens: int
    trained: int
    patches: int = 0
    micro_batches: int = 1

    @classmethod
    def of(cls, recipe: Recipe, sizes: Sequence[tuple[int, int, int]]) -> Load:
        """What samples of these sizes (tokens, trained tokens, patches) make of the recipe's packs.

        A full pack where a step has that many tokens, in the proportions of all samples; or the longest sample.
        """
        data, group = recipe.data, recipe.train.global_batch
        longest = max(sizes)
        tokens, trained, patches = (sum(numbers) for numbers in zip(*sizes, strict=True))
        in_step = tokens / len(sizes) * group
        full = min(data.pack_tokens, math.ceil(in_step)) if data.pack else 0
        if full <= longest[0]:
            return cls(*longest, micro_batches=group if not data.pack else math.ceil(in_step / longest[0]))
        share = full / tokens
        return cls(full, math.ceil(share * trained), math.ceil(share * patches), math.ceil(in_step / full))


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The peak is less than the sum of all: activations go while gradients come.

    `activations` are kept from the forward pass for the backward pass; `passing` is the most that is made on top of
    what is kept: blocks of logits, the gradients of one block.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    passing: int
    peak: int
    offload: bool = False  # the optimizer's part is in the host's memory

    def describe(self) -> str:
        """One line."""
        parts = ("weights", "gradients", "optimizer", "activations", "passing")
        unit, size, form = ("GiB", 2**30, ".2f") if self.peak >= 2**27 else ("MiB", 2**20, ".1f")
        listed = ", ".join(f"{name} {getattr(self, name) / size:{form}}" for name in parts)
        return f"memory: tensors of about {self.peak / size:{form}} {unit} at the peak on each rank ({listed})"

    def warning(self, there: int, device: str) -> str | None:
        """What to say where that is beyond the bytes of memory of a device; None where it is not."""
        cpu = device.startswith("cpu")
        there = min(there, *_limits()) if cpu else there
        peak = self.peak - (self.optimizer if self.offload and not cpu else 0)
        if peak <= there:
            return None
        return (
            f"warning: tensors of about {peak / 2**30:.2f} GiB are expected at the peak, {device} has "
            f"{there / 2**30:.2f} GiB of memory; lower data.pack_tokens, set train.recompute or optim.offload, or "
            f"train with lora"
        )


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits() -> Iterator[int]:
    """The limits that a container or `ulimit -v` sets to this process, and the machine's memory."""
    yield host_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            yield int(Path(file).read_text())
        except (OSError, ValueError):  # there is none, or it says "max"
            continue


def memory_of(recipe: Recipe, config: ModelConfig, adapters: Adapters | None, drafts: Iterable[Any]) -> Memory | None:
    """The estimate for a recipe from some of its samples; None where none of them can be used."""
    sizes = [(d.tokens, d.trained_tokens, d.patches) for d in drafts if isinstance(d, Draft)]
    return estimate(config, recipe, Load.of(recipe, sizes), adapters) if sizes else None


@dataclass(frozen=True)
class Trained:
    """Which parameters of a model are trained, and where they are."""

    shapes: Mapping[str, Shape]
    paths: frozenset[str]
    adapters: Adapters | None = None

    @classmethod
    def of(cls, config: ModelConfig, recipe: Recipe, adapters: Adapters | None = None) -> Trained:
        """As training will have it."""
        shapes = dict(parameter_shapes(config))
        if adapters is not None:
            shapes |= adapters.shapes(shapes)
        frozen = {path for pattern in recipe.model.freeze for path in matching(pattern, shapes, PARTS)}
        chosen = (path for path in shapes if path not in frozen and (adapters is None or is_adapter(path)))
        return cls(shapes, frozenset(chosen), adapters)

    def under(self, *prefixes: str) -> bool:
        """Whether anything below these paths is trained."""
        return any(path.startswith(prefixes) for path in self.paths)

    def numbers(self, paths: Iterable[str]) -> int:
        """Elements of these parameters."""
        return sum(math.prod(self.shapes[path]) for path in paths)

    def state(self, recipe: Recipe) -> int:
        """Bytes of the optimizer's state: moments, and float32 masters of what is stored in half precision."""
        moments = 2 * _BYTES[recipe.optim.state_dtype] * self.numbers(self.paths)
        halves = (path for path in self.paths if not is_adapter(path)) if _BYTES[recipe.model.dtype] < 4 else ()
        return moments + 4 * self.numbers(halves)


def estimate(config: ModelConfig, recipe: Recipe, load: Load, adapters: Adapters | None = None) -> Memory:
    """Memory of a training step on one rank.

    A DPO run that holds a reference model has its weights beside its own. Over several ranks the parts are divided as
    the layout says, evenly: weights and gradients by tp and pp, optimizer state by dp as well, activations by tp and
    cp.
    """
    trained = Trained.of(config, recipe, adapters)
    narrow = _BYTES[recipe.model.dtype]
    layout = recipe.parallel
    share = layout.tp * layout.pp
    weights = _stored(trained, trained.shapes, narrow)
    if recipe.dpo is not None and recipe.dpo.cache is None and (adapters is None or recipe.dpo.reference is not None):
        weights += narrow * sum(map(math.prod, parameter_shapes(config).values()))
    gradients = 4 * trained.numbers(trained.paths)
    state = trained.state(recipe)
    kept = _kept(config, recipe, load, trained)
    forward, backward, end = _passing(config, load, trained, narrow)
    before = gradients if load.micro_batches > 1 else 0
    work = max(before + kept.bytes + max(forward, backward + kept.again), gradients + end)
    fixed = weights // share + state // (share * layout.dp)
    divided = layout.tp * layout.cp
    return Memory(
        weights=weights // share,
        gradients=gradients // share,
        optimizer=state // (share * layout.dp),
        activations=kept.bytes // divided,
        passing=max(forward, backward + kept.again, end) // divided,
        peak=fixed + before // share + (work - before) // divided,
        offload=recipe.optim.offload,
    )


def disk_of(config: ModelConfig, recipe: Recipe, adapters: Adapters | None = None) -> tuple[int, int, int]:
    """Bytes of a checkpoint, those of the weights in it (of a LoRA run the adapters'), and those of the whole model."""
    trained, narrow = Trained.of(config, recipe, adapters), _BYTES[recipe.model.dtype]
    model = _stored(trained, parameter_shapes(config), narrow)
    weights = model if adapters is None else _stored(trained, filter(is_adapter, trained.shapes), narrow)
    return weights + trained.state(recipe), weights, model


def _stored(trained: Trained, paths: Iterable[str], narrow: int) -> int:
    """Bytes of parameters: adapters are float32."""
    listed = list(paths)
    own = trained.numbers(path for path in listed if is_adapter(path))
    return 4 * own + narrow * (trained.numbers(listed) - own)


# -- what is kept for the way back ------------------------------------------------------------------------------------


@dataclass
class _Kept:
    """Bytes that the tape holds, and the most that one block makes again."""

    bytes: int = 0
    again: int = 0
    flows: bool = field(default=False)  # whether gradients flow through what comes next

    def add_block(self, whole: int, mlp: int, entry: int, mode: str) -> None:
        """A block that keeps `whole` bytes, `mlp` of them in its MLP; `entry` is its input alone."""
        if mode == "block":
            self.bytes, self.again = self.bytes + entry, max(self.again, whole)
        elif mode == "mlp":
            self.bytes, self.again = self.bytes + whole - mlp, max(self.again, mlp)
        else:
            self.bytes += whole


def _modes(recipe: Recipe) -> tuple[str, str]:
    """What runs again in the vision tower and in the language model: "block", "mlp" or nothing."""
    return {
        "none": ("", ""),
        "full": ("block", "block"),
        "selective": ("mlp", "mlp"),
        "vision": ("block", ""),
        "language": ("", "block"),
    }[recipe.train.recompute]


def _kept(config: ModelConfig, recipe: Recipe, load: Load, trained: Trained) -> _Kept:
    narrow, kept = _BYTES[recipe.model.dtype], _Kept()
    vision_mode, language_mode = _modes(recipe)
    if load.patches:
        _keep_vision(kept, config.vision, load.patches, trained, narrow, vision_mode)
    kept.flows = kept.flows or trained.under("model.embed_tokens.")
    for layer in range(config.text.num_layers):
        prefix = f"model.layers.{layer}."
        kept.flows = kept.flows or trained.under(prefix)
        if kept.flows:
            whole, mlp = _language_layer(config.text, load.tokens, _inputs(trained, prefix), narrow)
            kept.add_block(whole, mlp, narrow * load.tokens * config.text.hidden_size, language_mode)
    kept.bytes += 2 * narrow * load.trained * config.text.hidden_size  # before and after the norm
    kept.bytes += 4 * load.tokens * config.text.head_dim  # rotary tables
    return kept


def _keep_vision(kept: _Kept, config: VisionConfig, patches: int, trained: Trained, narrow: int, mode: str) -> None:
    width = config.hidden_size
    kept.bytes += (narrow if narrow < 4 else 0) * patches * config.patch_row + 4 * patches * config.patch_row
    kept.bytes += 4 * patches * config.head_dim
    kept.flows = trained.under("visual.patch_embed.")
    for layer in range(config.depth):
        prefix = f"visual.blocks.{layer}."
        kept.flows = kept.flows or trained.under(prefix)
        if kept.flows:
            whole, mlp = _vision_block(config, patches, _inputs(trained, prefix), narrow)
            kept.add_block(whole, mlp, narrow * patches * width, mode)
    if kept.flows or trained.under("visual.merger."):
        kept.flows = True
        kept.bytes += 4 * narrow * patches * width  # norm's input, both layers' inputs, the activation's


def _inputs(trained: Trained, prefix: str) -> Callable[..., bool]:
    """Whether any of some linear layers below a prefix needs its input again."""
    return lambda *names: trained.under(*(f"{prefix}{name}." for name in names))


def _language_layer(config: TextConfig, tokens: int, needs: Callable[..., bool], narrow: int) -> tuple[int, int]:
    """Bytes that a layer keeps, and those of its MLP among them."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * width + 2 * heads + 2 * groups  # the residual stream before and after; q, out; k, v
    attention += width * needs("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = 2 * inner + width * needs("mlp.gate_proj", "mlp.up_proj") + inner * needs("mlp.down_proj")
    return tokens * (narrow * (attention + mlp) + 4 * (config.num_heads + 2)), tokens * narrow * mlp


def _vision_block(config: VisionConfig, patches: int, needs: Callable[..., bool], narrow: int) -> tuple[int, int]:
    """The same of a block of the vision tower; v is a part of qkv, which is kept whole."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = (2 + 3 + 2 + 1 + needs("attn.qkv")) * width
    first, second = ("gate_proj", "up_proj"), "down_proj"
    if config.mlp == "plain":
        first, second = ("fc1", "fc1"), "fc2"
    mlp = (2 if config.mlp == "gated" else 1) * inner + width * needs(*(f"mlp.{name}" for name in first))
    mlp += inner * needs(f"mlp.{second}")
    return patches * (narrow * (attention + mlp) + 4 * (config.num_heads + 4)), patches * narrow * mlp


# -- what passes ------------------------------------------------------------------------------------------------------


def _passing(config: ModelConfig, load: Load, trained: Trained, narrow: int) -> tuple[int, int, int]:
    """The most on top of what is kept: at the vocabulary, at the start of the backward pass, and at its end."""
    text = config.text
    vocabulary = text.vocab_size * text.hidden_size
    head = trained.under("model.embed_tokens." if config.tie_word_embeddings else "lm_head.")
    rows = min(load.trained, max(LEAST_ROWS, LOGIT_BUDGET // text.vocab_size))
    half = narrow if narrow < 4 else 0
    logits = rows * text.vocab_size * (3 * 4 + half)  # logits, softmax, its gradient, and that in the weight's dtype
    sums = 4 * vocabulary * (1 if rows == load.trained else 3) + half * vocabulary  # the weight's gradient, added up
    hidden = 4 * load.trained * text.hidden_size
    widest = max(load.tokens * text.intermediate_size, load.patches * config.vision.intermediate_size)
    block = 6 * narrow * widest  # SwiGLU's gradient
    forward = logits + hidden + head * sums
    backward = hidden + head * (2 * 4 + half) * vocabulary
    held = head * narrow * vocabulary  # of a tied weight, until the embedding's gradient comes
    end = (2 if config.tie_word_embeddings else 1) * trained.under("model.embed_tokens.") * narrow * vocabulary
    return forward, max(backward, (held if config.tie_word_embeddings else 0) + block), end
