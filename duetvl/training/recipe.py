"""The recipe: one YAML or JSON file that says everything about a run.

Every field is checked before anything is loaded. Paths are relative to the working directory, as on any command
line, so that a path given as an override means the same as one in the file; paths inside a data file are relative
to `data.image_root`, or to the data file.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.core.mesh import AXES, Mesh
from duetvl.training.yaml_values import parse_yaml, read_yaml


def _as_tuple(value: Any) -> Any:
    """Lists are what YAML has."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_more(value: Any) -> Any:
    """`x` stands for `[x]`, and null for `[]`."""
    return () if value is None else (value,) if isinstance(value, str) else _as_tuple(value)


Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Part = Literal["vision", "projector", "language"]


def _contradiction(message: str) -> PydanticCustomError:
    """An error about several fields together, which names them itself."""
    return PydanticCustomError("contradiction", "{message}", {"message": message})


class Section(BaseModel):
    """A part of a recipe: typed strictly, without other fields, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model is trained, and which of its parts."""

    path: str = Field(min_length=1, description="Directory of the model in the Hugging Face layout.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Storage dtype of the weights. With bfloat16 the optimizer keeps float32 master weights. "
        "float16 is for inference: training in it needs loss scaling, which is not there yet.",
    )
    freeze: Annotated[tuple[Part, ...], BeforeValidator(_one_or_more)] = Field(
        default=(),
        description="Parts that are not trained: the vision tower, the projector (merger), the language model.",
    )

    @model_validator(mode="after")
    def _trainable(self) -> ModelSection:
        if self.dtype == "float16":
            raise _contradiction(
                "model.dtype float16 cannot be trained without loss scaling, which this release does not have; "
                "use bfloat16 or float32"
            )
        if set(self.freeze) == set(get_args(Part)):
            raise _contradiction(
                f"model.freeze names every part ({', '.join(get_args(Part))}): nothing would be trained"
            )
        return self


