"""From data.json, model.json and a script to the sections of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.migrate.data_keys import data_section
from duetvl.migrate.report import Report, Values
from duetvl.migrate.script import options, training_start
from duetvl.migrate.shell.run import Script, Start, read_script
from duetvl.migrate.shell.values import Text
from duetvl.migrate.tables import DATA, FAMILIES, MODEL, PARTS, SCRIPT, SHAPES, TABLES
from duetvl.migrate.training_keys import Devices, Wanted, sections
from duetvl.models.qwen_vl.config import ModelConfig, published_config, published_names
from duetvl.storage.files import read_object
from duetvl.training.recipe.reading import check_layers, make_recipe
from duetvl.training.recipe.yaml_values import write_yaml

_VISION_LAYERS: Final = "image_encoder.vision_encoder.pipeline_num_layers"
_TOWERS: Final = {"vision": "image_encoder.vision_encoder", "language": "text_decoder"}
_SELECTIVE: Final = "selective recomputes MLPs in both towers, not attention"
_TEXT_LAYERS: Final = "text_decoder.pipeline_num_layers"


@dataclass(frozen=True)
class Imported:
    """A recipe as text, and the report that goes with it."""

    text: str
    report: Report
    summary: str


def import_run(
    data: Path, model: Path, script: Path, *, variables: Mapping[str, str] | None = None, allow_unknown: bool = False
) -> Imported:
    """The recipe of a MindSpeed-MM run. `variables` replace the script's. Nothing of the script is executed.

    Raises ConfigError for files that cannot be read, keys that are not known (unless they are allowed), values that
    only running the script would give, and what does not make a valid recipe.
    """
    report = Report()
    values = {
        "data": Values(DATA, _flat(read_object(data, ConfigError)), report),
        "model": Values(MODEL, _flat(read_object(model, ConfigError)), report),
    }
    read = _read_script(script, variables or {}, report)
    start = training_start(read, script)
    values["script"] = Values(SCRIPT, _arguments(read, start, script, report, allow_unknown), report)
    devices = Devices(read, start, str(script))
    made = _Import(values["data"], values["model"], values["script"], report, devices).sections()
    for given in values.values():
        given.account(allow_unknown=allow_unknown)
    for name in dict.fromkeys(read.exported):
        report.add("not needed", name, "variables of the environment are for its programs and devices")
    for file in read.sourced:
        report.add("not needed", f"source {file}", "variables of the environment are for its programs and devices")
    for name, taken in read.variables.assumed.items():
        report.add("assumed", f"argument {name}" if name.isdigit() else name, taken)
    recipe = make_recipe(made, name=script.stem)
    mesh = recipe.parallel.mesh
    what = ("dpo" if recipe.dpo else "sft") + (" with lora" if recipe.lora else "")
    summary = (
        f"{what}, pp {mesh.pp} x dp {mesh.dp} x cp {mesh.cp} x tp {mesh.tp} on {mesh.size} "
        f"device{'s' * (mesh.size > 1)}, {recipe.train.global_batch} samples a step"
    )
    return Imported(_text(made, data, model, script), report, summary)


class _Import:
    """One import: the three inputs, and what is found out about them together."""

    def __init__(self, data: Values, model: Values, script: Values, report: Report, devices: Devices) -> None:
        self.data, self.model, self.script, self.report = data, model, script, report
        self.devices = devices

    def sections(self) -> dict[str, Any]:
        """The recipe's sections, without those that take their defaults."""
        config = self._published()
        self._compare(config)
        wanted = Wanted(self._gated(config), self._pairs(), self._evaluates(), self._frozen())
        made = sections(self.script, self.devices, wanted, self.report)
        made["model"] = {"path": self._path(), **made.pop("model"), **self._freeze(wanted.frozen)}
        made["data"] = {**data_section(self.data, self.report), **made.pop("data")}
        made["train"] |= self._recompute()
        made["parallel"] |= self._layers(made["parallel"]["pp"], config)
        order = ("model", "data", "train", "optim", "lora", "dpo", "parallel", "checkpoint", "log", "backend")
        return {name: made[name] for name in order if made.get(name) or (name in ("lora", "dpo") and name in made)}

    def _pairs(self) -> bool:
        """Whether it is DPO."""
        collate = self.data.text("dataloader_param.collate_param.model_name") or ""
        ranking = self.data.switch("dataset_param.attr.ranking")
        if ranking != collate.endswith("_dpo") and collate:
            self.report.add(
                "contradiction", "attr.ranking",
                f"{json.dumps(ranking)}, but collate_param.model_name is {collate}; taken as "
                f"{'pairs of answers' if ranking else 'conversations'}",
            )  # fmt: skip
        return ranking

    def _evaluates(self) -> bool:
        basic = "dataset_param.basic_parameters."
        return bool(self.data.peek(f"{basic}val_dataset") or self.data.peek(f"{basic}val_rate"))

    def _path(self) -> str:
        path = self.data.text("dataset_param.preprocess_parameters.model_name_or_path")
        if not path:
            raise ConfigError(
                f"{DATA.title}: dataset_param.preprocess_parameters.model_name_or_path is missing: the directory of "
                f"the Hugging Face model"
            )
        self.report.add("used", "model_name_or_path", f"model.path: {path}; no converted weights are needed")
        return path

    def _frozen(self) -> tuple[str, ...]:
        keys = {
            "vision_encoder": ("image_encoder.vision_encoder", True),
            "vision_projector": ("image_encoder.vision_projector", False),
            "text_decoder": ("text_decoder", False),
        }
        return tuple(part for part, (key, usual) in keys.items() if self.model.switch(f"{key}.freeze", usual))

    def _freeze(self, frozen: Sequence[str]) -> dict[str, Any]:
        parts = [PARTS[part] for part in frozen]
        default = "" if "image_encoder.vision_encoder.freeze" in self.model else " (its default for the vision tower)"
        self.report.add("used", "freeze", f"model.freeze: {', '.join(parts) or 'nothing'}{default}")
        return {"freeze": parts} if parts else {}

    def _recompute(self) -> dict[str, Any]:
        """model.json's word for each tower, else the script's for both."""
        both = self.script.text("--recompute-granularity")
        if self.script.switch("--recompute-activations"):
            both = both or "selective"
        keys = {part: f"{key}.recompute_granularity" for part, key in _TOWERS.items()}
        found = {part: self.model.text(key) or both for part, key in keys.items()}
        for part, value in found.items():
            if value not in (None, "full", "selective"):
                raise ConfigError(f"{MODEL.title}: {keys[part]} is {value!r}, expected full or selective")
        whole = [part for part, value in found.items() if value == "full"]
        if not any(found.values()):
            return {}
        ours = "selective" if not whole else "full" if len(whole) == 2 or "selective" in found.values() else whole[0]
        said = ", ".join(f"{part} {value}" for part, value in found.items() if value)
        if "selective" in found.values():
            self.report.add("changed", "recompute_granularity", f"{said}: train.recompute: {ours} - {_SELECTIVE}")
        else:
            self.report.add("used", "recompute_granularity", f"{said}: train.recompute: {ours}")
        return {"recompute": ours}

    # -- the model ------------------------------------------------------------------------------------------------

    def _family(self) -> str:
        name = self.model.text("model_id") or ""
        if name not in FAMILIES:
            raise ConfigError(f"{MODEL.title}: model_id is {name!r}{did_you_mean(name, FAMILIES)}")
        return FAMILIES[name]

    def _published(self) -> ModelConfig | None:
        """The published model of these sizes."""
        family = self._family()
        sizes = (self.model.peek("text_decoder.num_layers"), self.model.peek("text_decoder.hidden_size"))
        for name in published_names():
            config = published_config(name)
            if name.startswith(f"{family}-") and (config.text.num_layers, config.text.hidden_size) == sizes:
                self.report.add("used", "model_id", f"{name}: {sizes[0]} layers of width {sizes[1]}")
                self._compare_path(name)
                return config
        self.report.add("used", "model_id", f"{family} of no published size ({sizes[0]} layers of width {sizes[1]})")
        return None

    def _compare_path(self, name: str) -> None:
        """The directory's name may say another size, as where a data.json was copied from another model's."""
        path = str(self.data.peek("dataset_param.preprocess_parameters.model_name_or_path") or "")
        other = next((known for known in published_names() if known in path and known != name), None)
        if other is not None:
            self.report.add(
                "contradiction", "model_name_or_path", f"{path} looks like {other}, model.json is of {name}; the "
                f"directory is what is trained",
            )  # fmt: skip

    def _gated(self, config: ModelConfig | None) -> bool:
        return config.vision.mlp == "gated" if config else self._family() == "Qwen2.5-VL"

    def _compare(self, config: ModelConfig | None) -> None:
        """Tell where model.json has other numbers than the published model, or than the script."""
        for key, path in SHAPES.items() if config else ():
            given, known = self.model.peek(key), _attribute(config, path)
            if given is not None and given != known:
                self.report.add(
                    "contradiction", key, f"{given}, the published model has {known}; its config.json decides"
                )
        for argument, key in (("--seq-length", "text_decoder.seq_length"), ("--vocab-size", "text_decoder.vocab_size"),
                              ("--num-layers", "text_decoder.num_layers"),
                              ("--hidden-size", "text_decoder.hidden_size")):  # fmt: skip
            ours, theirs = self.script.peek(argument), self.model.peek(key)
            if ours is not None and theirs is not None and str(ours) != str(theirs):
                which = "the script's is taken" if argument == "--seq-length" else "config.json decides"
                self.report.add("contradiction", argument, f"{ours}, but {key} is {theirs}; {which}")

    def _layers(self, pp: int, config: ModelConfig | None) -> dict[str, Any]:
        """pipeline_num_layers of both towers, compared with the script's stages."""
        found = {"vision_layers": self.model.get(_VISION_LAYERS), "language_layers": self.model.get(_TEXT_LAYERS)}
        rows = {name: _rows(value, name) for name, value in found.items() if value is not None}
        for name, value in rows.items():
            if any(len(row) != pp for row in value):
                raise ConfigError(
                    f"{MODEL.title}: pipeline_num_layers {json.dumps(found[name])} is for {len(value[0])} stages, the "
                    f"script has --pipeline-model-parallel-size {pp}; correct one of them, or give its variable here "
                    f"(PP={len(value[0])})"
                )
        virtual = self.script.whole("--virtual-pipeline-model-parallel-size") or 1
        rows_there = len(rows["language_layers"]) if "language_layers" in rows else virtual
        if virtual != rows_there:
            self.report.add(
                "contradiction", "--virtual-pipeline-model-parallel-size",
                f"{virtual}, but pipeline_num_layers has {rows_there} rows, which are taken",
            )  # fmt: skip
        checked = make_recipe({"model": {"path": "-"}, "data": {"train": "-"}, "parallel": {"pp": pp, **rows}})
        if config is not None:
            check_layers(checked.parallel, config)
        if pp == 1 and virtual == 1:
            return {}
        for name in rows:
            self.report.add("used", "pipeline_num_layers", f"parallel.{name}: {json.dumps(found[name])}")
        return {name: value[0] if len(value) == 1 else value for name, value in rows.items()}


