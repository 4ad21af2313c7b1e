"""A recipe: its sections, every field with its type, its bounds and what it means, and what they exclude together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.core.backend import check_name
from duetvl.core.errors import BackendError
from duetvl.models.qwen_vl.parameters import PARTS
from duetvl.models.recompute import RecomputeMode
from duetvl.training.recipe.data_section import DataSection
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.recipe.parallel_section import ParallelSection
from duetvl.training.recipe.section import Place, Section, as_tuple, contradiction, one_or_more


class ModelSection(Section):
    """Which model is trained, and which of its parts."""

    path: Place = Field(
        min_length=1,
        description="Directory of the model in the Hugging Face layout, or its id, which is fetched: "
        "`Qwen/Qwen2.5-VL-7B-Instruct` from Hugging Face, `modelscope:Qwen/Qwen2.5-VL-7B-Instruct` from ModelScope. Or "
        "a run (`runs/x`, `runs/x@1200`), an adapter (which is merged as it is read), a MindSpeed-MM directory.",
    )
    base: Place | None = Field(
        default=None,
        min_length=1,
        description="The model in the Hugging Face layout that configuration and tokenizer come from where `path` is a "
        "MindSpeed-MM directory; below a run or an adapter, where what it names is not there any more.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Storage dtype of the weights. With bfloat16 and float16 the optimizer keeps float32 master "
        "weights; float16 is trained with a scaled loss (`optim.loss_scale`).",
    )
    freeze: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=(),
        description="What is not trained: vision (the tower), projector (its merger), language, or patterns of names "
        "such as `model.layers.0-7`, `visual.blocks.*.attn` or `*norm*`.",
    )

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if set(self.freeze) >= set(PARTS):
            raise contradiction(f"model.freeze names every part ({', '.join(PARTS)}): nothing would be trained")
        return self


class TrainSection(Section):
    """How long a run is, and where it is kept."""

    output_dir: Place = Field(
        default="runs/{recipe}",
        min_length=1,
        description="Run directory: recipe, checkpoints, metrics, plot. `{recipe}` stands for the recipe's file name.",
    )
    global_batch: int = Field(
        default=8, ge=1, description="Samples in one optimizer step, whatever the split into micro-batches."
    )
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; instead of `epochs`.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=10**9,
        description="Passes over the data; 1 where `steps` is not given either. Rounded up to whole steps: the last "
        "step is filled from the next epoch's order.",
    )
    loss: Literal["token", "micro_batch", "sample"] = Field(
        default="token",
        description="What the tokens' losses are averaged over: all trained tokens of the step, the tokens of each "
        "micro-batch and then the micro-batches (as transformers does), or the tokens of each sample and then the "
        "samples.",
    )
    recompute: RecomputeMode = Field(
        default="none",
        description="What is computed again in the backward pass instead of being kept: nothing; every block, in "
        "both towers or in one; or (selective) the MLPs, while attention is kept. It changes memory and time alone.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A loss or gradient that is not a finite number ends the run, or the step makes no update and the "
        "run continues; the step's samples are named in both cases.",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Evaluate `data.val` every N steps; it is always evaluated at the end."
    )
    eval_first: bool = Field(
        default=False, description="Evaluate `data.val` before the first step too: what the model can do untrained."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="End the run, as at its last step, after this many evaluations in a row without a lower eval_loss "
        "than the lowest so far; null: train all steps.",
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
                f"train.steps {self.steps} and train.epochs {self.epochs:g} both say how long to train; keep one"
            )
        return self


class LoraSection(Section):
    """Low-rank adapters (Hu et al., arXiv:2106.09685) in the place of training the weights themselves.

    The section's presence is the switch: `lora: {}`, or `lora:` with nothing below it, takes all defaults.
    """

    rank: int = Field(default=8, ge=1, description="Rank of every adapter.")
    alpha: float = Field(default=16.0, gt=0, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of an adapter's input.")
    targets: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        default=("language",),
        min_length=1,
        description="Which linear layers get one: vision, projector, language (all of that part), a module's last name "
        "such as q_proj, or a pattern of full names such as `model.layers.*.mlp.*`.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732).")
    dora: bool = Field(default=False, description="Train magnitudes beside directions (arXiv:2402.09353).")
    adapter: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory of an adapter (PEFT's layout) to start from. It brings its rank, alpha, layers, rslora "
        "and dora.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> LoraSection:
        own = ("rank", "alpha", "targets", "rslora", "dora")
        given = [f"lora.{name}" for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if self.adapter is not None and given:
            raise contradiction(
                f"lora.adapter {self.adapter} brings its own rank, alpha, layers, rslora and dora; remove "
                f"{', '.join(given)}"
            )
        return self


class DpoSection(Section):
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290) of pairs of answers.

    The section's presence is the switch: `dpo: {}`, or `dpo:` with nothing below it, takes all defaults.
    """

    loss: Literal["sigmoid", "hinge", "ipo", "ipo_sum"] = Field(
        default="sigmoid",
        description="`ipo` takes the mean log-probability of an answer's tokens, as TRL and LLaMA-Factory do; "
        "`ipo_sum` their sum, as in the paper.",
    )
    beta: float = Field(default=0.1, gt=0, description="Strength of the pull towards the reference.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs taken to be labelled wrongly (conservative DPO)."
    )
    pref_ftx: float = Field(default=0.0, ge=0, description="Weight of the chosen answer's cross-entropy.")
    reference: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory or id of the reference model, or whatever else `model.path` may be; by default "
        "`model.path`, with LoRA the model without its adapter.",
    )
    reference_base: Place | None = Field(default=None, min_length=1, description="As `model.base`, of `reference`.")
    cache: Place | None = Field(
        default=None,
        min_length=1,
        description="Directory that keeps the reference's log-probabilities: computed once, the reference is not held.",
    )

    @model_validator(mode="after")
    def _smoothable(self) -> DpoSection:
        if self.label_smoothing and self.loss != "sigmoid":
            raise contradiction(f"dpo.label_smoothing has a meaning with dpo.loss sigmoid only, not {self.loss}")
        return self


