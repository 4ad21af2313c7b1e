"""Models by whatever holds them: a Hugging Face directory or id, a run, an adapter, a MindSpeed-MM directory.

Nothing is converted on disk, and of a tensor no more than the box that is asked for is read. What they are to those who
use them is a `ModelDirectory` like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.convert.layouts import EMBEDDING, Model
from duetvl.convert.mindspeed import MindSpeedDirectory, is_mindspeed, open_mindspeed
from duetvl.convert.names import INTERLEAVED, VisionOrder
from duetvl.convert.sources import WEIGHTS, open_source
from duetvl.convert.streaming import FragmentedTensors
from duetvl.convert.verify import differing_copies
from duetvl.convert.vision_order import OLD_RELEASES, find_order
from duetvl.core.boxes import Box, Shape
from duetvl.core.errors import CheckpointError, ConfigError, DuetvlError
from duetvl.models.hub import is_id
from duetvl.models.lora import Adapters
from duetvl.models.model_directory import AdapterTensors, ModelDirectory
from duetvl.models.model_directory import open_model as open_plain
from duetvl.models.qwen_vl.adapters import linear_shapes, open_adapter_for
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.merged import MergedWeights
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.checkpoint_format import StoredCheckpoint
from duetvl.storage.files import read_object
from duetvl.storage.finding import CheckpointRef, find_checkpoint, has_checkpoint, parse_run
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import ModelWeights, check_weights, fingerprint

_CONFIG: Final = "config.json"
_ADAPTER: Final = "adapter_config.json"
_EXPECTED: Final = (
    f"a model ({_CONFIG}), a run (checkpoints/), an adapter ({_ADAPTER}) or a MindSpeed-MM checkpoint (mp_rank_*)"
)


def open_model(
    model: str | Path | ModelDirectory, *, base: str | Path | None = None, weights: bool = True
) -> ModelDirectory:
    """Find a model, whatever holds it: a Hugging Face directory or id; a run `RUN` or `RUN@STEP`, full or LoRA; an
    adapter; a MindSpeed-MM directory (release or iteration).

    `base` is the directory or id of the model in the Hugging Face layout that configuration and tokenizer come from
    where they are not there: of a MindSpeed-MM directory it must be given (or lie in it), of an adapter it is the model
    below, of a run the model that it started from; both are known by what they name. Without `weights`, only what is
    needed to encode records is fetched. CheckpointError says what was found instead of a model.
    """
    if isinstance(model, ModelDirectory):
        return open_plain(model, weights=weights)
    name, path = str(model), Path(model)
    if is_id(name) or (not path.exists() and "@" not in name):
        return _plain(name, base, weights)
    run, step = (path, None) if path.is_dir() else parse_run(name)
    if step is not None or has_checkpoint(run):
        return _open_run(name, run, step, base, weights)
    if is_mindspeed(path) and not any(path.glob("*.safetensors")):  # a model may have a directory called `release`
        return _open_mindspeed(name, path, base, weights)
    if (path / _ADAPTER).is_file() and not (path / _CONFIG).is_file():
        return _open_adapter(name, path, base, weights)
    if (path / "export" / _CONFIG).is_file() and not (path / _CONFIG).is_file():
        raise CheckpointError(f"{path}: has no checkpoint; give the model that it exported: {path / 'export'}")
    if not path.is_dir() or not (path / _CONFIG).is_file():
        raise CheckpointError(f"{path}: is not a model: expected {_EXPECTED}, found {_held_by(path)}")
    return _plain(name, base, weights)


def _plain(name: str, base: str | Path | None, weights: bool) -> ModelDirectory:
    if base is not None:
        raise ConfigError(f"{name}: is a model in the Hugging Face layout, which needs no base; leave out {base}")
    return open_plain(name, weights=weights)


def _held_by(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir())
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "an empty directory"


# -- tensors in boxes -------------------------------------------------------------------------------------------------


class BoxedWeights:
    """Tensors that lie in boxes in many files, as a model's weights."""

    def __init__(self, directory: Path, tensors: FragmentedTensors):
        self.directory, self._tensors = directory, tensors
        places = ((name, next(iter(parts.values()))) for name, parts in tensors.fragments.items())
        self._places = {name: (str(part.store.path), number) for number, (name, part) in enumerate(places)}

    @property
    def names(self) -> Collection[str]:
        """See ModelWeights."""
        return self._tensors.specs.keys()

    def spec(self, name: str) -> TensorSpec:
        """See ModelWeights."""
        return self._tensors.specs[name]

    def view(self, name: str, shape: Shape | None = None) -> np.ndarray:
        """See ModelWeights; put together in memory where it lies in several files."""
        whole = self._tensors.read(name, Box.whole(self.spec(name).shape))
        return whole if shape is None else whole.reshape(shape)

    def read(self, name: str, box: Box, shape: Shape | None = None) -> np.ndarray:
        """See ModelWeights; all tensors have the model's own shapes."""
        if not box.inside(self.spec(name).shape):
            raise ValueError(f"{name} {self.spec(name).shape} does not contain {box}")
        return self._tensors.read(name, box)

    def release(self, name: str) -> None:
        """See ModelWeights."""
        self._tensors.release(name)

    def place(self, name: str) -> tuple[str, int]:
        """See ModelWeights."""
        return self._places[name]

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """See ModelWeights."""
        check_weights(self, shapes)