def _rows(value: Any, name: str) -> list[list[int]]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and row and all(type(count) is int for count in row) for row in rows):
        raise ConfigError(
            f"{MODEL.title}: pipeline_num_layers ({name}) is {json.dumps(value)}, expected numbers of layers"
        )
    return rows


def _attribute(config: ModelConfig | None, path: str) -> Any:
    value: Any = config
    for name in path.removeprefix("!").split("."):
        value = getattr(value, name)
    value = not value if path.startswith("!") else value
    return list(value) if isinstance(value, tuple) else value


# -- reading ---------------------------------------------------------------------------------------------------------


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; an empty object has none."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_script(path: Path, variables: Mapping[str, str], report: Report) -> Script:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        read = read_script(text, variables)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name in variables:
        if not (name.isidentifier() and re.search(rf"\b{name}\b", text)):
            names = sorted(read.variables.values.keys() - variables.keys())
            raise ConfigError(f"{path}: has no variable {name!r}{did_you_mean(name, names)}")
    if "\r\n" in text:
        report.add(
            "changed", "line ends", "of Windows, which the shell itself stumbles over; they are read as ends of lines"
        )
    return read


def _arguments(read: Script, start: Start, path: Path, report: Report, allow_unknown: bool) -> dict[str, Any]:
    """The program's arguments by name: True for a switch, a text, or a list of texts."""
    found: dict[str, Any] = {}
    for name, words in options(start.arguments):
        taken, stray = _split(name, words)
        if stray:
            missing = next((word.missing for word in stray if word.missing), "")
            said = " ".join(word.text for word in stray)
            what = f"{missing}, so what it adds is not known" if missing else f"{said!r} belongs to no option"
            after = f" after {name}" if name else ""
            if not allow_unknown:
                raise ConfigError(f"{path}: {what}{after}{_advice(missing, read)}; --allow-unknown goes on without it")
            report.add("unknown", said or "a variable", f"{what}{after}")
        if not name:
            continue
        value = _value(name, taken, path, read)
        if found.get(name, value) != value:
            report.add("contradiction", name, f"given twice; the last one counts: {value}")
        found[name] = value
    return found


