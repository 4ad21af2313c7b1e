"""The files that make a model of a configuration and weights.

It is a closed list: what else lies in a model's directory (an adapter, a trainer's state, other forms of the weights)
is not part of the model, and is neither fetched nor copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SETTINGS: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
    "configuration.json", "LICENSE*", "LICENCE*", "NOTICE*", "README*",
)  # fmt: skip


def model_settings(directory: Path) -> list[Path]:
    """Those that a directory has, relative to it: tokenizer, template, settings of pictures, licence, card."""
    found = {file for pattern in SETTINGS for file in directory.glob(pattern) if file.is_file()}
    return [file.relative_to(directory) for file in sorted(found)]
