"""A recipe in words: one-line errors, and the reference of all fields."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from duetvl.core.errors import did_you_mean
from duetvl.training.recipe.data_section import DataSource
from duetvl.training.recipe.section import Section
from duetvl.training.recipe.sections import Recipe


def one_line(error: ValidationError) -> str:
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
    if len(problem["loc"]) > 3 and path in ("data.train", "data.val"):
        return _of_source(f"{path}[{problem['loc'][2]}]", str(problem["loc"][3]), problem)
    if kind == "extra_forbidden":
        names = [str(name) for name in problem["loc"][:2]]  # a name may have a point in it
        return no_field(*names) if len(names) > 1 else no_section(names[0])
    if kind == "missing" and len(problem["loc"]) <= 2:
        return f"{path} is missing: {_meaning(section, key)}"
    if not key:
        return no_mapping(section, problem["input"])
    return f"{path}: found {show(problem['input'])}, allowed: {allowed(section, key)}"


def _of_source(source: str, key: str, problem: ErrorDetails) -> str:
    """What is wrong with one of the data sets."""
    known = DataSource.model_fields
    if key not in known:
        return f"{source} has no field {key!r}{did_you_mean(key, known)}"
    if problem["type"] == "missing":
        return f"{source}.{key} is missing: {known[key].description}"
    return f"{source}.{key}: found {show(problem['input'])}, allowed: {_values(known[key])}"


def _path(problem: ErrorDetails) -> str:
    """section.field: the value found shows what lies below."""
    return ".".join(str(part) for part in problem["loc"][:2])


def no_section(name: str) -> str:
    """There is no section of this name; the field that is meant, or the nearest known ones."""
    if name in _MINDSPEED:
        return f"{name!r} is a key of MindSpeed-MM's files; `duetvl import-mindspeed` turns them into a recipe"
    section, dot, key = name.partition(".")
    if dot and section in Recipe.model_fields:
        form = f"`{section}: {{{key}: ...}}`"
        return f"a recipe has no section {name!r}; in a file the field stands below its section: {form}"
    near = [] if get_close_matches(name, Recipe.model_fields) else near_candidates(name)
    hint = elsewhere(name) or _alternatives(near) or did_you_mean(name, Recipe.model_fields)
    more = " docs/migrating.md has the fields for the keys of LLaMA-Factory" if name in _ELSEWHERE else ""
    return f"a recipe has no section {name!r}{hint}{more}"


def no_field(section: str, key: str) -> str:
    """The section has no field of this name; the field that is meant, or the nearest known ones."""
    if hint := _colon(key):
        return f"{section} has no field {key!r}{hint}"
    near = [] if get_close_matches(key, fields(section), cutoff=0.5) else near_candidates(key)
    return (
        f"{section} has no field {key!r}{elsewhere(key) or _alternatives(near) or did_you_mean(key, fields(section))}"
    )


def no_mapping(section: str, found: Any) -> str:
    """The section is none: something else stands in its place."""
    hint = _colon(found) if isinstance(found, str) else ""
    return f"{section}: found {show(found)}, allowed: a section with fields ({', '.join(fields(section))}){hint}"


def _colon(text: str) -> str:
    """A hint for `lr = 3` in a file; empty for what has no sign of equality."""
    name, sign, value = (part.strip() for part in text.partition("="))
    return f"; in YAML a colon and a blank stand between them: `{name}: {value}`" if sign and name else ""


def elsewhere(name: str) -> str:
    """A hint to the fields that have this name or this meaning; empty where there are none."""
    return _alternatives(candidates(name))


def _alternatives(known: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(known)}?" if known else ""


def candidates(name: str) -> list[str]:
    """The fields, as section.key, that have this name, or mean what others call so."""
    known = [f"{section}.{name}" for section in Recipe.model_fields if name in fields(section)]
    return known or [_ELSEWHERE[name]] if name in _ELSEWHERE else known


def near_candidates(name: str) -> list[str]:
    """The same of a name that is misspelt."""
    every = {field for section in Recipe.model_fields for field in fields(section)} | _ELSEWHERE.keys()
    near = get_close_matches(name, sorted(every), n=1, cutoff=0.8)
    return candidates(near[0]) if near else []


_MINDSPEED: Final = ("dataset_param", "dataloader_param", "image_encoder", "text_decoder", "img_context_token_id")
_ELSEWHERE: Final = {  # what Hugging Face's trainers, LLaMA-Factory and ms-swift call fields of a recipe
    "model_name_or_path": "model.path", "torch_dtype": "model.dtype", "bf16": "model.dtype", "fp16": "model.dtype",
    "dataset": "data.train", "eval_dataset": "data.val", "max_length": "data.cutoff_len",
    "max_seq_length": "data.cutoff_len",
    "default_system": "data.system", "system_prompt": "data.system",
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup", "warmup_steps": "optim.warmup", "max_grad_norm": "optim.clip",
    "num_train_epochs": "train.epochs", "max_steps": "train.steps", "eval_steps": "train.eval_every",
    "per_device_train_batch_size": "train.global_batch", "gradient_accumulation_steps": "train.global_batch",
    "batch_size": "train.global_batch", "gradient_checkpointing": "train.recompute", "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "lora_target": "lora.targets", "r": "lora.rank",
    "target_modules": "lora.targets", "save_steps": "checkpoint.every", "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "log.every", "report_to": "log.wandb",
}  # fmt: skip


def fields(section: str) -> Mapping[str, Any]:
    """The fields of a section by name."""
    return section_type(section).model_fields


def section_type(section: str) -> type[Section]:
    """The class of a section, whether it may be absent or not."""
    annotation = Recipe.model_fields[section].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next(kind for kind in kinds if issubclass(kind, Section))


def _meaning(section: str, key: str) -> str:
    if key:
        return str(fields(section)[key].description)
    required = [name for name, field in fields(section).items() if field.is_required()]
    return f"a recipe needs the section with {', '.join(f'{section}.{name}' for name in required)}"


def show(value: Any) -> str:
    """A value as it stands in a recipe, on one line, cut where it is long."""
    text = repr(value) if isinstance(value, str) else _yaml_form(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


# -- what is allowed, for errors and for the reference -----------------------------------------------------------------


def recipe_reference() -> str:
    """All fields of a recipe as markdown tables: the text of docs/recipe.md."""
    lines = ["# Recipe", "", _PREFACE.strip(), ""]
    for section in Recipe.model_fields:
        lines += _table(f"## {section}", section_type(section))
        if section == "data":
            lines += _table("### A data set of `data.train` or `data.val`", DataSource)
    return "\n".join(lines)


def _table(title: str, kind: type[Section]) -> Iterator[str]:
    yield from (title, "", inspect.cleandoc(kind.__doc__ or ""), "")
    yield from ("| field | allowed | default | |", "|---|---|---|---|")
    for name, info in kind.model_fields.items():
        default = "required" if info.is_required() else f"`{_yaml_form(info.get_default(call_default_factory=True))}`"
        allowed = _values(info).replace("|", "\\|")
        yield f"| `{name}` | {allowed} | {default} | {info.description} |"
    yield ""


_PREFACE = """
<!-- Written by `duetvl.training.recipe.text.recipe_reference()`; a test checks that it is current. -->