def _split(name: str, words: Sequence[Text]) -> tuple[Sequence[Text], Sequence[Text]]:
    """The values of an argument, and words that are none of it."""
    if name not in set(SCRIPT.known()):
        return (words, ()) if name else ((), words)
    most = {"switch": 0, "one": 1, "many": len(words)}[SCRIPT.arity(name)]
    return words[:most], words[most:]


def _advice(missing: str, read: Script) -> str:
    """What to do about a value that the script does not say."""
    name, _, rest = missing.partition(" ")
    if name in read.variables.values or rest.startswith("is not set in the script"):
        return f"; give it here: {name}=..."
    return "; write it into a copy of the script" if missing else ""


def _value(name: str, words: Sequence[Text], path: Path, read: Script) -> Any:
    arity = SCRIPT.arity(name)
    if arity == "switch" or (not words and name not in SCRIPT.used):
        return True
    missing = next((word.missing for word in words if word.missing), "")
    if name in SCRIPT.used and (missing or not words):
        raise ConfigError(f"{path}: {name}: {missing or 'it has no value'}{_advice(missing, read)}")
    return [word.text for word in words] if arity == "many" else " ".join(word.text for word in words)


# -- writing ---------------------------------------------------------------------------------------------------------


def _text(made: Mapping[str, Any], *sources: Path) -> str:
    """The recipe as it is written: sections apart, and where they come from on top."""
    head = f"# Made by `duetvl import-mindspeed {' '.join(path.name for path in sources)}`.\n"
    return head + "".join(f"\n{write_yaml({name: values}, flow=True)}" for name, values in made.items())


def key_tables() -> str:
    """All keys as markdown tables; docs/migrating_keys.md holds exactly this."""
    lines = ["# Keys of MindSpeed-MM", "", _PREFACE.strip(), ""]
    for table in TABLES:
        lines += [f"## {table.title}", "", "| key | in a recipe |", "|---|---|"]
        lines += _rows_of(table.used, lambda text: text)
        lines += _rows_of(table.not_needed, lambda text: f"not needed: {text}")
        lines += _rows_of(table.cannot, lambda text: f"refused: {text}")
        lines.append("")
    return "\n".join(lines)


def _rows_of(keys: Mapping[str, str], words: Callable[[str], str]) -> Iterator[str]:
    return (f"| `{key}` | {words(text)} |" for key, text in keys.items())


_PREFACE = """
<!-- Made by `duetvl.migrate.importer.key_tables()`; a test holds that it is current. -->

What [`duetvl import-mindspeed`](migrating.md) does with every key of `data.json` and `model.json` and every argument of
a training script. `*` stands for anything. Fields are described in [recipe.md](recipe.md).
"""