class CheckpointSection(Section):
    """What is saved, and when. The last step is always saved, and the one before an error or a signal."""

    every: int | None = Field(default=500, ge=1, description="Save a checkpoint every N steps; null: do not.")
    minutes: float | None = Field(
        default=30.0, gt=0, description="Also save one when the last is this many minutes old; null: do not."
    )
    keep_last: int | None = Field(
        default=2, ge=1, description="How many checkpoints are kept, older ones are removed; null: all."
    )
    keep_best: Literal["eval_loss"] | None = Field(
        default=None,
        description="Save whenever an evaluation has the lowest eval_loss so far, and keep that checkpoint beside the "
        "`keep_last` newest until there is a better one; `RUN@best` is its name where a run is read.",
    )
    background: bool = Field(
        default=False,
        description="Write in a thread while training continues. Takes host memory of one checkpoint's size meanwhile.",
    )
    grace: float | None = Field(
        default=None,
        gt=0,
        description="Seconds between a scheduler's SIGTERM and its SIGKILL. A step that has not ended after half of "
        "them is given up between two micro-batches, so that there is time to save; null: it is always finished.",
    )
    export: bool | Literal["merged", "mindspeed_mm"] = Field(
        default=False,
        description="At the end, write the model to `export/`: `true` in the Hugging Face layout, `mindspeed_mm` as a "
        "MindSpeed-MM release of one stage and rank (`mm-convert ... resplit` divides it further). Of a LoRA run "
        "`true` writes the adapter alone, in PEFT's layout; `merged` the merged model in the Hugging Face layout, as "
        "`mindspeed_mm` does in its own.",
    )