class DataSection(Section):
    """Records, and how they are laid into micro-batches."""

    train: Paths = Field(
        min_length=1, description="JSON or JSONL file of records with `messages`, or a list of such files."
    )
    val: Paths = Field(default=(), description="The same for evaluation; none by default.")
    image_root: str | None = Field(
        default=None, description="Directory that relative paths of images start from; by default the data file's own."
    )
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Images with fewer pixels are enlarged; by default what the model directory says.",
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Images with more pixels are reduced; by default what the model directory says."
    )
    pack_tokens: int = Field(
        default=4096,
        ge=1,
        description="Most tokens in one micro-batch: the bound on activation memory. It does not change the loss.",
    )
    too_long: Literal["error", "alone"] = Field(
        default="error",
        description="What happens to a sample of more than `pack_tokens` tokens: an error that names it, or a "
        "micro-batch of its own.",
    )
    shuffle: bool = Field(default=True, description="A new order in every epoch, fixed by `seed`; off: file order.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the order of samples.")


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
        description="Passes over the data; 1 where `steps` is not given either. Rounded up to whole steps: the last "
        "step is filled from the next epoch's order.",
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
    clip: float | None = Field(
        default=1.0,
        gt=0,
        description="Largest norm of all gradients together, of the mean over tokens; null: no clipping.",
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


class ParallelSection(Section):
    """Degrees of parallelism; their product is the number of processes."""

    pp: int = Field(default=1, ge=1, description="Pipeline stages.")
    dp: int = Field(default=1, ge=1, description="Data-parallel replicas.")
    cp: int = Field(default=1, ge=1, description="Context parallelism: pieces of a sequence.")
    tp: int = Field(default=1, ge=1, description="Tensor parallelism: pieces of a layer.")

    @property
    def mesh(self) -> Mesh:
        """The grid of ranks."""
        return Mesh(**{axis: getattr(self, axis) for axis in AXES})


class CheckpointSection(Section):
    """What is saved, and when. The last step is always saved."""

    every: int | None = Field(
        default=None, ge=1, description="Save a checkpoint every so many steps; null: at the end only."
    )
    keep_last: int | None = Field(
        default=2, ge=1, description="How many checkpoints are kept, older ones are removed; null: all."
    )
    export: bool | Literal["mindspeed_mm"] = Field(
        default=False,
        description="At the end, write the model to `export/`: `true` in the Hugging Face layout, `mindspeed_mm` as a "
        "MindSpeed-MM release of one stage and rank (`mm-convert ... resplit` divides it further).",
    )


class LogSection(Section):
    """What is shown. `metrics.jsonl` gets every step in any case."""

    every: int = Field(default=1, ge=1, description="Print a line every so many steps, where no progress bar is shown.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events to `tensorboard/`.")
    plot: bool = Field(default=True, description="Draw `loss.png` at every checkpoint and evaluation, and at the end.")


class BackendSection(Section):
    """The framework and the device. `--backend`, `--device` and DUETVL_BACKEND on the command line come first."""

    name: str = Field(
        default="torch_npu", min_length=1, description="torch_npu (or torch), mindspore, or a registered one."
    )
    device: str = Field(
        default="auto", min_length=1, description="cpu, cuda, npu (ascend), or auto for the best that is there."
    )


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    backend: BackendSection = BackendSection()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.train.eval_every is not None and not self.data.val:
            raise _contradiction(f"train.eval_every {self.train.eval_every} needs data.val, which is not given")
        low, high = self.data.min_pixels, self.data.max_pixels
        if low is not None and high is not None and low > high:
            raise _contradiction(f"data.min_pixels {low} is more than data.max_pixels {high}")
        return self


# -- reading -----------------------------------------------------------------------------------------------------------


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides. Raises ConfigError."""
    file = Path(path)
    return make_recipe(read_yaml(file), overrides, name=file.stem, source=str(file))


def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "run", source: str = "the recipe"
) -> Recipe:
    """A recipe from a mapping of sections. `name` replaces `{recipe}` in `train.output_dir`."""
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{source}: expected sections ({', '.join(Recipe.model_fields)}), found {found}")
    sections: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    for override in overrides:
        _apply_override(sections, override)
    try:
        recipe = Recipe.model_validate({key: {} if value is None else value for key, value in sections.items()})
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    train = recipe.train.model_copy(update={"output_dir": recipe.train.output_dir.replace("{recipe}", name)})
    return recipe.model_copy(update={"train": train})


def check_world(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError unless the recipe's degrees fit the number of processes, and this release can run them."""
    mesh = recipe.parallel.mesh
    degrees = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
    if mesh.size > 1:
        raise ConfigError(f"parallel: {degrees} needs {mesh.size} processes; this release trains on one process")
    if processes != mesh.size:
        raise ConfigError(
            f"parallel: {degrees} is {mesh.size} process, but {processes} were started; "
            f"this release trains on one process"
        )


def _apply_override(sections: dict[str, Any], override: str) -> None:
    target, equals, text = override.partition("=")
    section, dot, key = target.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    if section not in Recipe.model_fields:
        raise ConfigError(_no_section(section))
    if key not in _fields(section):
        raise ConfigError(_no_field(section, key))
    inner = sections.setdefault(section, {})
    if inner is None:
        inner = sections[section] = {}
    if not isinstance(inner, dict):
        raise ConfigError(
            f"{section}: found {_show(inner)}, allowed: a section with fields ({', '.join(_fields(section))})"
        )
    inner[key] = parse_yaml(text, f"override {target}")


# -- what an error says ------------------------------------------------------------------------------------------------


def _one_line(error: ValidationError) -> str:
    """The first error in one line: unknown names before everything else, as the others may follow from them."""
    problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    paths = {_path(problem) for problem in problems if problem["loc"]}
    more = len(paths) - 1
    return _describe(problems[0]) + (f" (and {more} more field{'s' * (more > 1)})" if more > 0 else "")


def _describe(problem: ErrorDetails) -> str:
    path, kind = _path(problem), problem["type"]
    section, _, key = path.partition(".")
    if kind == "contradiction":
        return problem["msg"]
    if kind == "extra_forbidden":
        return _no_field(section, key) if key else _no_section(section)
    if kind == "missing" and len(problem["loc"]) <= 2:
        return f"{path} is missing: {_meaning(section, key)}"
    if not key:
        return (
            f"{path}: found {_show(problem['input'])}, allowed: a section with fields ({', '.join(_fields(section))})"
        )
    return f"{path}: found {_show(problem['input'])}, allowed: {_allowed(section, key)}"


def _path(problem: ErrorDetails) -> str:
    """section.field: what lies below is told by the value found."""
    return ".".join(str(part) for part in problem["loc"][:2])


def _no_section(name: str) -> str:
    return f"a recipe has no section {name!r}{did_you_mean(str(name), Recipe.model_fields)}"


def _no_field(section: str, key: str) -> str:
    return f"{section} has no field {key!r}{did_you_mean(str(key), _fields(section))}"


def _fields(section: str) -> Mapping[str, Any]:
    kind = Recipe.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return kind.model_fields


def _meaning(section: str, key: str) -> str:
    if key:
        return str(_fields(section)[key].description)
    required = [name for name, field in _fields(section).items() if field.is_required()]
    return f"a recipe needs the section with {', '.join(f'{section}.{name}' for name in required)}"


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else _yaml_form(value)
    return text if len(text) <= 80 else text[:77] + "..."


# -- what is allowed, for errors and for the reference -----------------------------------------------------------------


def recipe_reference() -> str:
    """All fields of a recipe as markdown tables; docs/recipe.md holds exactly this."""
    lines = ["# Recipe", "", _PREFACE.strip(), ""]
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        assert kind is not None
        lines += [
            f"## {section}",
            "",
            (kind.__doc__ or "").strip(),
            "",
            "| field | allowed | default | |",
            "|---|---|---|---|",
        ]
        for name, info in _fields(section).items():
            default = "required" if info.is_required() else f"`{_yaml_form(info.default)}`"
            allowed = _allowed(section, name).replace("|", "\\|")
            lines.append(f"| `{name}` | {allowed} | {default} | {info.description} |")
        lines.append("")
    return "\n".join(lines)


_PREFACE = """
<!-- Made by `duetvl.training.recipe.recipe_reference()`; a test holds that it is current. -->

One YAML or JSON file says everything about a run. An unknown section or field is an error that names the nearest
known one. Any field can be given on the command line instead: `duetvl train run.yaml optim.lr=3e-5 train.steps=100`.

Paths are relative to the working directory. Paths of images inside a data file are relative to `data.image_root`, or
to the data file. Numbers are read as in JSON (`1e-5` is a number), `true` and `false` are the only booleans.
"""


def _allowed(section: str, key: str) -> str:
    info = _fields(section)[key]
    bounds = [_bound(item) for item in info.metadata]
    words = [_type_words(info.annotation), *(bound for bound in bounds if bound)]
    return ", ".join(words)


def _bound(item: Any) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    parts = [f"{sign} {_power(getattr(item, name))}" for name, sign in signs if getattr(item, name, None) is not None]
    if getattr(item, "min_length", None):
        parts.append("not empty")
    parts += filter(None, map(_bound, getattr(item, "metadata", ())))
    return ", ".join(parts)


def _power(number: float) -> str:
    return "2^63" if number == 2**63 else f"{number:g}"


def _type_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join([_type_words(parts[0]), *filter(None, map(_bound, parts[1:]))])
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        if set(parts) == {int, float}:
            return "a number"
        return " or ".join(_type_words(part) for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return "a path or a list of paths" if parts[0] is str else f"one or a list of {_type_words(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} numbers, each: {_type_words(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names[kind]


def _yaml_form(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_yaml_form(item) for item in value)}]"
    if isinstance(value, float) and value and not math.isclose(value, round(value, 3)):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    return str(value)
