"""A stage of a pipeline: the slice of the model's pieces that one rank runs between two messages.

What a stage hands on is one tensor: patch rows (P, D) until the vision tower has ended, then merged features (M, D)
until the language model begins, then hidden states (T, D); of a batch without media nothing before that. Each rank has
its own rows of them, which are those of the rank with the same place in the next stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from duetvl.core.boxes import Shape
from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.core.stages import Stages
from duetvl.models import vocabulary
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.inputs import ModelInput
from duetvl.models.qwen_vl.language import decoder_layers, place_features
from duetvl.models.qwen_vl.sharding import Tower, owner_of
from duetvl.models.qwen_vl.vision import VisionInput, merger, patch_embedding, vision_blocks

Tensor = Any


@dataclass(frozen=True)
class Stage:
    """Layers of the vision tower and of the language model; what of the rest of the model is done says their place.

    The tower has `depth` layers in the model, the language model `layers`.
    """

    number: int
    vision: range
    language: range
    depth: int
    layers: int

    @classmethod
    def of(cls, stages: Stages, number: int) -> Stage:
        """One of a model that is cut into stages."""
        depth, layers = stages.layers
        return cls(number, stages.of("vision", number), stages.of("language", number), depth, layers)

    @classmethod
    def whole(cls, config: ModelConfig) -> Stage:
        """All of a model."""
        return cls.of(Stages((config.vision.depth,), (config.text.num_layers,)), 0)

    @property
    def begins(self) -> bool:
        """Whether it takes pixels."""
        return bool(self.vision) and self.vision.start == 0

    @property
    def merges(self) -> bool:
        """Whether features come out of the vision tower here."""
        return bool(self.vision) and self.vision.stop == self.depth

    @property
    def embeds(self) -> bool:
        """Whether it takes tokens."""
        return bool(self.language) and self.language.start == 0

    @property
    def ends(self) -> bool:
        """Whether norm and vocabulary follow."""
        return bool(self.language) and self.language.stop == self.layers

    def has(self, path: str, tied: bool) -> bool:
        """Whether it uses the parameter of this path; `tied`: the embedding is the last product's matrix too."""
        if tied and self.ends and path.startswith("model.embed_tokens."):
            return True
        owner = owner_of(path)
        layers, last = (self.vision, self.depth) if owner.tower == "vision" else (self.language, self.layers)
        number = {"first": 0, "last": last - 1}.get(str(owner.layer), owner.layer)
        return number in layers

    def run(self, ops: Ops, config: ModelConfig, w: Weights, given: ModelInput, x: Tensor | None) -> Tensor | None:
        """What it hands on, from what the stage before it did; None: nothing, as of the vision tower without media."""
        if given.visual is not None and self.vision:
            x = self.see(ops, config, w, given.visual, x)
        if self.embeds:
            x = _embedded(ops, w, given, x)
        if self.language:
            x = decoder_layers(ops, config.text, w.model, given.tokens, self.language, x)
        return x

    def see(self, ops: Ops, config: ModelConfig, w: Weights, given: VisionInput, x: Tensor | None) -> Tensor:
        """Its part of the vision tower."""
        vision, visual = config.vision, w.visual
        if self.begins:
            x = patch_embedding(ops, vision, visual.patch_embed, given.pixels)
        x = vision_blocks(ops, vision, visual, given, self.vision, x)
        return merger(ops, vision, visual.merger, given, x) if self.merges else x

    def hands_on(self, config: ModelConfig, given: ModelInput) -> Shape | None:
        """The shape of what comes out of `run` on this rank, from the input alone."""
        if self.language.start > 0 or self.language:
            return given.sizes.rows, config.text.hidden_size
        if given.routes is None:
            return None
        if self.vision.stop == self.depth:
            return given.sizes.features, config.vision.out_hidden_size
        return (given.sizes.patches, config.vision.hidden_size) if self.vision.stop else None


StageFunction = Callable[
    [Stage, Tensor | None], Tensor
]  # (a stage of this rank, what the stage before it made) -> what it makes


Between = Callable[[Stage], Shape | None]


class Relay(Protocol):
    """How a pass without a tape goes through the stages of all ranks, one after the other, each of which calls this."""

    def __call__(
        self, first: Tower, last: Tower, run: StageFunction, x: Tensor | None, between: Between, end: Shape, dtype: str
    ) -> Tensor:
        """From x, which goes into the first stage with layers of `first`, what the last one of `last` makes, on every
        rank. `between` gives the shape of what a stage hands on, `end` that of the result, of this dtype like the rest.
        """
        ...


class AllHere:
    """The `Relay` of one rank that has the whole model."""

    def __init__(self, whole: Stage):
        self.whole = whole

    def __call__(
        self, first: Tower, last: Tower, run: StageFunction, x: Tensor | None, between: Between, end: Shape, dtype: str
    ) -> Tensor:
        """What the one stage makes of x."""
        return run(self.whole, x)


def _embedded(ops: Ops, w: Weights, given: ModelInput, features: Tensor | None) -> Tensor:
    """Hidden states (T, D) of tokens, some of which take features (M, D)."""
    x_TD = vocabulary.embed(ops, w.model.embed_tokens, given.ids)
    if given.routes is not None:
        assert features is not None, "the batch has tokens of pictures and no features for them"
        x_TD = place_features(ops, x_TD, given.routes.dst, given.routes.taken(ops, features))
    return given.tokens.rows.join(x_TD)
