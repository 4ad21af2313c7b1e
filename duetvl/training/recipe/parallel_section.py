"""The section `parallel` of a recipe: the degrees of parallelism, and the layers of each pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.core.mesh import AXES, Mesh
from duetvl.core.stages import early_language, nested
from duetvl.training.recipe.section import Section, as_tuple, contradiction


def _rows(value: Any) -> Any:
    rows = nested(value)
    return tuple(as_tuple(row) for row in rows) if isinstance(rows, list | tuple) else rows


StageLayers = Annotated[
    tuple[Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)], ...],
    Field(min_length=1),
    BeforeValidator(_rows),
]


class ParallelSection(Section):
    """Degrees of parallelism; their product is the number of processes, see [many_ranks.md](many_ranks.md).

    Layers are placed in MindSpeed-MM's notation: one number for each pipeline stage, `[1, 10, 10, 7]`, or, with virtual
    stages, one row of numbers for each, `[[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]]`. Stages run row by row, from left
    to right. The vision tower comes before the language model; a stage may have the end of one and the start of the
    other, or layers of only one.
    """

    pp: int = Field(
        default=1, ge=1, description="Pipeline parallelism: number of ranks that the layers are divided over."
    )
    dp: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1,
        description="Data parallelism: number of replicas that the samples of a step are divided over; auto: as many "
        "as the number of processes allows. It does not change the result.",
    )
    cp: int = Field(
        default=1,
        ge=1,
        description="Context parallelism: number of ranks that the tokens of each micro-batch are divided over.",
    )
    tp: int = Field(
        default=1, ge=1, description="Tensor parallelism: number of ranks that every layer is divided over."
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallelism: divide norms and residuals along the sequence over the tensor-parallel "
        "ranks; no effect with `tp: 1`.",
    )
    vision: Literal["divide", "shard"] = Field(
        default="divide",
        description="How the tensor-parallel ranks share the vision tower: `divide` the pictures and frames, with all "
        "of the tower's weights on each rank, or `shard` its layers.",
    )
    cp_algorithm: Literal["ulysses", "ring", "hybrid"] = Field(
        default="ulysses",
        description="How attention works on a sequence that `cp` divides: `ulysses` exchanges heads, `ring` passes "
        "keys and values around a ring of ranks, `hybrid` exchanges heads within groups and uses a ring between them.",
    )
    ulysses: int | None = Field(
        default=None,
        ge=1,
        description="With `cp_algorithm: hybrid`, the number of ranks that exchange heads with each other, a divisor "
        "of `cp`; null: as many as the model's heads allow.",
    )
    zero: Literal[1, 3] = Field(
        default=1,
        description="What is divided over ranks that would otherwise hold the same weights. 1: optimizer state and "
        "updates. 3: also the weights and gradients of all blocks, which are gathered when a block runs; this needs "
        "`train.recompute: full` and `pp: 1`.",
    )
    vision_layers: StageLayers | None = Field(
        default=None,
        description="Number of vision layers in each stage; null: all in the first stage. It may have fewer rows than "
        "`language_layers`.",
    )
    language_layers: StageLayers | None = Field(
        default=None,
        description="Number of language-model layers in each stage; null: divided evenly over the stages, starting "
        "with the last one that has vision layers.",
    )

    @model_validator(mode="after")
    def _teams(self) -> ParallelSection:
        if self.ulysses is None:
            return self
        if self.cp_algorithm != "hybrid":
            raise contradiction(
                f"parallel.ulysses {self.ulysses} is for parallel.cp_algorithm hybrid, which is {self.cp_algorithm}; "
                f"give parallel.cp_algorithm=hybrid, or parallel.ulysses=null"
            )
        if self.cp % self.ulysses:
            possible = ", ".join(str(n) for n in range(1, self.cp + 1) if self.cp % n == 0)
            raise contradiction(
                f"parallel.ulysses {self.ulysses} does not divide parallel.cp {self.cp}; possible are {possible}"
            )
        return self

    @model_validator(mode="after")
    def _gathered(self) -> ParallelSection:
        if self.zero == 3 and self.pp > 1:
            raise contradiction(
                f"parallel.zero 3 cannot be combined with a pipeline, and parallel.pp is {self.pp}: give parallel.pp=1 "
                f"and more of dp, cp or tp, or parallel.zero=1"
            )
        return self

    @model_validator(mode="after")
    def _placed(self) -> ParallelSection:
        vision, language = self.vision_layers, self.language_layers
        for name, rows in (("vision_layers", vision), ("language_layers", language)):
            wrong = [row for row in rows or () if len(row) != self.pp]
            if wrong:
                raise contradiction(
                    f"parallel.{name} {list(wrong[0])} has {len(wrong[0])} stages, parallel.pp is {self.pp}; give one "
                    f"number for each stage, or parallel.{name}=null for the default"
                )
            if rows and not any(map(sum, rows)):
                raise contradiction(f"parallel.{name} places no layer at all")
        if vision and language:
            self._check_order(vision, language)
        return self

    def _check_order(self, vision: Sequence[Sequence[int]], language: Sequence[Sequence[int]]) -> None:
        if len(vision) > len(language):
            raise contradiction(
                f"parallel.vision_layers has {len(vision)} virtual stages, parallel.language_layers {len(language)}; "
                f"give both as many rows"
            )
        if early := early_language(list(chain(*vision)), list(chain(*language))):
            last, first = early
            raise contradiction(
                f"parallel.vision_layers puts vision layers on stage {last}, after parallel.language_layers has begun "
                f"on stage {first}; the whole vision tower comes before the language model"
            )

    @property
    def virtual(self) -> int:
        """Virtual stages on each pipeline rank."""
        return len(self.language_layers or self.vision_layers or ((),))

    @property
    def mesh(self) -> Mesh:
        """The grid of ranks; with `dp: auto`, one replica, as the number of processes is not known yet."""
        degrees = {axis: getattr(self, axis) for axis in AXES}
        return Mesh(**{axis: 1 if degree == "auto" else degree for axis, degree in degrees.items()})
