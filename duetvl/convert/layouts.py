"""Which part of which tensor lies in which file of a MindSpeed-MM checkpoint, for any division into stages and ranks.

`stored_tensors` is the one description that reading, writing, resplitting and comparing use: each stored tensor is a
list of boxes of Hugging Face tensors, stacked along the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from duetvl.convert.names import INTERLEAVED, Rule, TensorThird, Tower, VisionOrder, lora_rules, rules, tied_head
from duetvl.core.boxes import Box, Shape
from duetvl.core.errors import ConfigError
from duetvl.core.stages import Rows, early_language, even_split, show
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.parameters import parameter_shapes

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
LIST_KEYS: Final[Mapping[Tower, str]] = {"vision": "vit_pp_layers", "text": "llm_pp_layers"}
_LAYER: Final = re.compile(r"(?:visual\.blocks|model\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class Model:
    """What a layout needs to know of a model: its tensors, and how many heads share the rows of q, k, v."""

    shapes: Mapping[str, Shape]
    heads: int
    kv_heads: int
    vision_heads: int
    gated_vision: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Model:
        """The model of a configuration."""
        text, vision = config.text, config.vision
        gated = vision.mlp == "gated"
        return cls(parameter_shapes(config), text.num_heads, text.num_kv_heads, vision.num_heads, gated)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head."""
        return HEAD not in self.shapes

    def only(self, prefix: str) -> Model:
        """The model without tensors of other names."""
        shapes = {name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        return Model(shapes, self.heads, self.kv_heads, self.vision_heads, self.gated_vision)

    def layers(self, tower: Tower) -> int:
        """How many layers a tower has."""
        prefix = "model.layers." if tower == "text" else "visual.blocks."
        numbers = [int(m[1]) for name in self.shapes if name.startswith(prefix) and (m := _LAYER.match(name))]
        return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class Layout:
    """A division of a model over pipeline stages and ranks of tensor parallelism.

    text, vision: layers of each stage as [virtual stage][pipeline rank]. vision_tp: 0 for that of the text.
    vision_qkv: the order of rows in the vision tower's fused qkv; releases 2.1.0 to 2.3.0 wrote "hf". None: not stated.
    replicate_kv: allow more ranks than key and value heads, each with a copy of the head it needs.
    """

    text: Rows
    vision: Rows
    tp: int = 1
    vision_tp: int = 0
    canonical: bool = False
    vision_qkv: VisionOrder | None = None
    replicate_kv: bool = False

    @classmethod
    def one_stage(cls, config: ModelConfig, tp: int = 1) -> Layout:
        """All layers together."""
        return cls(((config.text.num_layers,),), ((config.vision.depth,),), tp)

    @property
    def pp(self) -> int:
        """Ranks of the pipeline."""
        return len(self.text[0])

    @property
    def vpp(self) -> int:
        """Virtual stages on each of them."""
        return len(self.text)

    @property
    def ranks(self) -> int:
        """Directories for each stage."""
        return max(self.tp, self.tp_of("vision"))

    def tp_of(self, tower: Tower) -> int:
        """Ranks that a tower is divided over."""
        return self.tp if tower == "text" or not self.vision_tp else self.vision_tp

    @property
    def vision_order(self) -> VisionOrder:
        """The order of rows in the vision tower's fused qkv, where nothing is stated that of present releases."""
        return self.vision_qkv or INTERLEAVED

    def stages(self, tower: Tower) -> tuple[int, ...]:
        """Layers of each stage in the order of computation."""
        rows = self.text if tower == "text" else self.vision
        flat = tuple(count for row in rows for count in row)
        return flat + (0,) * (self.pp * self.vpp - len(flat))

    def rules(self, model: Model) -> tuple[Rule, ...]:
        """The tensors that are stored of this model."""
        found = rules(model.gated_vision, self.canonical, self.vision_order)
        return (*found, tied_head()) if model.tied and self.pp > 1 else found

    def describe(self) -> str:
        """In the words of the command line."""
        vision = f", vit_tp_size {self.vision_tp}" if self.vision_tp else ""
        return f"llm_pp_layers {show(self.text)}, vit_pp_layers {show(self.vision)}, tp_size {self.tp}{vision}"


@dataclass(frozen=True)
class TensorBox:
    """A box of a Hugging Face tensor."""

    name: str
    box: Box


@dataclass(frozen=True)
class Stored:
    """A tensor in the file of one rank and stage: these pieces, one under the other.

    shared: each piece is all of it instead.
    """

    rank: int
    stage: int
    name: str
    pieces: tuple[TensorBox, ...]
    shared: bool = False

    @property
    def shape(self) -> Shape:
        """Its shape on disk."""
        if self.shared:
            return self.pieces[0].box.shape
        rest = self.pieces[0].box.shape[1:]
        return (sum(piece.box.shape[0] for piece in self.pieces), *rest)

    def rows(self) -> Iterator[tuple[TensorBox, int]]:
        """Each piece with its first row."""
        row = 0
        for piece in self.pieces:
            yield piece, row
            row += 0 if self.shared or not piece.box.shape else piece.box.shape[0]


def stored_tensors(model: Model, layout: Layout, chosen: Iterable[Rule] | None = None) -> Iterator[Stored]:
    """Every tensor of every file, those of one name on all ranks one after the other."""
    for rule in layout.rules(model) if chosen is None else chosen:
        for layer, (stage, local) in enumerate(placements(rule, layout)):
            parts = [TensorThird(part.name.format(n=layer), part.third, part.kv) for part in rule.parts]
            if not all(part.name in model.shapes for part in parts):
                continue
            for rank in range(layout.ranks):
                pieces = tuple(_pieces(rule, parts, model, layout, rank))
                yield Stored(rank, stage, rule.stored.format(n=local), pieces, rule.shared)


def lora_tensors(model: Model, layout: Layout) -> Iterator[Stored]:
    """The same for the tensors of an adapter, which are those in `model.shapes`."""
    return stored_tensors(model, layout, lora_rules(model.gated_vision, layout.canonical, layout.vision_order))


def placements(rule: Rule, layout: Layout) -> list[tuple[int, int]]:
    """Stage, and number within it, of each layer that has the tensor; one for what the first or last stage has."""
    owners = [(stage, local) for stage, count in enumerate(layout.stages(rule.tower)) for local in range(count)]
    if rule.place == "layer" or not owners:
        return owners
    return [(owners[0 if rule.place == "first" else -1][0], 0)]


def _pieces(rule: Rule, parts: list[TensorThird], model: Model, layout: Layout, rank: int) -> Iterator[TensorBox]:
    tp = layout.tp_of(rule.tower)
    if rule.axis is None:
        yield from (TensorBox(part.name, Box.whole(model.shapes[part.name])) for part in parts)
        return
    units = _units(rule, model, tp)
    shard = rank % tp  # a tower that is divided over fewer ranks than the other is repeated
    for unit in range(shard * units // tp, (shard + 1) * units // tp):
        for part in parts:
            count = min(units, model.kv_heads) if part.kv else units
            yield _chunk(part, model.shapes[part.name], rule.axis, unit * count // units, count)


def _units(rule: Rule, model: Model, tp: int) -> int:
    return {"ranks": tp, "kv_groups": max(tp, model.kv_heads), "vision_heads": model.vision_heads}[rule.units]


def _chunk(part: TensorThird, shape: Shape, axis: int, index: int, count: int) -> TensorBox:
    length = shape[axis] if part.third is None else shape[axis] // 3
    size = length // count
    offset = [0] * len(shape)
    offset[axis] = (part.third or 0) * length + index * size
    return TensorBox(part.name, Box(tuple(offset), (*shape[:axis], size, *shape[axis + 1 :])))


# -- what can be done -------------------------------------------------------------------------------------------------


def check_layout(model: Model, layout: Layout, where: str = "parallel_config") -> list[str]:
    """Raise ConfigError for a division that does not fit the model; return warnings."""
    _check_lists(layout, where)
    for tower, key in LIST_KEYS.items():
        placed, there = sum(layout.stages(tower)), model.layers(tower)
        if there and placed != there:
            even = even_split(there, layout.pp * layout.vpp)
            raise ConfigError(
                f"{where}.{key} {show(layout.text if tower == 'text' else layout.vision)} places {placed} layers, the "
                f"model has {there}; an even split over {layout.pp * layout.vpp} stages would be {list(even)}"
            )
    if model.layers("text"):
        _check_order(layout, where)
        _check_heads(model, layout, where)
    _check_vision(model, layout, where)
    _check_sizes(model, layout, where)
    if sum(map(len, layout.vision)) < layout.pp * layout.vpp:
        return [f"{where}.vit_pp_layers {show(layout.vision)} is shorter than llm_pp_layers; the other stages get none"]
    return []


def _check_lists(layout: Layout, where: str) -> None:
    for key, rows in (("llm_pp_layers", layout.text), ("vit_pp_layers", layout.vision)):
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            raise ConfigError(f"{where}.{key} {show(rows)}: the rows (one for each virtual stage) differ in length")
    flat = len(layout.vision) * len(layout.vision[0])
    if flat > layout.pp * layout.vpp or (layout.vpp > 1 and len(layout.vision[0]) != layout.pp):
        raise ConfigError(
            f"{where}: vit_pp_layers {show(layout.vision)} has {flat} stages, llm_pp_layers {show(layout.text)} has "
            f"{layout.pp * layout.vpp}; give both one number for each stage"
        )
    if layout.pp > 1000 or layout.ranks > 100:
        raise ConfigError(f"{where}: {layout.ranks} ranks x {layout.pp} stages is more than directory names can count")


def _check_order(layout: Layout, where: str) -> None:
    if early := early_language(layout.stages("vision"), layout.stages("text")):
        last, first = early
        raise ConfigError(
            f"{where}: vision must be complete before the language model starts, but vit_pp_layers "
            f"{show(layout.vision)} has layers in stage {last} and llm_pp_layers {show(layout.text)} already in stage "
            f"{first} (counted from 0); move them"
        )


def _check_heads(model: Model, layout: Layout, where: str) -> None:
    tp, heads, kv = layout.tp, model.heads, model.kv_heads
    if kv % tp == 0:
        return
    if not layout.replicate_kv or tp < kv:
        more = "; with --cfg.replicate_kv true each rank gets a copy of the head it needs" if tp % kv == 0 else ""
        raise ConfigError(f"{where}.tp_size {tp} does not divide the {kv} key and value heads of the model{more}")
    if tp % kv or heads % tp:
        raise ConfigError(
            f"{where}.tp_size {tp} with copies of key and value heads must be a multiple of {kv} that divides the "
            f"{heads} heads"
        )


def _check_vision(model: Model, layout: Layout, where: str) -> None:
    tp = layout.tp_of("vision")
    if model.layers("vision") and model.vision_heads % tp:
        raise ConfigError(f"{where}: {tp} ranks do not divide the {model.vision_heads} heads of the vision tower")
    if layout.ranks % tp or layout.ranks % layout.tp:
        raise ConfigError(f"{where}: of tp_size {layout.tp} and vit_tp_size {tp} one must be a multiple of the other")


def _check_sizes(model: Model, layout: Layout, where: str) -> None:
    for rule in layout.rules(model):
        tp = layout.tp_of(rule.tower)
        for part in rule.parts if rule.axis is not None and rule.units == "ranks" else ():
            name = part.name.format(n=0)
            size = model.shapes[name][rule.axis or 0] if name in model.shapes else 0
            if not part.kv and size % tp:
                raise ConfigError(f"{where}: {tp} ranks do not divide axis {rule.axis} of {name}, {size} long")
