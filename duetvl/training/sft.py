"""Supervised fine-tuning: which model is trained, and how a record becomes a sample of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from duetvl.convert.commands import export_mindspeed_mm
from duetvl.convert.layouts import Layout
from duetvl.core.backend import Backend
from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError, DataError
from duetvl.core.tensor_files import TensorSpec
from duetvl.data.encode import Processor
from duetvl.data.loader import Encode
from duetvl.data.records import Record
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.loading import load_model, save_model
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.training.loop import Job
from duetvl.training.objective import TokenLoss
from duetvl.training.sections import DataSection, Recipe


def prepare(recipe: Recipe, backend: Backend) -> Job:
    """Load what the recipe names."""
    dtype = recipe.model.dtype
    if not backend.device.supports(dtype):
        raise ConfigError(f"model.dtype {dtype}: the device {backend.device.name} does not have it; use float32")
    encode = record_encoder(recipe)
    model: QwenVL = load_model(recipe.model.path, backend=backend, dtype=dtype)
    model.freeze(recipe.model.freeze)
    export = save_mindspeed if recipe.checkpoint.export == "mindspeed_mm" else save_model
    return Job(
        model,
        TokenLoss(model, recipe.train.loss),
        encode,
        partial(export, model, overwrite=True),
        model.config.to_dict(),
    )


def save_mindspeed(model: QwenVL, directory: Path, *, overwrite: bool = False) -> None:
    """Write a model as a MindSpeed-MM release of one stage and rank."""
    ops, tensors = model.backend.ops, {name: p.tensor for name, p in model.parameters.items()}
    specs = {name: TensorSpec(ops.dtype_of(x), tuple(x.shape)) for name, x in tensors.items()}

    def fetch(name: str) -> np.ndarray:
        return model.backend.checkpoint_io.save(tensors[name])[0].reshape(specs[name].shape)

    layout = Layout.one_stage(model.config)
    export_mindspeed_mm(directory, model.config, specs, fetch, layout, overwrite=overwrite)


def record_encoder(recipe: Recipe) -> Encode:
    """A function from a record to its sample, with the processor of the recipe's model and its picture sizes."""
    processor = Processor.from_directory(recipe.model.path, QwenVLFamily(load_config(recipe.model.path)))
    _set_picture_sizes(processor, recipe.data)
    root = recipe.data.image_root

    def encode(record: Record) -> Sample:
        try:
            return processor.encode_record(
                record.values, media_dir=record.file.parent if root is None else root, sample_id=record.id
            )
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None

    return encode


def _set_picture_sizes(processor: Processor, data: DataSection) -> None:
    own = processor.image_settings
    settings = replace(
        own,
        min_pixels=own.min_pixels if data.min_pixels is None else data.min_pixels,
        max_pixels=own.max_pixels if data.max_pixels is None else data.max_pixels,
    )
    if settings.min_pixels > settings.max_pixels:
        raise ConfigError(
            f"data: pictures of at least {settings.min_pixels} and at most {settings.max_pixels} pixels are asked for, "
            f"one of which is the model directory's own; give data.min_pixels and data.max_pixels together"
        )
    processor.image_settings = settings
