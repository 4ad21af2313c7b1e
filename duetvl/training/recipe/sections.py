"""A recipe: its sections, every field with its type, its bounds and what it means, and what they exclude together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.core.backend import check_name
from duetvl.core.errors import BackendError
from duetvl.models.recompute import RecomputeMode
from duetvl.training.recipe.data_section import DataSection
from duetvl.training.recipe.model_section import FROZEN, ModelSection
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.recipe.parallel_section import ParallelSection
from duetvl.training.recipe.section import Place, Section, as_tuple, contradiction, one_or_more


class TrainSection(Section):
    """The length of the run, its batch and loss, evaluation, and the run directory."""

    output_dir: Place = Field(
        default="runs/{recipe}",
        min_length=1,
        description="Run directory: recipe, checkpoints, metrics, plot. `{recipe}` stands for the recipe's file name.",
    )
    global_batch: int = Field(
        default=8, ge=1, description="Samples in one optimizer step, however it is split into micro-batches."
    )
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; instead of `epochs`.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=10**9,
        description="Passes over the data; 1 if `steps` is not given either. Rounded up to whole steps: the last step "
        "is filled with samples of the next epoch.",
    )
    loss: Literal["token", "micro_batch", "sample"] = Field(
        default="token",
        description="How token losses are averaged: over all trained tokens of the step; over the tokens of each "
        "micro-batch, then over the micro-batches (as in transformers); or over the tokens of each sample, then over "
        "the samples.",
    )
    recompute: RecomputeMode = Field(
        default="none",
        description="What is recomputed in the backward pass instead of being stored: nothing; every block (full), or "
        "the blocks of one tower; or only the MLPs (selective). It affects memory and time, not the result.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="After a non-finite loss or gradient: end the run, or make no update in this step and continue. "
        "Both name the step's samples.",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Evaluate `data.val` every N steps; it is always evaluated at the end."
    )
    eval_first: bool = Field(
        default=False, description="Also evaluate `data.val` before the first step, as a baseline."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop early after this many evaluations in a row without a new lowest eval_loss, with checkpoint "
        "and export as after the last step; null: train all steps.",
    )

    @model_validator(mode="after")
    def _patient_between_evaluations(self) -> TrainSection:
        if self.patience is not None and self.eval_every is None:
            raise contradiction(f"train.patience {self.patience} counts evaluations: give train.eval_every")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps is not None and self.epochs is not None:
            raise contradiction(
                f"train.steps {self.steps} and train.epochs {self.epochs:g} both set the length of training; keep one"
            )
        return self


class LoraSection(Section):
    """Low-rank adapters (Hu et al., arXiv:2106.09685), trained instead of the weights themselves.

    The section's presence switches LoRA on: `lora: {}`, or `lora:` with nothing below it, uses the defaults.
    """

    rank: int = Field(default=8, ge=1, description="Rank of every adapter.")
    alpha: float = Field(default=16.0, gt=0, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of an adapter's input.")
    targets: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=("language",),
        min_length=1,
        description="Which linear layers get an adapter: vision, projector, language (all layers of that part), the "
        "last component of a module's name such as q_proj, or a pattern of full names such as "
        "`model.layers.*.mlp.*`.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732).")
    dora: bool = Field(default=False, description="Train magnitudes as well as directions (arXiv:2402.09353).")
    adapter: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory of an adapter (PEFT's layout) to start from. Its own rank, alpha, layers, rslora and "
        "dora apply.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> LoraSection:
        own = ("rank", "alpha", "targets", "rslora", "dora")
        given = [f"lora.{name}" for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if self.adapter is not None and given:
            raise contradiction(
                f"lora.adapter {self.adapter} has its own rank, alpha, layers, rslora and dora; remove "
                f"{', '.join(given)}"
            )
        return self


class DpoSection(Section):
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290) on pairs of answers.

    The section's presence switches DPO on: `dpo: {}`, or `dpo:` with nothing below it, uses the defaults.
    """

    loss: Literal["sigmoid", "hinge", "ipo", "ipo_sum"] = Field(
        default="sigmoid",
        description="`ipo` uses the mean log-probability of an answer's tokens, as TRL and LLaMA-Factory do; "
        "`ipo_sum` uses their sum, as in the paper.",
    )
    beta: float = Field(default=0.1, gt=0, description="How strongly the policy is kept near the reference.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Assumed share of pairs with swapped labels (conservative DPO)."
    )
    pref_ftx: float = Field(default=0.0, ge=0, description="Weight of the chosen answer's cross-entropy.")
    reference: Place | None = Field(
        default=None,
        min_length=1,
        description="The reference model: anything that `model.path` accepts. By default `model.path` itself; with "
        "LoRA the model without its adapter.",
    )
    reference_base: Place | None = Field(default=None, min_length=1, description="As `model.base`, for `reference`.")
    cache: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory for the reference's log-probabilities: they are computed once, before training, and "
        "the reference model is not kept in memory.",
    )

    @model_validator(mode="after")
    def _smoothable(self) -> DpoSection:
        if self.label_smoothing and self.loss != "sigmoid":
            raise contradiction(f"dpo.label_smoothing applies to dpo.loss sigmoid only, not to {self.loss}")
        return self