A recipe is one YAML or JSON file that describes a whole run. An unknown section or field is an error that names the
nearest known one. Any field can be overridden on the command line:
`duetvl train run.yaml optim.lr=3e-5 train.steps=100`. So can a section, which replaces that of the file: `'lora={}'`,
`lora=null`.

Paths are relative to the working directory, and `~` is the home directory. Paths of media inside a data file are
relative to `data.image_root` if it is set, otherwise to the data file, then to the working directory. Numbers are read
as in JSON (`1e-5` is a number); `true` and `false` are the only booleans.

A section with nothing below it (`lora:`) gets its defaults. A field with nothing after it is null if null is its
default, and an error otherwise. On the command line, a value that begins with a quote or a bracket is read as YAML;
anything else is a single number, boolean, null or text: `data.train=shards/*.tar`.
"""


def allowed(section: str, key: str) -> str:
    """What a field takes, in words."""
    return _values(fields(section)[key])


def _values(info: FieldInfo) -> str:
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
    if origin is tuple and parts[-1] is Ellipsis and get_origin(_plain(parts[0])) is tuple:
        return "numbers of layers, one for each stage, or a list of them for each virtual stage"
    if origin is tuple and parts[-1] is Ellipsis:
        return "a path or a list of sources" if parts[0] is DataSource else f"one or a list of {_type_words(parts[0])}"
    if origin is dict:
        return f"a mapping of {_type_words(parts[0])} to {_type_words(parts[1])}"
    if origin is tuple:
        return f"{len(parts)} numbers, each: {_type_words(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names[kind]


def _plain(kind: Any) -> Any:
    """The type itself, without bounds."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _yaml_form(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml_form(item)}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_yaml_form(item) for item in value)}]"
    if isinstance(value, float) and value and not math.isclose(value, round(value, 3)):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    return str(value)
