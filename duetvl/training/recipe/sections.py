"""The sections of a recipe: every field with its type, its bounds and what it means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from duetvl.core.backend import check_name
from duetvl.core.errors import BackendError, did_you_mean
from duetvl.core.mesh import AXES, Mesh
from duetvl.core.stages import early_language, nested
from duetvl.data.formats.messages import TAGS
from duetvl.data.formats.reading import COLUMNS
from duetvl.models.qwen_vl.parameters import PARTS
from duetvl.models.recompute import RecomputeMode


def _as_tuple(value: Any) -> Any:
    """Lists are what YAML has."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    """`x` stands for `[x]`, and null for `[]`."""
    return () if value is None else (value,) if isinstance(value, str) else _as_tuple(value)


Fraction = Annotated[float, Field(ge=0, le=1)]


def _contradiction(message: str) -> PydanticCustomError:
    """An error about several fields together, which names them itself."""
    return PydanticCustomError("contradiction", "{message}", {"message": message})


class Section(BaseModel):
    """A part of a recipe: typed strictly, without other fields, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model is trained, and which of its parts."""

    path: str = Field(
        min_length=1,
        description="Directory of the model in the Hugging Face layout, or its id, which is fetched: "
        "`Qwen/Qwen2.5-VL-7B-Instruct` from Hugging Face, `modelscope:Qwen/Qwen2.5-VL-7B-Instruct` from ModelScope.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Storage dtype of the weights. With bfloat16 and float16 the optimizer keeps float32 master "
        "weights; float16 is trained with a scaled loss (`optim.loss_scale`).",
    )
    freeze: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        default=(),
        description="What is not trained: vision (the tower), projector (its merger), language, or patterns of names "
        "such as `model.layers.0-7`, `visual.blocks.*.attn` or `*norm*`.",
    )

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if set(self.freeze) >= set(PARTS):
            raise _contradiction(f"model.freeze names every part ({', '.join(PARTS)}): nothing would be trained")
        return self


class DataSource(Section):
    """One set of records. A text in the place of one is its `path`."""

    path: str = Field(
        min_length=1,
        description="File (JSON, JSONL, Parquet, TSV, tar shard), pattern of files, or `dataset_info.json:NAME`.",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "llava", "qwen", "swift", "preference"] = Field(
        default="auto", description="Layout of the records."
    )
    weight: float = Field(
        default=1.0, ge=1e-6, description="How often an epoch sees each record: 2 twice, 0.5 every other one."
    )
    max_samples: int | None = Field(default=None, ge=1, description="Only so many records, chosen by `data.seed`.")
    image_root: str | None = Field(default=None, description="Replaces `data.image_root` for this set.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Names of the record's keys, as in LLaMA-Factory's dataset_info.json."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Names of roles and their keys, as there.")
    boxes: Literal["as_written", "pixels", "norm1000"] = Field(
        default="as_written",
        description="What coordinates written in texts (`bbox_2d`, `point_2d`, `<|box_start|>`) are: left alone, "
        "pixels of the picture's file, or thousandths of its sides; the latter two are brought to what the family "
        "expects.",
    )

    @model_validator(mode="after")
    def _known_names(self) -> DataSource:
        for field, given, known in (("columns", self.columns, COLUMNS), ("tags", self.tags, TAGS)):
            for name in given:
                if name not in known:
                    raise _contradiction(f"{self.path}: {field} has no {name!r}{did_you_mean(name, known)}")
        return self


def _sources(value: Any) -> Any:
    """`x` stands for `[x]`, a text for a source of that path, and null for `[]`."""
    listed = () if value is None else value if isinstance(value, list | tuple) else (value,)
    return tuple({"path": item} if isinstance(item, str) else item for item in listed)


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_sources)]


class DataSection(Section):
    """Records, how they are encoded, and how they are laid into micro-batches."""

    train: Sources = Field(min_length=1, description="The data sets to train on.")
    val: Sources = Field(default=(), description="The same for evaluation; none by default.")
    val_rate: float | None = Field(
        default=None, gt=0, lt=1, description="Instead of `val`: the share of the training records to keep for it."
    )
    val_max_samples: int | None = Field(default=None, ge=1, description="Evaluate only so many records.")
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Train only on the first so many records of all sets together; `max_samples` of a set chooses "
        "among its records by `data.seed`.",
    )
    image_root: str | None = Field(
        default=None,
        description="Directory that relative paths of media start from; by default they are looked for beside the data "
        "file, then in the working directory.",
    )
    train_on_prompt: bool = Field(
        default=False, description="Train the prompts as well, placeholders of media included, as LLaMA-Factory does."
    )
    mask_history: bool = Field(default=False, description="Train only the last answer of a conversation.")
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Images with fewer pixels are enlarged; by default what the model directory says.",
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Images with more pixels are reduced; by default what the model directory says."
    )
    resize: Literal["once", "llamafactory"] = Field(
        default="once",
        description="`llamafactory` resizes twice as LLaMA-Factory does, for comparisons with it; the "
        "bounds of pixels are then those of its own, first resize.",
    )
    video_fps: float = Field(default=2.0, gt=0, description="Frames taken per second of a video.")
    video_min_frames: int = Field(
        default=4,
        ge=1,
        description="Fewest frames of a video (where it has as many); `video_frames: llamafactory` has no such bound.",
    )
    video_max_frames: int = Field(default=768, ge=1, description="Most frames of a video.")
    video_min_pixels: int | None = Field(
        default=None, ge=1, description="Fewest pixels of a frame; by default what the model directory says."
    )
    video_max_pixels: int | None = Field(
        default=None, ge=1, description="Most pixels of a frame; by default what the model directory says."
    )
    video_total_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Most pixels of a video, two frames counted as one, as they become one patch: 784 of them are a "
        "token. By default 90% of 128,000 tokens, as in qwen-vl-utils.",
    )
    video_frames: Literal["qwen", "llamafactory"] = Field(
        default="qwen", description="Whose rule chooses the frames: qwen-vl-utils' or LLaMA-Factory's."
    )
    cutoff_len: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of one sample, of a pair each answer with its prompt; by default `pack_tokens`.",
    )
    too_long: Literal["error", "drop", "truncate", "shrink"] = Field(
        default="error",
        description="What happens to a sample of more than `cutoff_len` tokens: an error that names it, left out, its "
        "text cut (never inside a picture), or its pictures made smaller.",
    )
    pack: bool = Field(default=True, description="Several samples in a micro-batch; off: one in each.")
    pack_tokens: int = Field(
        default=4096,
        ge=1,
        description="Most tokens in one micro-batch: the bound on activation memory. It does not change the loss. A "
        "longer sample, where `cutoff_len` allows it, is a micro-batch of its own.",
    )
    pack_patches: int | None = Field(
        default=None, ge=1, description="Most patches of pictures in one micro-batch (a token takes four)."
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error", description="A record or medium that cannot be used ends the run, or is counted and skipped."
    )
    shuffle: bool = Field(default=True, description="A new order in every epoch, fixed by `seed`; off: file order.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the order of samples.")
    streaming: bool = Field(
        default=False, description="Read the files front to back instead of indexing them; needs `train.steps`."
    )
    shuffle_buffer: int = Field(
        default=1024, ge=1, description="Records that a stream is shuffled over, besides the order of its shards."
    )
    workers: int = Field(default=0, ge=0, description="Processes that encode; 0: a thread of the main process.")
    prefetch: int = Field(default=2, ge=1, description="Steps that are made ahead.")
    cache: str | None = Field(
        default=None,
        description="Directory that keeps drafts (tokens, sizes of media); several runs and nodes may share it.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        pairs = (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("video_min_frames", "video_max_frames"),
        )
        for low, high in pairs:
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise _contradiction(f"data.{low} {least} is more than data.{high} {most}")
        if self.video_frames == "qwen" and self.video_max_frames < 2:
            raise _contradiction("data.video_max_frames 1: the rule `qwen` takes two frames at least")
        if self.val and self.val_rate is not None:
            raise _contradiction("data.val and data.val_rate both say what to evaluate; keep one")
        if self.streaming and self.val_rate is not None:
            raise _contradiction("data.val_rate cannot take records out of a stream; give data.val")
        if self.streaming and self.max_samples is not None:
            raise _contradiction("data.max_samples cannot bound a stream; limit train.steps instead")
        if self.streaming and any(source.max_samples is not None for source in self.train):
            raise _contradiction("data.train: max_samples cannot choose from a stream; limit train.steps instead")
        return self

    @property
    def longest(self) -> int:
        """Most tokens of one sample."""
        return self.pack_tokens if self.cutoff_len is None else self.cutoff_len


class TrainSection(Section):
    """How long a run is, and where it is kept."""

    output_dir: str = Field(
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
        default=None, ge=1, description="Evaluate `data.val` every so many steps; it is always evaluated at the end."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps is not None and self.epochs is not None:
            raise _contradiction(
                f"train.steps {self.steps} and train.epochs {self.epochs:g} both say how long to train; keep one"
            )
        return self


class OptimSection(Section):
    """AdamW, its learning-rate schedule, and clipping."""

    lr: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_as_tuple)
    ] = Field(default=(0.9, 0.999), description="Decay of AdamW's first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of matrices; norms and biases (one axis) are not decayed.",
    )
    no_decay: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
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
        default=None, ge=1, description="float16 alone: the factor doubles after so many updates, 2000 by default."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up; the formulas are transformers'."
    )
    warmup: int | float = Field(
        default=0, ge=0, description="Warm-up: a fraction of all steps when below 1, a number of steps otherwise."
    )
    min_lr_ratio: Fraction = Field(default=0.0, description="Learning rate at the end, as a fraction of `lr`.")

    @model_validator(mode="after")
    def _whole_warmup(self) -> OptimSection:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise _contradiction(
                f"optim.warmup: found {self.warmup}, allowed: a fraction of all steps below 1, or whole steps"
            )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise _contradiction("optim.min_lr_ratio has no meaning with optim.schedule constant; remove it")
        return self


def _rows(value: Any) -> Any:
    rows = nested(value)
    return tuple(_as_tuple(row) for row in rows) if isinstance(rows, list | tuple) else rows


StageLayers = Annotated[
    tuple[Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)], ...],
    Field(min_length=1),
    BeforeValidator(_rows),
]


class ParallelSection(Section):
    """Degrees of parallelism; their product is the number of processes.

    Layers are placed as in MindSpeed-MM's notation: a number for each pipeline stage, `[1, 10, 10, 7]`, or with
    virtual stages a row of them for each, `[[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]]`. Stages follow each other along
    the rows. The vision tower comes before the language model; a stage may hold the end of one and the start of the
    other, or layers of one alone.
    """

    pp: int = Field(default=1, ge=1, description="Pipeline stages.")
    dp: int = Field(default=1, ge=1, description="Data-parallel replicas.")
    cp: int = Field(default=1, ge=1, description="Context parallelism: pieces of a sequence.")
    tp: int = Field(default=1, ge=1, description="Tensor parallelism: pieces of a layer.")
    sequence: bool = Field(
        default=False,
        description="Divide norms and residuals along the sequence over the tensor-parallel ranks; with `tp: 1` it has "
        "no effect.",
    )
    cp_algorithm: Literal["ulysses", "ring"] = Field(
        default="ulysses",
        description="How attention sees all of a sequence that `cp` divides: heads are exchanged, or keys and values "
        "go round.",
    )
    vision_layers: StageLayers | None = Field(
        default=None, description="Layers of the vision tower in each stage; null: all in the first."
    )
    language_layers: StageLayers | None = Field(
        default=None, description="Layers of the language model in each stage; null: divided evenly."
    )

    @model_validator(mode="after")
    def _placed(self) -> ParallelSection:
        vision, language = self.vision_layers, self.language_layers
        for name, rows in (("vision_layers", vision), ("language_layers", language)):
            wrong = [row for row in rows or () if len(row) != self.pp]
            if wrong:
                raise _contradiction(
                    f"parallel.{name} {list(wrong[0])} has {len(wrong[0])} stages, parallel.pp is {self.pp}; give one "
                    f"number for each stage, or parallel.{name}=null for the default"
                )
            if rows and not any(map(sum, rows)):
                raise _contradiction(f"parallel.{name} places no layer at all")
        if vision and language:
            self._check_order(vision, language)
        return self

    def _check_order(self, vision: Sequence[Sequence[int]], language: Sequence[Sequence[int]]) -> None:
        if len(vision) > len(language):
            raise _contradiction(
                f"parallel.vision_layers has {len(vision)} virtual stages, parallel.language_layers {len(language)}; "
                f"give both as many rows"
            )
        if early := early_language(list(chain(*vision)), list(chain(*language))):
            last, first = early
            raise _contradiction(
                f"parallel.vision_layers puts vision layers on stage {last}, after parallel.language_layers has begun "
                f"on stage {first}; the whole vision tower comes before the language model"
            )

    @property
    def virtual(self) -> int:
        """Virtual stages on each pipeline rank."""
        return len(self.language_layers or self.vision_layers or ((),))

    @property
    def mesh(self) -> Mesh:
        """The grid of ranks."""
        return Mesh(**{axis: getattr(self, axis) for axis in AXES})


class LoraSection(Section):
    """Low-rank adapters (Hu et al., arXiv:2106.09685) in the place of training the weights themselves.

    The section's presence is the switch: `lora: {}`, or `lora:` with nothing below it, takes all defaults.
    """

    rank: int = Field(default=8, ge=1, description="Rank of every adapter.")
    alpha: float = Field(default=16.0, gt=0, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of an adapter's input.")
    targets: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        default=("language",),
        min_length=1,
        description="Which linear layers get one: vision, projector, language (all of that part), a module's last name "
        "such as q_proj, or a pattern of full names such as `model.layers.*.mlp.*`.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732).")
    dora: bool = Field(default=False, description="Train magnitudes beside directions (arXiv:2402.09353).")
    adapter: str | None = Field(
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
            raise _contradiction(
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
    reference: str | None = Field(
        default=None,
        min_length=1,
        description="Directory or id of the reference model; by default `model.path`, with LoRA the model without its "
        "adapter.",
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="Directory that keeps the reference's log-probabilities: computed once, the reference is not held.",
    )

    @model_validator(mode="after")
    def _smoothable(self) -> DpoSection:
        if self.label_smoothing and self.loss != "sigmoid":
            raise _contradiction(f"dpo.label_smoothing has a meaning with dpo.loss sigmoid only, not {self.loss}")
        return self


class CheckpointSection(Section):
    """What is saved, and when. The last step is always saved, and the one before an error or a signal."""

    every: int | None = Field(default=500, ge=1, description="Save a checkpoint every so many steps; null: never so.")
    minutes: float | None = Field(
        default=30.0, gt=0, description="Save one as well when the last is so many minutes old; null: never so."
    )
    keep_last: int | None = Field(
        default=2, ge=1, description="How many checkpoints are kept, older ones are removed; null: all."
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

    every: int = Field(default=1, ge=1, description="Print a line every so many steps, where no progress bar is shown.")
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
        description="At every evaluation, answer so many validation samples; see `samples.jsonl` and TensorBoard.",
    )
    generate_tokens: int = Field(default=64, ge=1, description="Most tokens of such an answer.")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="What the device can do, in 1e12 operations a second, for the utilisation `mfu`; by default what "
        "is known of it, and no `mfu` where nothing is.",
    )
    profile: Annotated[tuple[int, int] | None, BeforeValidator(_as_tuple)] = Field(
        default=None, description="First and last step to record; the trace goes to `profile/`."
    )
    plot: bool = Field(default=True, description="Draw `loss.png` at every checkpoint and evaluation, and at the end.")

    @model_validator(mode="after")
    def _steps_in_order(self) -> LogSection:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise _contradiction(
                f"log.profile: found {list(self.profile)}, allowed: [first, last], two steps counted from 1"
            )
        return self


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
            raise _contradiction(f"backend.name: {error}") from None
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
    backend: BackendSection = BackendSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.checkpoint.export == "merged" and self.lora is None:
            raise _contradiction("checkpoint.export merged has a meaning with lora only; use true")
        for name in ("loss_scale", "loss_scale_window"):
            if getattr(self.optim, name) is not None and self.model.dtype != "float16":
                raise _contradiction(
                    f"optim.{name} has a meaning with model.dtype float16 only, not {self.model.dtype}"
                )
        if self.data.streaming and self.train.steps is None:
            raise _contradiction("data.streaming does not know how many records there are: give train.steps")
        if self.train.eval_every is not None and not (self.data.val or self.data.val_rate):
            raise _contradiction(
                f"train.eval_every {self.train.eval_every} needs data.val or data.val_rate, and neither is given"
            )
        if self.log.generate and not (self.data.val or self.data.val_rate):
            raise _contradiction(
                f"log.generate {self.log.generate} needs data.val or data.val_rate, and neither is given"
            )
        if self.log.generate and self.data.train_on_prompt:
            raise _contradiction(
                "log.generate cannot tell where an answer begins with data.train_on_prompt; keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _preferences(self) -> Recipe:
        if self.dpo is None:
            return self
        if self.train.loss != "token":
            raise _contradiction(
                f"train.loss {self.train.loss} has no meaning with dpo, whose loss is a mean over pairs"
            )
        if self.data.train_on_prompt:
            raise _contradiction("data.train_on_prompt has no meaning with dpo, which compares answers to one prompt")
        if self.lora is not None and self.lora.dropout:
            raise _contradiction(
                f"lora.dropout {self.lora.dropout:g} with dpo would compare a thinned model with a whole reference; "
                f"leave it at 0"
            )
        if self.dpo.cache is not None and self.data.streaming:
            raise _contradiction("dpo.cache reads all pairs before the first step, data.streaming never; keep one")
        return self