class CheckpointSection(Section):
    """What is saved, and when. The last step is always saved, and so is the last step before an error or a signal."""

    every: int | None = Field(default=500, ge=1, description="Save a checkpoint every N steps; null: do not.")
    minutes: float | None = Field(
        default=30.0, gt=0, description="Also save when the last checkpoint is this many minutes old; null: do not."
    )
    keep_last: int | None = Field(
        default=2, ge=1, description="How many checkpoints to keep; older ones are removed. null: all."
    )
    keep_best: Literal["eval_loss"] | None = Field(
        default=None,
        description="Also save whenever an evaluation has the lowest eval_loss so far, and keep that checkpoint, "
        "besides the `keep_last` newest, until there is a better one. `RUN@best` selects it.",
    )
    save_only_model: bool = Field(
        default=False,
        description="Save only the weights, without optimizer state: a third of the size in float32, a seventh in "
        "bfloat16. They can be exported, merged and trained from (`model.path`), but a run cannot be resumed from "
        "them.",
    )
    background: bool = Field(
        default=False,
        description="Write in a thread while training continues. Needs host memory of one checkpoint's size.",
    )
    grace: float | None = Field(
        default=None,
        gt=0,
        description="Seconds between the scheduler's SIGTERM and its SIGKILL. A step that has not ended after half of "
        "them is abandoned between two micro-batches, so that there is time to save; null: finish the step.",
    )
    export: bool | Literal["merged", "mindspeed_mm"] = Field(
        default=False,
        description="At the end, write the model to `export/`: `true` in the Hugging Face layout, `mindspeed_mm` as a "
        "MindSpeed-MM release of one stage and rank (`mm-convert ... resplit` divides it further). For a LoRA run, "
        "`true` writes only the adapter, in PEFT's layout; `merged` writes the merged model in the Hugging Face "
        "layout, and `mindspeed_mm` the merged model in its own. A model has the dtype that the `config.json` of "
        "`model.path` names.",
    )


class LogSection(Section):
    """What is logged. `metrics.jsonl` always gets every step."""

    every: int = Field(default=1, ge=1, description="Print a line every N steps, if no progress bar is shown.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events to `tensorboard/`.")
    wandb: str | None = Field(
        default=None, min_length=1, description="Weights & Biases project to log to (needs the extra `wandb`)."
    )
    swanlab: str | None = Field(
        default=None, min_length=1, description="SwanLab project to log to (needs the extra `swanlab`)."
    )
    generate: int = Field(
        default=0,
        ge=0,
        description="At every evaluation, generate answers to this many validation samples, for `samples.jsonl` and "
        "TensorBoard.",
    )
    generate_tokens: int = Field(default=64, ge=1, description="Maximum number of tokens of such an answer.")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak of the device in TFLOP/s, for the utilisation `mfu`; by default from a table of known "
        "devices. Without either there is no `mfu`.",
    )
    profile: Annotated[tuple[int, int] | None, BeforeValidator(as_tuple)] = Field(
        default=None, description="First and last step to profile; the trace goes to `profile/`."
    )
    plot: bool = Field(default=True, description="Draw `loss.png` at every checkpoint and evaluation, and at the end.")

    @model_validator(mode="after")
    def _steps_in_order(self) -> LogSection:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise contradiction(
                f"log.profile: found {list(self.profile)}, allowed: [first, last], two steps counted from 1"
            )
        return self


