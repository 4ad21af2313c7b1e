"""What MindSpeed-MM calls the tensors of Qwen2-VL and Qwen2.5-VL, how it fuses and how it divides them.

A stored tensor is laid out in *units*: a unit has one chunk of each part, one under the other, and each rank of tensor
parallelism holds a run of units. Fused q, k, v have one unit for each group of key and value heads, so that the rows
are [q of group 0, k 0, v 0, q of group 1, ...]; gate and up have one for each rank; a plain matrix is one part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Final, Literal

Tower = Literal["text", "vision"]
TOWERS: Final[tuple[Tower, Tower]] = ("text", "vision")
VisionOrder = Literal["interleaved", "hf"]
ORDERS: Final[tuple[VisionOrder, VisionOrder]] = ("interleaved", "hf")
INTERLEAVED: Final = ORDERS[0]
LORA: Final = (".lora_A.weight", ".lora_B.weight")

_TEXT = "text_decoder."
_ENCODER = "image_encoder.encoder."
_PROJECTOR = "image_encoder.projector."
_ROWS, _COLUMNS, _WHOLE = 0, 1, None


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, or one third of its rows (of the [q; k; v] of the vision tower).

    kv: it has as many heads as there are key and value heads, not as there are units.
    """

    name: str
    third: int | None = None
    kv: bool = False


@dataclass(frozen=True)
class Rule:
    """One stored tensor. `{n}` in names is a layer: of its stage in `stored`, of the model in parts.

    axis: the one that tensor parallelism divides; None: every rank has all of it.
    place: the stages that have it: each layer's own, the first or the last with layers of this tower.
    units: what a unit is: a rank's share, a group of key and value heads, a head of the vision tower.
    shared: every part is the whole stored tensor, as with the A of an adapter on fused q, k, v.
    """

    tower: Tower
    stored: str
    parts: tuple[Part, ...]
    axis: int | None
    place: Literal["layer", "first", "last"] = "layer"
    units: Literal["ranks", "kv_groups", "vision_heads"] = "ranks"
    shared: bool = False


@cache
def rules(gated: bool, canonical: bool, vision_qkv: VisionOrder = INTERLEAVED) -> tuple[Rule, ...]:
    """All stored tensors of a family, in the order of computation.

    gated: the vision tower's MLP is (Qwen2.5-VL). canonical: q, k, v and gate, up are not fused, and the vision
    tower's qkv keeps its rows as Hugging Face has them.
    """
    return (*_vision_rules(gated, canonical, vision_qkv), *_text_rules(canonical))


def tied_head() -> Rule:
    """The copy of the embedding that the last stage of a pipeline has where it serves as the head, too."""
    return Rule("text", f"{_TEXT}output_layer.weight", (Part("model.embed_tokens.weight"),), _ROWS, "last")


@cache
def lora_rules(gated: bool, canonical: bool, vision_qkv: VisionOrder = INTERLEAVED) -> tuple[Rule, ...]:
    """The tensors of LoRA adapters: A is cut where its matrix is row-parallel, B where it is column-parallel.

    On a fused matrix there is one A, which each of the matrix's parts has, and one B with the rows of the matrix.
    """
    return tuple(chain.from_iterable(_lora_pair(rule) for rule in rules(gated, canonical, vision_qkv)))


def _lora_pair(rule: Rule) -> Iterator[Rule]:
    name = rule.parts[0].name
    if not name.endswith(".weight") or "norm" in name or name.endswith("ln_q.weight"):
        return
    stem = rule.stored.removesuffix(".weight")
    names = list(dict.fromkeys(part.name for part in rule.parts))
    a = tuple(Part(_lora_name(name, "A")) for name in names)
    b = tuple(replace(part, name=_lora_name(part.name, "B")) for part in rule.parts)
    cut_a, cut_b = (cut if rule.axis == cut else _WHOLE for cut in (_COLUMNS, _ROWS))
    yield Rule(rule.tower, f"{stem}.lora_A.default.weight", a, cut_a, rule.place, shared=len(a) > 1)
    yield Rule(rule.tower, f"{stem}.lora_B.default.weight", b, cut_b, rule.place, rule.units)


def _lora_name(weight: str, letter: str) -> str:
    return f"{weight.removesuffix('.weight')}.lora_{letter}.weight"


