"""model.json: which model it is, what is frozen and recomputed, and where its layers lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.migrate.names import FAMILIES, PARTS, SHAPES
from duetvl.migrate.report import Report, Values
from duetvl.migrate.script import setting
from duetvl.migrate.shell.simple import Script
from duetvl.migrate.tables import MODEL
from duetvl.models.qwen_vl.config import ModelConfig, published_config, published_names
from duetvl.training.recipe.placement import stages_of
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.text import show

_VISION_LAYERS: Final = "image_encoder.vision_encoder.pipeline_num_layers"
_TEXT_LAYERS: Final = "text_decoder.pipeline_num_layers"
_TOWERS: Final = {"vision": "image_encoder.vision_encoder", "language": "text_decoder"}
_FREEZE: Final = {  # whether a part is frozen where nothing is said of it
    "vision_encoder": ("image_encoder.vision_encoder.freeze", True),
    "vision_projector": ("image_encoder.vision_projector.freeze", False),
    "text_decoder": ("text_decoder.freeze", False),
}
_COMPARED: Final = (
    ("--seq-length", "text_decoder.seq_length"), ("--vocab-size", "text_decoder.vocab_size"),
    ("--num-layers", "text_decoder.num_layers"), ("--hidden-size", "text_decoder.hidden_size"),
)  # fmt: skip


def frozen_parts(model: Values) -> tuple[str, ...]:
    """The parts that are not trained, in MindSpeed-MM's names.

    ConfigError for null, which is no absence there: a part whose default is to be frozen is trained.
    """
    for key, _ in _FREEZE.values():
        if key in model and model.peek(key) is None:
            raise ConfigError(f"{MODEL.title}: {key} is null, expected true or false; leave it out for its default")
    return tuple(part for part, (key, usual) in _FREEZE.items() if model.switch(key, usual))


def freeze(model: Values, frozen: Sequence[str], report: Report) -> dict[str, Any]:
    """`model.freeze`."""
    parts = [PARTS[part] for part in frozen]
    default = "" if _FREEZE["vision_encoder"][0] in model else " (its default for the vision tower)"
    report.add("used", "freeze", f"model.freeze: {', '.join(parts) or 'nothing'}{default}")
    return {"freeze": parts}


def recompute(model: Values, script: Values, report: Report) -> dict[str, Any]:
    """`train.recompute`: model.json's word for each tower, else the script's for both."""
    both = script.text("--recompute-granularity")
    if script.switch("--recompute-activations"):
        both = both or "selective"
    keys = {part: f"{key}.recompute_granularity" for part, key in _TOWERS.items()}
    found = {part: model.text(key) or both for part, key in keys.items()}
    for part, value in found.items():
        if value not in (None, "full", "selective"):
            raise ConfigError(f"{MODEL.title}: {keys[part]} is {show(value)}, expected full or selective")
    whole = [part for part, value in found.items() if value == "full"]
    if not any(found.values()):
        return {}
    selective = "selective" in found.values()
    ours = "selective" if not whole else "full" if len(whole) == 2 or selective else whole[0]
    said = ", ".join(f"{part} {value}" for part, value in found.items() if value)
    meaning = " - selective recomputes MLPs in both towers, not attention" if selective else ""
    report.add("changed" if selective else "used", "recompute_granularity", f"{said}: train.recompute: {ours}{meaning}")
    return {"recompute": ours}


# -- which model -----------------------------------------------------------------------------------------------------


def family(model: Values) -> str:
    """The family's published name. ConfigError for one that is not there."""
    name = model.text("model_id") or ""
    if name not in FAMILIES:
        raise ConfigError(f"{MODEL.title}: model_id is {show(name)}{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def published(model: Values, path: str, report: Report) -> ModelConfig | None:
    """The published model of these sizes. `path`: the directory of the weights, whose name may say another."""
    name_of = family(model)
    sizes = (model.peek("text_decoder.num_layers"), model.peek("text_decoder.hidden_size"))
    for name in published_names():
        config = published_config(name)
        if name.startswith(f"{name_of}-") and (config.text.num_layers, config.text.hidden_size) == sizes:
            report.add("used", "model_id", f"{name}: {sizes[0]} layers of width {sizes[1]}")
            _compare_path(path, name, report)
            return config
    report.add("used", "model_id", f"{name_of} of no published size ({sizes[0]} layers of width {sizes[1]})")
    return None


def _compare_path(path: str, name: str, report: Report) -> None:
    """The directory's name may say another size, as where a data.json was copied from another model's."""
    other = next((known for known in published_names() if known in path and known != name), None)
    if other is not None:
        report.add(
            "contradiction", "model_name_or_path", f"{path} looks like {other}, model.json is of {name}; the "
            f"directory is what is trained",
        )  # fmt: skip


def compare(model: Values, script: Values, config: ModelConfig | None, report: Report) -> None:
    """Note where model.json has other numbers than the published model, or than the script."""
    for key, path in SHAPES.items() if config else ():
        given, known = model.peek(key), _attribute(config, path)
        if given is not None and given != known:
            report.add("contradiction", key, f"{given}, the published model has {known}; its config.json decides")
    for argument, key in _COMPARED:
        ours, theirs = script.peek(argument), model.peek(key)
        if ours is not None and theirs is not None and str(ours) != str(theirs):
            which = "the script's is taken" if argument == "--seq-length" else "config.json decides"
            report.add("contradiction", argument, f"{ours}, but {key} is {theirs}; {which}")


def _attribute(config: ModelConfig | None, path: str) -> Any:
    value: Any = config
    for name in path.removeprefix("!").split("."):
        value = getattr(value, name)
    value = not value if path.startswith("!") else value
    return list(value) if isinstance(value, tuple) else value


# -- stages ----------------------------------------------------------------------------------------------------------


def layers(model: Values, script: Values, pp: int, config: ModelConfig | None, read: Script) -> dict[str, Any]:
    """`parallel.vision_layers` and `language_layers`, compared with the script's stages and the model."""
    report = model.report
    found = {"vision_layers": model.get(_VISION_LAYERS), "language_layers": model.get(_TEXT_LAYERS)}
    rows = {name: _rows(value, name) for name, value in found.items() if value is not None}
    virtual = script.whole("--virtual-pipeline-model-parallel-size") or 1
    if pp == 1 and virtual == 1:
        for value in (found[name] for name in rows if len(rows[name]) != 1 or len(rows[name][0]) != 1):
            report.add(
                "contradiction", "pipeline_num_layers",
                f"{json.dumps(value)}, but the script has one stage, which has all layers in MindSpeed-MM as well",
            )  # fmt: skip
        rows = {name: [[sum(map(sum, value))]] for name, value in rows.items()}
    for name, value in rows.items():
        if any(len(row) != pp for row in value):
            raise ConfigError(
                f"{MODEL.title}: pipeline_num_layers {json.dumps(found[name])} is for {len(value[0])} stages, the "
                f"script has --pipeline-model-parallel-size {pp}; correct one of them, or "
                f"{setting(read, 'PP', len(value[0]))}"
            )
    rows_there = len(rows["language_layers"]) if "language_layers" in rows else virtual
    if virtual != rows_there:
        report.add(
            "contradiction", "--virtual-pipeline-model-parallel-size",
            f"{virtual}, but pipeline_num_layers has {rows_there} rows, which are taken",
        )  # fmt: skip
    checked = make_recipe({"model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pp": pp, **rows}})
    if config is not None:
        stages_of(checked.parallel, config)
    for name in rows:
        text = f"parallel.{name}: {json.dumps(found[name])}" if pp > 1 or virtual > 1 else "one stage has all layers"
        report.add("used", "pipeline_num_layers", text)
    if pp == 1 and virtual == 1:
        return {}
    return {name: value[0] if len(value) == 1 else value for name, value in rows.items()}


def _rows(value: Any, name: str) -> list[list[int]]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and row and all(type(count) is int for count in row) for row in rows):
        raise ConfigError(f"{MODEL.title}: pipeline_num_layers ({name}) is {show(value)}, expected numbers of layers")
    return rows