# -- MindSpeed-MM -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MindSpeedModel(ModelDirectory):
    """`path` and `config` are those of `base`."""

    checkpoint: Path = Path()
    base: ModelDirectory | None = None

    @cached_property
    def weights(self) -> ModelWeights:
        """See ModelDirectory. CheckpointError where they are not those of the base's configuration."""
        directory, model = open_mindspeed(self.checkpoint), Model.of(self.config)
        layout = replace(directory.layout, replicate_kv=True)
        directory.logical(model, layout)  # what is missing is named before orders are compared
        order = self._vision_order(directory, model)
        tensors = directory.logical(model, replace(layout, vision_qkv=order))
        for difference in differing_copies(directory.path, tensors, only=(EMBEDDING,)):
            raise CheckpointError(
                f"{difference.name} {difference.text}, but {self.path / _CONFIG} ties the output head to the "
                f"embedding; set tie_word_embeddings to false there to have both"
            )
        return BoxedWeights(directory.path, tensors)

    def _vision_order(self, directory: MindSpeedDirectory, model: Model) -> VisionOrder:
        """As the base's weights show; that of present releases where it has none."""
        layout = replace(directory.layout, replicate_kv=True)
        if layout.canonical:
            return layout.vision_order
        try:
            order = find_order(directory, layout, model, open_source(self.path).tensors)
        except DuetvlError as error:
            warnings.warn(
                f"{directory.path}: the order of the vision tower's qkv cannot be seen ({error}); taken as interleaved "
                f"by heads, which {OLD_RELEASES} did otherwise",
                stacklevel=2,
            )
            return INTERLEAVED
        if order == "hf":
            warnings.warn(f"{directory.path}: read with the qkv order of {OLD_RELEASES}", stacklevel=2)
        return order

    @property
    def has_weights(self) -> bool:
        """See ModelDirectory."""
        return True


def _open_mindspeed(name: str, path: Path, base: str | Path | None, weights: bool) -> ModelDirectory:
    own = next((place for place in (path, path.parent) if (place / _CONFIG).is_file()), None)
    if base is None and own is None:
        raise CheckpointError(
            f"{path}: is a MindSpeed-MM checkpoint, which has neither configuration nor tokenizer; name the model in "
            f"the Hugging Face layout that it is of: --base DIR, model.base in a recipe, base= in Python"
        )
    below = open_plain(str(own) if base is None else base, weights=weights)
    return _MindSpeedModel(name, below.path, below.revision, checkpoint=path, base=below)


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RunModel(ModelDirectory):
    """The weights of the checkpoint in the directory `place`; `path` has the tokenizer and settings."""

    place: Path = Path()
    stated: ModelConfig | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """See ModelDirectory; the checkpoint says it."""
        assert self.stated is not None
        return self.stated

    @cached_property
    def weights(self) -> ModelWeights:
        """See ModelDirectory; their checksums are verified first."""
        return BoxedWeights(self.place, open_source(self.place).tensors)

    @property
    def has_weights(self) -> bool:
        """See ModelDirectory."""
        return True


def _open_run(name: str, run: Path, step: int | None, base: str | Path | None, weights: bool) -> ModelDirectory:
    if (run / _CONFIG).exists():
        raise CheckpointError(
            f"{run}: is a model ({_CONFIG}) and a run (checkpoints/) at once; give one of its checkpoints"
        )
    ref = find_checkpoint(run, step, kinds=())
    if not ref.meta.model_config:
        raise ConfigError(f"{ref.path}: does not name its model; give the run's export directory instead")
    config = ModelConfig.from_dict(ref.meta.model_config, source=f"{ref.path}: its model_config")
    has_adapters = bool(ref.meta.extra.get("base_model"))
    below = _started_from(ref, config, base, weights and has_adapters)
    if has_adapters:
        return AdapterModel(name, below.path, below.revision, base=below, place=ref.path, ref=ref)
    return _RunModel(name, below.path, below.revision, place=ref.path, stated=config)


