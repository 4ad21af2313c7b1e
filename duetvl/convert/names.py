"""What MindSpeed-MM calls the tensors of Qwen2-VL and Qwen2.5-VL, and how it fuses them.

Along which axis a tensor is divided, and which stage has it, says the one table of models/qwen_vl/sharding.py.

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

from duetvl.models.qwen_vl.sharding import Owner, owner_of, shard_of

Tower = Literal["text", "vision"]
TOWERS: Final[tuple[Tower, Tower]] = ("text", "vision")
VisionOrder = Literal["interleaved", "hf"]
ORDERS: Final[tuple[VisionOrder, VisionOrder]] = ("interleaved", "hf")
INTERLEAVED: Final = ORDERS[0]

_TEXT = "text_decoder."
_ENCODER = "image_encoder.encoder."
_PROJECTOR = "image_encoder.projector."


@dataclass(frozen=True)
class TensorThird:
    """A Hugging Face tensor, or one third of its rows (of the [q; k; v] of the vision tower).

    kv: it has as many heads as there are key and value heads, not as there are units.
    """

    name: str
    third: int | None = None
    kv: bool = False


@dataclass(frozen=True)
class Rule:
    """One stored tensor. `{n}` in names is a layer: of its stage in `stored`, of the model in parts.

    units: what a unit is: a rank's share, a group of key and value heads, a head of the vision tower.
    shared: every part is the whole stored tensor, as with the A of an adapter on fused q, k, v.
    copied: a second copy, for the last stage, of what the first one owns.
    """

    stored: str
    parts: tuple[TensorThird, ...]
    units: Literal["ranks", "kv_groups", "vision_heads"] = "ranks"
    shared: bool = False
    copied: bool = False

    @property
    def tower(self) -> Tower:
        """The tower whose stages have it."""
        return "vision" if self._owner.tower == "vision" else "text"

    @property
    def axis(self) -> int | None:
        """The axis that tensor parallelism divides; None: every rank has all of it."""
        return shard_of(self._name).axis

    @property
    def place(self) -> Literal["layer", "first", "last"]:
        """The stages that have it: each layer's own, the first or the last with layers of its tower."""
        if self.copied:
            return "last"
        return "layer" if isinstance(self._owner.layer, int) else self._owner.layer

    @property
    def _name(self) -> str:
        return self.parts[0].name.replace("{n}", "0")

    @property
    def _owner(self) -> Owner:
        return owner_of(self._name)


@cache
def rules(gated: bool, canonical: bool, vision_qkv: VisionOrder = INTERLEAVED) -> tuple[Rule, ...]:
    """All stored tensors of a family, in the order of computation.

    gated: the vision tower's MLP is (Qwen2.5-VL). canonical: q, k, v and gate, up are not fused, and the vision
    tower's qkv keeps its rows as Hugging Face has them.
    """
    return (*_vision_rules(gated, canonical, vision_qkv), *_text_rules(canonical))


def tied_head() -> Rule:
    """The copy of the embedding that the last stage of a pipeline has where it serves as the head, too."""
    return Rule(f"{_TEXT}output_layer.weight", (TensorThird("model.embed_tokens.weight"),), copied=True)


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
    a = tuple(TensorThird(_lora_name(name, "A")) for name in names)
    b = tuple(replace(part, name=_lora_name(part.name, "B")) for part in rule.parts)
    yield Rule(f"{stem}.lora_A.default.weight", a, shared=len(a) > 1)
    yield Rule(f"{stem}.lora_B.default.weight", b, rule.units)


def _lora_name(weight: str, letter: str) -> str:
    return f"{weight.removesuffix('.weight')}.lora_{letter}.weight"


def _vision_rules(gated: bool, canonical: bool, order: VisionOrder) -> Iterator[Rule]:
    yield Rule(f"{_ENCODER}patch_embed.proj.weight", (TensorThird("visual.patch_embed.proj.weight"),))
    block, stored = "visual.blocks.{n}.", _ENCODER + "blocks.layers.{n}."
    yield from _both(f"{stored}input_layernorm", f"{block}norm1")
    for leaf in (".weight", ".bias"):
        yield _vision_qkv(f"{stored}self_attention.linear_qkv{leaf}", f"{block}attn.qkv{leaf}", canonical, order)
    yield from _both(f"{stored}self_attention.linear_proj", f"{block}attn.proj")
    yield from _both(f"{stored}pre_mlp_layernorm", f"{block}norm2")
    if not gated:
        yield from _both(f"{stored}mlp.linear_fc1", f"{block}mlp.fc1")
    else:
        yield from _gate_and_up(f"{stored}mlp.", f"{block}mlp.", canonical)
    yield from _both(f"{stored}mlp.linear_fc2", f"{block}mlp.{'down_proj' if gated else 'fc2'}")
    yield from _both(f"{_PROJECTOR}layernorm", "visual.merger.ln_q")
    yield from _both(f"{_PROJECTOR}encoder.linear_fc1", "visual.merger.mlp.0")
    yield from _both(f"{_PROJECTOR}encoder.linear_fc2", "visual.merger.mlp.2")


def _text_rules(canonical: bool) -> Iterator[Rule]:
    yield Rule(f"{_TEXT}embedding.word_embeddings.weight", (TensorThird("model.embed_tokens.weight"),))
    block, stored = "model.layers.{n}.", _TEXT + "decoder.layers.{n}."
    yield from _both(f"{stored}input_layernorm", f"{block}input_layernorm")
    for leaf in (".weight", ".bias"):
        yield from _text_qkv(f"{stored}self_attention.", f"{block}self_attn.", leaf, canonical)
    yield from _both(f"{stored}self_attention.linear_proj", f"{block}self_attn.o_proj")
    yield from _both(f"{stored}pre_mlp_layernorm", f"{block}post_attention_layernorm")
    yield from _gate_and_up(f"{stored}mlp.", f"{block}mlp.", canonical)
    yield from _both(f"{stored}mlp.linear_fc2", f"{block}mlp.down_proj")
    yield from _both(f"{_TEXT}decoder.final_layernorm", "model.norm")
    yield Rule(f"{_TEXT}output_layer.weight", (TensorThird("lm_head.weight"),))


def _vision_qkv(stored: str, name: str, canonical: bool, order: VisionOrder) -> Rule:
    if canonical or order == "hf":
        return Rule(stored, (TensorThird(name),))
    return Rule(stored, tuple(TensorThird(name, third) for third in range(3)), units="vision_heads")


def _text_qkv(stored: str, block: str, leaf: str, canonical: bool) -> Iterator[Rule]:
    parts = [TensorThird(f"{block}{letter}_proj{leaf}", kv=letter != "q") for letter in "qkv"]
    if canonical:
        for part in parts:
            yield Rule(stored + part.name.removeprefix(block), (part,))
    else:
        yield Rule(f"{stored}linear_qkv{leaf}", tuple(parts), units="kv_groups")


def _gate_and_up(stored: str, block: str, canonical: bool) -> Iterator[Rule]:
    for leaf in (".weight", ".bias"):
        parts = [TensorThird(f"{block}{name}{leaf}") for name in ("gate_proj", "up_proj")]
        if canonical:
            for part in parts:
                yield Rule(stored + part.name.removeprefix(block), (part,))
        else:
            yield Rule(f"{stored}linear_fc1{leaf}", tuple(parts))


def _both(stored: str, name: str) -> Iterator[Rule]:
    for leaf in (".weight", ".bias"):
        yield Rule(stored + leaf, (TensorThird(name + leaf),))
