"""The section `optim` of a recipe: AdamW, its learning-rate schedule, and clipping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.training.recipe.section import Section, as_tuple, contradiction, one_or_more


class OptimSection(Section):
    """AdamW, its learning-rate schedule, and clipping."""

    lr: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(as_tuple)
    ] = Field(default=(0.9, 0.999), description="AdamW's decay rates of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of matrices; norms and biases (one axis) are never decayed.",
    )
    no_decay: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=(), description="Further parameters without decay: parts, or patterns of names as in `model.freeze`."
    )
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Factors of the learning rate by part or pattern of names, such as `{vision: 0.1}`; if several "
        "match, the last one counts.",
    )
    clip: float | None = Field(
        default=1.0,
        gt=0,
        description="Clip the global gradient norm (of the averaged gradient) to this; null: no clipping.",
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Storage dtype of AdamW's two moments; they are updated in float32."
    )
    offload: bool = Field(
        default=False,
        description="Keep moments and master weights in host memory, and move those of one parameter at a time for "
        "its update. No effect on a CPU.",
    )
    loss_scale: float | None = Field(
        default=None,
        gt=0,
        description="float16 only: the initial loss scale, 65536 by default. It halves when a gradient overflows, and "
        "that step makes no update.",
    )
    loss_scale_window: int | None = Field(
        default=None, ge=1, description="float16 only: the loss scale doubles after this many updates, 2000 by default."
    )
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        default="cosine",
        description="Learning-rate schedule after the warm-up, with transformers' formulas. `constant` stays at the "
        "peak (with `warmup` it is transformers' constant_with_warmup); `inverse_sqrt` decays as one over the square "
        "root of the step, independent of the number of steps; `wsd` (warm-up, stable, decay) stays at the peak and "
        "decays along a cosine over the last `decay` steps.",
    )
    warmup: int | float = Field(
        default=0, ge=0, description="Warm-up: a fraction of all steps when below 1, a number of steps otherwise."
    )
    decay: int | float | None = Field(
        default=None,
        gt=0,
        description="`schedule: wsd` only: length of the decay, a fraction of all steps when below 1, a number of "
        "steps otherwise; 0.1 by default.",
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
            raise contradiction(f"optim.decay applies to optim.schedule wsd only, not to {self.schedule}")
        if self.min_lr_ratio and self.schedule in ("constant", "inverse_sqrt"):
            raise contradiction(f"optim.min_lr_ratio does not apply to optim.schedule {self.schedule}; remove it")
        return self