class LogSection(Section):
    """What is shown. `metrics.jsonl` gets every step in any case."""

    every: int = Field(default=1, ge=1, description="Print a line every N steps, where no progress bar is shown.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events to `tensorboard/`.")
    wandb: str | None = Field(
        default=None, min_length=1, description="Project of Weights & Biases that gets the run (the extra `wandb`)."
    )
    swanlab: str | None = Field(
        default=None, min_length=1, description="Project of SwanLab that gets the run (the extra `swanlab`)."
    )
    generate: int = Field(
        default=0,
        ge=0,
        description="At every evaluation, answer this many validation samples; see `samples.jsonl` and TensorBoard.",
    )
    generate_tokens: int = Field(default=64, ge=1, description="Most tokens of such an answer.")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="What the device can do, in 1e12 operations a second, for the utilisation `mfu`; by default what "
        "is known of it, and no `mfu` where nothing is.",
    )
    profile: Annotated[tuple[int, int] | None, BeforeValidator(as_tuple)] = Field(
        default=None, description="First and last step to record; the trace goes to `profile/`."
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
    """Benchmarks that the model in training is asked as the run goes on; docs/evaluation.md describes them.

    Validation loss has its own fields: `data.val` and `train.eval_every`.
    """

    tasks: dict[str, Place] = Field(
        default={}, description="Benchmarks and their data: `{ai2d_test: data/AI2D_TEST.tsv}`; also a task's YAML file."
    )
    every: int = Field(default=500, ge=1, description="Ask them every N steps, and after the last one.")
    limit: int | None = Field(default=None, ge=1, description="The first N questions of each; null: all.")
    profile: str | None = Field(
        default=None, min_length=1, description="Prompt profile; by default that of the model's family."
    )
    min_pixels: int | None = Field(default=None, ge=1, description="Pixels of a picture, instead of the profile's.")
    max_pixels: int | None = Field(default=None, ge=1, description="The same, at most.")
    max_new_tokens: int = Field(default=64, ge=1, description="Most tokens of an answer.")
    at_once: int = Field(default=16, ge=1, description="Answers that grow together; each needs room beside training.")


class BackendSection(Section):
    """The framework and the device. `--backend`, `--device` and DUETVL_BACKEND on the command line come first."""

    name: str = Field(
        default="auto",
        min_length=1,
        description="torch_npu (or torch), mindspore, a registered one, or auto for the framework that is installed: "
        "PyTorch where both are.",
    )
    device: str = Field(
        default="auto", min_length=1, description="cpu, cuda, npu (ascend), or auto for the best that is there."
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

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.checkpoint.export == "merged" and self.lora is None:
            raise contradiction("checkpoint.export merged has a meaning with lora only; use true")
        for name in ("loss_scale", "loss_scale_window"):
            if getattr(self.optim, name) is not None and self.model.dtype != "float16":
                raise contradiction(f"optim.{name} has a meaning with model.dtype float16 only, not {self.model.dtype}")
        if self.parallel.zero == 3 and self.train.recompute != "full":
            raise contradiction(
                f"parallel.zero 3 gathers each block's weights again in the backward pass, where train.recompute full "
                f"runs it again, and train.recompute is {self.train.recompute}; give train.recompute=full"
            )
        if self.data.streaming and self.train.steps is None:
            raise contradiction("data.streaming does not know how many records there are: give train.steps")
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
                f"train.loss {self.train.loss} has no meaning with dpo, whose loss is a mean over pairs"
            )
        if self.data.train_on_prompt:
            raise contradiction("data.train_on_prompt has no meaning with dpo, which compares answers to one prompt")
        if self.lora is not None and self.lora.dropout:
            raise contradiction(
                f"lora.dropout {self.lora.dropout:g} with dpo would compare a thinned model with a whole reference; "
                f"leave it at 0"
            )
        if self.dpo.cache is not None and self.data.streaming:
            raise contradiction("dpo.cache reads all pairs before the first step, data.streaming never; keep one")
        return self
