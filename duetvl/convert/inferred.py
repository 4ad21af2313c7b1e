"""Models that only their files describe: MindSpeed-MM writes no configuration beside its checkpoints.

Shapes can be seen, heads cannot: fused q, k, v of 8 heads of 64 and of 4 heads of 128 have the same rows. They are
known where the widths are those of a published model. Otherwise a division can only be undone, never refined: ranks
that hold whole heads still do when they are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Final

import numpy as np

from duetvl.convert.layouts import EMBEDDING, HEAD, Layout, Model, placements
from duetvl.convert.mindspeed import MindSpeedDirectory
from duetvl.convert.names import TOWERS, Rule, Tower, lora_rules, rules, tied_head
from duetvl.convert.streaming import row_chunks
from duetvl.core.boxes import Box, Shape
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.qwen_vl.config import ModelConfig, published_config, published_names
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.weights_dir import count_and_name

_LAYER_NORM: Final = "image_encoder.encoder.blocks.layers.0.input_layernorm.bias"
_NO_HEADS: Final = "its heads cannot be told from its files; add --cfg.hf_config.hf_dir"
_LAST_ROWS: Final = 4  # fewer than any head has


def has_gated_vision(directory: MindSpeedDirectory) -> bool:
    """Whether the vision tower is Qwen2.5-VL's, of one that is stored whole."""
    return not directory.has(_LAYER_NORM)


def infer_model(
    directory: MindSpeedDirectory,
    layout: Layout,
    others: Sequence[Layout] = (),
    *,
    exact: bool = False,
    writes: bool = True,
) -> Model:
    """The model of a directory without a config.json, as far as dividing it otherwise needs to know it.

    Raises ConfigError where heads are not those of a published model and would have to be known: `exact`, as their
    order changes; `writes`, as one of the `others` has ranks that do not each hold several of this division's.
    """
    gated = has_gated_vision(directory)
    shapes = infer_shapes(directory, layout, rules(gated, layout.canonical, layout.vision_order), _width(directory))
    if HEAD in shapes and layout.pp > 1 and _head_is_embedding(directory):
        del shapes[HEAD]  # with one stage a tied head is not stored, with several it is
    if _repeats_heads(directory, layout):
        raise ConfigError(f"{directory.path}: {_NO_HEADS}")
    layer = "model.layers.0."
    names = (f"{layer}self_attn.q_proj.weight", f"{layer}self_attn.k_proj.weight", f"{layer}mlp.up_proj.weight")
    q, k, mlp = (shapes.get(name, (0,))[0] for name in names)
    patches = shapes.get("visual.patch_embed.proj.weight", (0,))[0]
    ranks, vision_ranks = (math.lcm(*(each.tp_of(tower) for each in (layout, *others))) for tower in TOWERS)
    heads, vision_heads = text_heads(q, k, mlp), published_vision_heads().get(patches)
    if not heads and k and (exact or k % ranks or (writes and ranks != layout.tp)):
        raise ConfigError(f"{directory.path}: {_NO_HEADS}")
    if not vision_heads and patches and (exact or (writes and vision_ranks != layout.tp_of("vision"))):
        raise ConfigError(f"{directory.path}: {_NO_HEADS}")
    return Model(shapes, *(heads or (ranks, ranks)), vision_heads or vision_ranks, gated)


