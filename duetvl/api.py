"""The facade: what a user imports."""

from __future__ import annotations

from pathlib import Path

from duetvl.data.encode import Processor
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.host import QwenVLFamily


def load_processor(path: str | Path) -> Processor:
    """The processor of a model directory: its tokenizer, template and picture settings.

    Needs config.json, tokenizer.json and preprocessor_config.json; no weights, no framework. Raises
    CheckpointError for what is missing or damaged, ConfigError for what duetvl does not implement.
    """
    return Processor.from_directory(path, QwenVLFamily(load_config(path)))