def _vision_rules(gated: bool, canonical: bool, order: VisionOrder) -> Iterator[Rule]:
    patches = Part("visual.patch_embed.proj.weight")
    yield Rule("vision", f"{_ENCODER}patch_embed.proj.weight", (patches,), _WHOLE, "first")
    block, stored = "visual.blocks.{n}.", _ENCODER + "blocks.layers.{n}."
    yield from _both("vision", f"{stored}input_layernorm", f"{block}norm1", _WHOLE)
    for leaf in (".weight", ".bias"):
        yield _vision_qkv(f"{stored}self_attention.linear_qkv{leaf}", f"{block}attn.qkv{leaf}", canonical, order)
    yield from _row_parallel("vision", f"{stored}self_attention.linear_proj", f"{block}attn.proj")
    yield from _both("vision", f"{stored}pre_mlp_layernorm", f"{block}norm2", _WHOLE)
    if not gated:
        yield from _both("vision", f"{stored}mlp.linear_fc1", f"{block}mlp.fc1", _ROWS)
    else:
        yield from _gate_and_up("vision", f"{stored}mlp.", f"{block}mlp.", canonical)
    yield from _row_parallel("vision", f"{stored}mlp.linear_fc2", f"{block}mlp.{'down_proj' if gated else 'fc2'}")
    yield from _both("vision", f"{_PROJECTOR}layernorm", "visual.merger.ln_q", _WHOLE, "last")
    yield from _both("vision", f"{_PROJECTOR}encoder.linear_fc1", "visual.merger.mlp.0", _ROWS, "last")
    yield from _row_parallel("vision", f"{_PROJECTOR}encoder.linear_fc2", "visual.merger.mlp.2", "last")


def _text_rules(canonical: bool) -> Iterator[Rule]:
    embedding = Part("model.embed_tokens.weight")
    yield Rule("text", f"{_TEXT}embedding.word_embeddings.weight", (embedding,), _ROWS, "first")
    block, stored = "model.layers.{n}.", _TEXT + "decoder.layers.{n}."
    yield from _both("text", f"{stored}input_layernorm", f"{block}input_layernorm", _WHOLE)
    for leaf in (".weight", ".bias"):
        yield from _text_qkv(f"{stored}self_attention.", f"{block}self_attn.", leaf, canonical)
    yield from _row_parallel("text", f"{stored}self_attention.linear_proj", f"{block}self_attn.o_proj")
    yield from _both("text", f"{stored}pre_mlp_layernorm", f"{block}post_attention_layernorm", _WHOLE)
    yield from _gate_and_up("text", f"{stored}mlp.", f"{block}mlp.", canonical)
    yield from _row_parallel("text", f"{stored}mlp.linear_fc2", f"{block}mlp.down_proj")
    yield from _both("text", f"{_TEXT}decoder.final_layernorm", "model.norm", _WHOLE, "last")
    yield Rule("text", f"{_TEXT}output_layer.weight", (Part("lm_head.weight"),), _ROWS, "last")


def _vision_qkv(stored: str, name: str, canonical: bool, order: VisionOrder) -> Rule:
    if canonical or order == "hf":
        return Rule("vision", stored, (Part(name),), _ROWS)
    thirds = tuple(Part(name, third) for third in range(3))
    return Rule("vision", stored, thirds, _ROWS, units="vision_heads")


def _text_qkv(stored: str, block: str, leaf: str, canonical: bool) -> Iterator[Rule]:
    parts = [Part(f"{block}{letter}_proj{leaf}", kv=letter != "q") for letter in "qkv"]
    if canonical:
        for part in parts:
            yield Rule("text", stored + part.name.removeprefix(block), (part,), _ROWS)
    else:
        yield Rule("text", f"{stored}linear_qkv{leaf}", tuple(parts), _ROWS, units="kv_groups")


def _gate_and_up(tower: Tower, stored: str, block: str, canonical: bool) -> Iterator[Rule]:
    for leaf in (".weight", ".bias"):
        parts = [Part(f"{block}{name}{leaf}") for name in ("gate_proj", "up_proj")]
        if canonical:
            for part in parts:
                yield Rule(tower, stored + part.name.removeprefix(block), (part,), _ROWS)
        else:
            yield Rule(tower, f"{stored}linear_fc1{leaf}", tuple(parts), _ROWS)


def _both(
    tower: Tower, stored: str, name: str, axis: int | None, place: Literal["layer", "last"] = "layer"
) -> Iterator[Rule]:
    for leaf in (".weight", ".bias"):
        yield Rule(tower, stored + leaf, (Part(name + leaf),), axis, place)


def _row_parallel(tower: Tower, stored: str, name: str, place: Literal["layer", "last"] = "layer") -> Iterator[Rule]:
    """Its bias is added after the sum over ranks, so each has all of it."""
    yield Rule(tower, f"{stored}.weight", (Part(f"{name}.weight"),), _COLUMNS, place)
    yield Rule(tower, f"{stored}.bias", (Part(f"{name}.bias"),), _WHOLE, place)