@cache
def _published_text_heads() -> Mapping[tuple[int, int, int], tuple[int, int]]:
    """By width, rows of the keys and width of the MLP."""
    texts = [published_config(name).text for name in published_names()]
    widths = [(t.hidden_size, t.hidden_size // t.num_heads * t.num_kv_heads, t.intermediate_size) for t in texts]
    return {each: (text.num_heads, text.num_kv_heads) for each, text in zip(widths, texts, strict=True)}


@cache
def published_vision_heads() -> Mapping[int, int]:
    """Heads of the vision tower by its width, in published models."""
    towers = [published_config(name).vision for name in published_names()]
    return {tower.hidden_size: tower.num_heads for tower in towers}


def text_heads(width: int, keys: int, mlp: int | None) -> tuple[int, int] | None:
    """Heads, and those of keys and values, of the published model with these widths; `mlp` None: whatever it has."""
    found = {
        heads for (w, k, m), heads in _published_text_heads().items() if (w, k) == (width, keys) and mlp in (None, m)
    }
    return found.pop() if len(found) == 1 else None


def infer_shapes(directory: MindSpeedDirectory, layout: Layout, chosen: Iterable[Rule], width: int) -> dict[str, Shape]:
    """Whole shapes of the logical tensors that the files hold; `width` is that of the language model."""
    shapes: dict[str, Shape] = {}
    for rule in chosen:
        for layer, (stage, local) in enumerate(placements(rule, layout)):
            place = (0, stage, rule.stored.format(n=local))
            if place in directory.tensors:
                whole = _whole_shape(directory.spec(place).shape, rule, layout)
                for part, shape in zip(rule.parts, _part_shapes(whole, rule, width), strict=True):
                    shapes[part.name.format(n=layer)] = shape
    return shapes


def _width(directory: MindSpeedDirectory) -> int:
    widths = [directory.spec(p).shape[0] for p in directory.tensors if p[2].endswith("final_layernorm.weight")]
    return widths[0] if widths else 0


def _whole_shape(shape: Shape, rule: Rule, layout: Layout) -> Shape:
    tp = layout.tp_of(rule.tower)
    return tuple(size * tp if axis == rule.axis else size for axis, size in enumerate(shape))


def _part_shapes(whole: Shape, rule: Rule, width: int) -> list[Shape]:
    if rule.shared or any(part.third is not None for part in rule.parts):
        return [whole] * len(rule.parts)
    if rule.units == "kv_groups":
        kv = (whole[0] - width) // 2
        return [(rows, *whole[1:]) for rows in (width, kv, kv)]
    return [(whole[0] // len(rule.parts), *whole[1:])] * len(rule.parts)


def _head_is_embedding(directory: MindSpeedDirectory) -> bool:
    """Whether the last stage has a copy of the embedding, which only the numbers can tell."""
    embedding = next(rule.stored for rule in rules(True, False) if rule.parts[0].name == EMBEDDING)
    for rank in range(directory.ranks):
        stored = {name: there for (r, _, name), there in directory.tensors.items() if r == rank}
        (first, key), (second, head) = stored[embedding], stored[tied_head().stored]
        spec = first.specs[key]
        for box in row_chunks(spec, Box.whole(spec.shape)):
            equal = np.array_equal(first.view(key)[box.slices], second.view(head)[box.slices])
            first.release(key)
            second.release(head)
            if not equal:
                return False
    return True


def _repeats_heads(directory: MindSpeedDirectory, layout: Layout) -> bool:
    """Whether neighbouring ranks end with the same rows of keys or values: then there are fewer heads than ranks."""
    if layout.tp == 1 or not directory.has("text_decoder.decoder.layers."):
        return False
    stage = next(s for s, count in enumerate(layout.stages("text")) if count)
    leaf = "k_proj.weight" if layout.canonical else "linear_qkv.weight"
    name = f"text_decoder.decoder.layers.0.self_attention.{leaf}"
    first, second = ((0, stage, name), (1, stage, name))
    if first not in directory.tensors or second not in directory.tensors:
        return False
    a, b = (store.view(key)[-_LAST_ROWS:] for store, key in (directory.tensors[first], directory.tensors[second]))
    return bool(a.any()) and np.array_equal(a, b)


# -- adapters ---------------------------------------------------------------------------------------------------------


def infer_adapter(directory: MindSpeedDirectory, layout: Layout, gated: bool, config: ModelConfig | None) -> Model:
    """The LoRA adapter in a directory: a Model whose tensors are those of the adapter.

    `config` is that of the model below. Without it ConfigError where B has fused rows of heads that are not those of a
    published model. CheckpointError where the adapter is for another model.
    """
    fused = {} if layout.canonical else _fused_widths(directory)
    chosen = lora_rules(gated, layout.canonical, layout.vision_order)
    shapes = infer_shapes(directory, layout, chosen, fused.get("text", 0))
    if config is not None:
        _check_below(directory, shapes, config)
        text, vision = config.text, config.vision
        return Model(shapes, text.num_heads, text.num_kv_heads, vision.num_heads, gated)
    heads: tuple[int, int] | None = (layout.tp, layout.tp)
    vision_heads: int | None = layout.tp_of("vision")
    if "text" in fused:
        keys = next(shape[0] for name, shape in shapes.items() if name.endswith("k_proj.lora_B.weight"))
        heads = text_heads(fused["text"], keys, _mlp_width(shapes))
    if "vision" in fused:
        vision_heads = published_vision_heads().get(fused["vision"])
    if heads is None or vision_heads is None:
        raise ConfigError(f"{directory.path}: {_NO_HEADS}, the directory of the model that the adapter is for")
    return Model(shapes, *heads, vision_heads, gated)


def _fused_widths(directory: MindSpeedDirectory) -> dict[Tower, int]:
    """Width of each tower whose fused q, k, v have an adapter."""
    found: dict[Tower, int] = {}
    for place in directory.tensors:
        if place[2].endswith("linear_qkv.lora_A.default.weight"):
            found["text" if place[2].startswith("text_decoder.") else "vision"] = directory.spec(place).shape[1]
    return found


def _mlp_width(shapes: Mapping[str, Shape]) -> int | None:
    for name, shape in shapes.items():
        if name.startswith("model.layers.") and name.endswith("up_proj.lora_B.weight"):
            return shape[0]
        if name.startswith("model.layers.") and name.endswith("down_proj.lora_A.weight"):
            return shape[1]
    return None


def _check_below(directory: MindSpeedDirectory, shapes: Mapping[str, Shape], config: ModelConfig) -> None:
    """Raise CheckpointError unless every A and B fits a matrix of the model."""
    weights = parameter_shapes(config)
    wrong = []
    for name, shape in shapes.items():
        module, letter = name.removesuffix(".weight").rsplit(".lora_", 1)
        below = weights.get(f"{module}.weight", ())
        size, wanted = (shape[1], math.prod(below[1:])) if letter == "A" else (shape[0], below[:1] and below[0])
        if not below or size != wanted:
            wrong.append(f"{name} {list(shape)}" + (f" on {list(below)}" if below else ", which has no such matrix"))
    if wrong:
        problem = count_and_name("tensor(s) of the adapter do not fit the model of hf_dir", wrong)
        raise CheckpointError(f"{directory.path}: {problem}")