def _started_from(ref: CheckpointRef, config: ModelConfig, base: str | Path | None, weights: bool) -> ModelDirectory:
    """The model that a run was started from: it has the tokenizer, and of a LoRA run the weights below."""
    given: Mapping[str, Any] = ref.meta.recipe.get("model", {})
    path = base if base is not None else given.get("path", "")
    hint = "name the model that it started from: --base DIR, model.base in a recipe, base= in Python"
    try:
        below = open_merged(path, base=None if base is not None else given.get("base"), weights=weights)
        same = parameter_shapes(below.config) == parameter_shapes(config)
    except DuetvlError as error:
        raise CheckpointError(
            f"{ref.path}: the model that its run started from cannot be read: {error}; {hint}"
        ) from None
    if not same:
        raise CheckpointError(f"{ref.path}: {str(path)!r} is not the model that its run started from; {hint}")
    return below


# -- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CheckpointAdapter:
    """The adapters that a checkpoint of a LoRA run holds."""

    checkpoint: StoredCheckpoint
    adapters: Adapters
    tensors: Collection[str]

    def read(self, path: str) -> tuple[np.ndarray, str]:
        """See AdapterTensors."""
        bits, dtype = self.checkpoint.read(WEIGHTS, path)
        return np.require(bits, requirements="A"), dtype


@dataclass(frozen=True)
class AdapterModel(ModelDirectory):
    """A model with a low-rank adapter, of a directory in PEFT's layout or of a LoRA run: `weights` are the model's."""

    base: ModelDirectory | None = None
    place: Path = Path()
    ref: CheckpointRef | None = None

    @property
    def below(self) -> ModelDirectory:
        """The model without the adapter."""
        assert self.base is not None
        return self.base

    @cached_property
    def config(self) -> ModelConfig:
        """See ModelDirectory."""
        return self.below.config

    @cached_property
    def weights(self) -> ModelWeights:
        """See ModelDirectory. CheckpointError where they are not those that a LoRA run's adapters were trained on."""
        known = {} if self.ref is None else self.ref.meta.extra["base_model"]
        if known.get("fingerprint") not in (None, found := fingerprint(self.below.weights)):
            raise CheckpointError(
                f"{self.place}: its adapters belong to {known.get('path')!r} with the weights {known['fingerprint']}, "
                f"those of {self.below.name} are {found}; name the model that it started from: --base DIR"
            )
        return self.below.weights

    @cached_property
    def adapter(self) -> AdapterTensors:
        """See ModelDirectory."""
        if self.ref is None:
            return open_adapter_for(self.config, self.place)
        return _adapter_of(self.ref, self.config)

    @property
    def has_weights(self) -> bool:
        """See ModelDirectory."""
        return self.below.has_weights


@dataclass(frozen=True)
class _MergedModel(ModelDirectory):
    """A model with its adapter put into its weights as they are read."""

    model: ModelDirectory | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """See ModelDirectory."""
        assert self.model is not None
        return self.model.config

    @cached_property
    def weights(self) -> ModelWeights:
        """See ModelDirectory."""
        assert self.model is not None and self.model.adapter is not None
        return MergedWeights(self.model.weights, self.model.adapter)

    @property
    def has_weights(self) -> bool:
        """See ModelDirectory."""
        assert self.model is not None
        return self.model.has_weights


def open_merged(
    model: str | Path | ModelDirectory, *, base: str | Path | None = None, weights: bool = True
) -> ModelDirectory:
    """`open_model`, an adapter put into the weights as they are read: what training starts from, or compares with."""
    found = open_model(model, base=base, weights=weights)
    if not isinstance(found, AdapterModel):
        return found
    return _MergedModel(found.name, found.path, found.revision, model=found)


def _adapter_of(ref: CheckpointRef, config: ModelConfig) -> _CheckpointAdapter:
    verified = find_checkpoint(ref.path, kinds=(WEIGHTS,))
    stored = verified.manifest.tensors.get(WEIGHTS, {})
    try:
        adapters = Adapters.from_json(ref.meta.extra["base_model"]["adapters"])
        shapes = adapters.shapes(linear_shapes(config))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{ref.path}: has no usable description of its adapters ({error!r})") from None
    if {name: tensor.shape for name, tensor in stored.items()} != shapes:
        raise CheckpointError(f"{ref.path}: its weights are not those of the adapters that it names")
    return _CheckpointAdapter(verified.stored, adapters, stored.keys())


def _open_adapter(name: str, path: Path, base: str | Path | None, weights: bool) -> ModelDirectory:
    named = read_object(path / _ADAPTER, CheckpointError).get("base_model_name_or_path")
    if base is None and (not isinstance(named, str) or not named):
        raise CheckpointError(f"{path}: is an adapter that does not name its model; give it: --base DIR")
    try:
        below = open_merged(str(named) if base is None else base, weights=weights)
        _ = below.config
    except DuetvlError as error:
        raise CheckpointError(
            f"{path}: is an adapter, and its base model cannot be read: {error}; name it: --base DIR"
        ) from None
    return AdapterModel(name, below.path, below.revision, base=below, place=path)