class EvalSection(Section):
    """Benchmarks on which the model is scored during training; see [evaluation.md](evaluation.md#while-training).

    Validation loss has its own fields: `data.val` and `train.eval_every`.
    """

    tasks: dict[str, Place] = Field(
        default={},
        description="Benchmarks and their data: `{ai2d_test: data/AI2D_TEST.tsv}`. A key may also be the YAML file "
        "of a task of your own.",
    )
    every: int = Field(default=500, ge=1, description="Run them every N steps, and after the last one.")
    limit: int | None = Field(default=None, ge=1, description="Use only the first N questions of each; null: all.")
    profile: str | None = Field(
        default=None, min_length=1, description="Prompt profile; by default that of the model's family."
    )
    min_pixels: int | None = Field(
        default=None, ge=1, description="Minimum number of pixels of a picture, instead of the profile's."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Maximum number of pixels of a picture, instead of the profile's."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Maximum number of tokens of an answer.")
    at_once: int = Field(
        default=16, ge=1, description="Answers generated in parallel; each takes memory besides training's."
    )


class BackendSection(Section):
    """The framework and the device. `--backend`, `--device` and DUETVL_BACKEND override these fields."""

    name: str = Field(
        default="auto",
        min_length=1,
        description="torch_npu (or torch), mindspore, the name of a plug-in, or auto: the framework that is installed, "
        "PyTorch if both are.",
    )
    device: str = Field(
        default="auto", min_length=1, description="cpu, cuda, npu (ascend), or auto for the best available device."
    )

    @model_validator(mode="after")
    def _known_name(self) -> BackendSection:
        try:
            check_name(self.name)
        except BackendError as error:
            raise contradiction(f"backend.name: {error}") from None
        return self


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    lora: LoraSection | None = None
    dpo: DpoSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()
    backend: BackendSection = BackendSection()

    @model_validator(mode="before")
    @classmethod
    def _adapters_where_targets_say(cls, values: Any) -> Any:
        """With `lora` the default of `model.freeze` is nothing: it would take adapters away that are asked for."""
        model = values.get("model") if isinstance(values, Mapping) and values.get("lora") is not None else None
        if isinstance(model, Mapping) and "freeze" not in model:
            return {**values, "model": {**model, "freeze": []}}
        return values

    @model_validator(mode="after")
    def _rates_of_what_is_trained(self) -> Recipe:
        if "freeze" not in self.model.model_fields_set:
            for name in self.optim.lr_scale:
                if name in FROZEN or name.startswith("visual"):
                    raise contradiction(
                        f"optim.lr_scale names {name!r}, which is frozen where model.freeze is not given: give it "
                        f"({', '.join(FROZEN)} by default) without what is to be trained, or [] to train all"
                    )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.checkpoint.export == "merged" and self.lora is None:
            raise contradiction("checkpoint.export merged applies to lora only; use true")
        for name in ("loss_scale", "loss_scale_window"):
            if getattr(self.optim, name) is not None and self.model.dtype not in ("float16", "auto"):
                raise contradiction(f"optim.{name} applies to model.dtype float16 only, not to {self.model.dtype}")
        if self.parallel.zero == 3 and self.train.recompute != "full":
            raise contradiction(
                f"parallel.zero 3 needs train.recompute full, found {self.train.recompute}: a block's weights are "
                f"gathered again for its recomputation; give train.recompute=full"
            )
        if self.data.streaming and self.train.steps is None:
            raise contradiction("data.streaming does not know the number of records: give train.steps")
        if self.train.eval_every is not None and not (self.data.val or self.data.val_rate):
            raise contradiction(
                f"train.eval_every {self.train.eval_every} needs data.val or data.val_rate, and neither is given"
            )
        if self.checkpoint.keep_best and self.train.eval_every is None:
            raise contradiction(f"checkpoint.keep_best {self.checkpoint.keep_best} needs train.eval_every")
        if self.train.eval_first and not (self.data.val or self.data.val_rate):
            raise contradiction("train.eval_first needs data.val or data.val_rate, and neither is given")
        if self.log.generate and not (self.data.val or self.data.val_rate):
            raise contradiction(
                f"log.generate {self.log.generate} needs data.val or data.val_rate, and neither is given"
            )
        if self.log.generate and self.data.train_on_prompt:
            raise contradiction(
                "log.generate cannot tell where an answer begins with data.train_on_prompt; keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _preferences(self) -> Recipe:
        if self.dpo is None:
            return self
        if self.train.loss != "token":
            raise contradiction(
                f"train.loss {self.train.loss} does not apply to dpo, whose loss is a mean over pairs; remove it"
            )
        if self.data.train_on_prompt:
            raise contradiction(
                "data.train_on_prompt does not apply to dpo, which compares answers to the same prompt; remove it"
            )
        if self.lora is not None and self.lora.dropout:
            raise contradiction(
                f"lora.dropout {self.lora.dropout:g} does not apply to dpo: the policy would have dropout and the "
                f"reference none; set it to 0"
            )
        if self.dpo.cache is not None and self.data.streaming:
            raise contradiction("dpo.cache reads all pairs before the first step and cannot use a stream; remove one")
        return self
