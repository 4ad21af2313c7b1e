"""The optimizer of a recipe: AdamW, how its learning rate goes over the run, and clipping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.training.recipe.section import Section, as_tuple, contradiction, one_or_more


class OptimSection(Section):
    """AdamW, its learning-rate schedule, and clipping."""

    lr: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(as_tuple)
    ] = Field(default=(0.9, 0.999), description="Decay of AdamW's first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of matrices; norms and biases (one axis) are not decayed.",
    )
    no_decay: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=(), description="More that is not decayed: parts, or patterns of names as in `model.freeze`."
    )
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Factors of the learning rate by part or pattern of names, such as `{vision: 0.1}`; where several "
        "match, the last one counts.",
    )
    clip: float | None = Field(
        default=1.0,
        gt=0,
        description="Largest norm of all gradients together, of the mean over tokens; null: no clipping.",
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Storage dtype of AdamW's two moments; they are updated in float32."
    )
    offload: bool = Field(
        default=False,
        description="Keep moments and master weights in the host's memory, and move them for the update of each "
        "parameter. On a CPU they are there anyway.",
    )
    loss_scale: float | None = Field(
        default=None,
        gt=0,
        description="float16 alone: the first factor of the loss, 65536 by default. It halves where the gradient "
        "overflows, and that step makes no update.",
    )
    loss_scale_window: int | None = Field(
        default=None, ge=1, description="float16 only: the factor doubles after this many updates, 2000 by default."
    )
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        default="cosine",
        description="How the learning rate falls after the warm-up; the formulas are transformers'. `constant` does "
        "not fall (with `warmup` it is transformers' constant_with_warmup); `inverse_sqrt` falls as one over the root "
        "of the step, whatever the number of steps; `wsd` (warm-up, stable, decay) stays at the peak and falls along a "
        "cosine in the last `decay` steps.",
    )
    warmup: int | float = Field(
        default=0, ge=0, description="Warm-up: a fraction of all steps when below 1, a number of steps otherwise."
    )
    decay: int | float | None = Field(
        default=None,
        gt=0,
        description="`schedule: wsd` alone: its last part, a fraction of all steps when below 1, a number of steps "
        "otherwise; by default 0.1.",
    )
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Learning rate at the end, as a fraction of `lr`.")

    @model_validator(mode="after")
    def _whole_steps(self) -> OptimSection:
        for name, length in (("warmup", self.warmup), ("decay", self.decay or 0)):
            if length >= 1 and length != int(length):
                raise contradiction(
                    f"optim.{name}: found {length}, allowed: a fraction of all steps below 1, or whole steps"
                )
        return self

    @model_validator(mode="after")
    def _of_its_schedule(self) -> OptimSection:
        if self.decay is not None and self.schedule != "wsd":
            raise contradiction(f"optim.decay has a meaning with optim.schedule wsd only, not {self.schedule}")
        if self.min_lr_ratio and self.schedule in ("constant", "inverse_sqrt"):
            raise contradiction(f"optim.min_lr_ratio has no meaning with optim.schedule {self.schedule}; remove it")
        return self
