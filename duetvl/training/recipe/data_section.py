"""The section `data` of a recipe: records, and how they become micro-batches."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from duetvl.core.errors import did_you_mean
from duetvl.data.formats.messages import TAGS
from duetvl.data.formats.reading import COLUMNS
from duetvl.training.recipe.section import Place, Section, contradiction

# Defaults of pictures and videos, so that what people have fits into the default of `pack_tokens` beside its text: the
# bounds of LLaMA-Factory and MindSpeed-MM, and one for a whole video, as 128 frames of theirs take 5,312 tokens.
MAX_PIXELS: Final = 768 * 768  # 752 tokens
VIDEO_MAX_PIXELS: Final = 256 * 256  # 83 tokens for two frames
VIDEO_MAX_FRAMES: Final = 128
VIDEO_TOTAL_PIXELS: Final = 3072 * 28 * 28


class DataSource(Section):
    """One set of records. A plain text stands for a data set with that `path`."""

    path: Place = Field(
        min_length=1,
        description="File (JSON, JSONL, Parquet, TSV, tar shard), directory, pattern of files, or "
        "`dataset_info.json:NAME`.",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "llava", "qwen", "swift", "preference"] = Field(
        default="auto", description="Layout of the records."
    )
    weight: float = Field(
        default=1.0, ge=1e-6, description="How often an epoch sees each record: 2 twice, 0.5 every other one."
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="Use at most this many records, drawn at random by `data.seed`."
    )
    image_root: Place | None = Field(default=None, description="Replaces `data.image_root` for this set.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Names of the record's keys, as in LLaMA-Factory's dataset_info.json."
    )
    tags: dict[str, str] = Field(
        default_factory=dict, description="Names of roles and their keys, as in LLaMA-Factory's dataset_info.json."
    )
    boxes: Literal["as_written", "pixels", "norm1000"] = Field(
        default="as_written",
        description="Unit of coordinates written in texts (`bbox_2d`, `point_2d`, `<|box_start|>`): leave them as they "
        "are, pixels of the picture's file, or thousandths of its sides; the latter two are converted to the unit that "
        "the model family expects.",
    )

    @model_validator(mode="after")
    def _known_names(self) -> DataSource:
        for field, given, known in (("columns", self.columns, COLUMNS), ("tags", self.tags, TAGS)):
            for name in given:
                if name not in known:
                    raise contradiction(f"{self.path}: {field} has no {name!r}{did_you_mean(name, known)}")
        return self


def _sources(value: Any) -> Any:
    """`x` stands for `[x]`, a text for a source of that path, and null for `[]`."""
    listed = () if value is None else value if isinstance(value, list | tuple) else (value,)
    return tuple({"path": item} if isinstance(item, str) else item for item in listed)


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_sources)]


class DataSection(Section):
    """Records, how they are encoded, and how they are packed into micro-batches."""

    train: Sources = Field(min_length=1, description="The data sets to train on.")
    val: Sources = Field(default=(), description="The data sets to evaluate on; none by default.")
    val_rate: float | None = Field(
        default=None, gt=0, lt=1, description="Instead of `val`: the share of the training records to hold out for it."
    )
    val_max_samples: int | None = Field(default=None, ge=1, description="Evaluate on at most this many records.")
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Train only on the first N records of all data sets together; `max_samples` of a data set draws N "
        "of its records at random, by `data.seed`.",
    )
    image_root: Place | None = Field(
        default=None,
        description="Directory that relative paths of media start from; by default they are looked up beside the data "
        "file, then in the working directory.",
    )
    system: str | None = Field(
        default=None,
        min_length=1,
        description="System prompt for records without one; by default the chat template's own, `You are a helpful "
        "assistant.` Use the same prompt for inference (`duetvl infer --system`).",
    )
    train_on_prompt: bool = Field(
        default=False, description="Also train on prompts, including the placeholders of media, as LLaMA-Factory does."
    )
    mask_history: bool = Field(default=False, description="Train only on the last answer of a conversation.")
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Images with fewer pixels are enlarged; by default the model directory's value.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description=f"Images with more pixels are reduced. By default {MAX_PIXELS:,} (768 x 768, 752 tokens), as in "
        "LLaMA-Factory and MindSpeed-MM, or the model directory's value if that is smaller. The published models "
        "have 12,845,056, which is 16,384 tokens for one picture.",
    )
    resize: Literal["once", "llamafactory"] = Field(
        default="once",
        description="`llamafactory` resizes twice as LLaMA-Factory does, for comparisons with it; the pixel limits are "
        "then those of its own, first resize.",
    )
    video_fps: float = Field(default=2.0, gt=0, description="Frames sampled per second of a video.")
    video_min_frames: int = Field(
        default=4,
        ge=1,
        description="Minimum number of frames of a video (if it has that many); `video_frames: llamafactory` has no "
        "minimum.",
    )
    video_max_frames: int = Field(
        default=VIDEO_MAX_FRAMES,
        ge=1,
        description="Maximum number of frames of a video: 128 as in LLaMA-Factory, about a minute. qwen-vl-utils takes "
        "up to 768.",
    )
    video_min_pixels: int | None = Field(
        default=None, ge=1, description="Minimum pixels of a frame; by default the model directory's value."
    )
    video_max_pixels: int | None = Field(
        default=None,
        ge=1,
        description=f"Maximum pixels of a frame. By default {VIDEO_MAX_PIXELS:,} (256 x 256, 83 tokens for two "
        "frames), as in LLaMA-Factory, or the model directory's value if that is smaller.",
    )
    video_total_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Maximum pixels of a video; two frames count as one, because they form one patch, and 784 "
        f"pixels are a token. By default {VIDEO_TOTAL_PIXELS:,} (3,072 tokens), so that a long video gets smaller "
        "frames and fits; if `video_max_pixels` is set, or with `resize: llamafactory`, 115,200 tokens, as in "
        "qwen-vl-utils.",
    )
    video_frames: Literal["qwen", "llamafactory"] = Field(
        default="qwen", description="How frames are sampled: by the rule of qwen-vl-utils or of LLaMA-Factory."
    )
    cutoff_len: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens of a sample (for a pair: of each answer with the prompt); `pack_tokens` "
        "by default.",
    )
    too_long: Literal["error", "drop", "truncate", "shrink"] = Field(
        default="error",
        description="What to do with a sample of more than `cutoff_len` tokens: report an error that names it, drop "
        "it, truncate its text (never inside a picture), or shrink its pictures.",
    )
    pack: bool = Field(
        default=True, description="Pack several samples into a micro-batch; false: one sample per micro-batch."
    )
    pack_tokens: int = Field(
        default=4096,
        ge=1,
        description="Maximum number of tokens in a micro-batch; this bounds activation memory and does not change the "
        "loss. A longer sample, if `cutoff_len` allows it, gets a micro-batch of its own.",
    )
    pack_patches: int | None = Field(
        default=None, ge=1, description="Maximum number of patches in a micro-batch (four patches make a token)."
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error", description="A record or medium that cannot be used ends the run, or is counted and skipped."
    )
    shuffle: bool = Field(
        default=True, description="Shuffle anew in every epoch, determined by `seed`; false: file order."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the order of samples.")
    streaming: bool = Field(
        default=False, description="Read the files front to back instead of indexing them; needs `train.steps`."
    )
    shuffle_buffer: int = Field(
        default=1024, ge=1, description="Size, in records, of a stream's shuffle buffer; shards are shuffled as well."
    )
    workers: int = Field(
        default=0, ge=0, description="Worker processes per rank that encode samples; 0: a thread of the rank itself."
    )
    prefetch: int = Field(default=2, ge=1, description="Number of steps prepared ahead.")
    cache: Place | None = Field(
        default=None,
        description="Directory that caches tokens and sizes of media; several runs and nodes may share it.",
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
                raise contradiction(f"data.{low} {least} is more than data.{high} {most}")
        if self.video_frames == "qwen" and self.video_max_frames < 2:
            raise contradiction("data.video_max_frames 1: `data.video_frames: qwen` takes at least two frames")
        if self.val and self.val_rate is not None:
            raise contradiction("data.val and data.val_rate both set the evaluation data; keep one")
        if self.streaming and self.val_rate is not None:
            raise contradiction("data.val_rate cannot hold out records of a stream; give data.val")
        if self.streaming and self.max_samples is not None:
            raise contradiction("data.max_samples does not apply to a stream; limit train.steps instead")
        if self.streaming and any(source.max_samples is not None for source in self.train):
            raise contradiction("data.train: max_samples does not apply to a stream; limit train.steps instead")
        return self

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a sample."""
        return self.pack_tokens if self.cutoff_len is None else self.cutoff_len
