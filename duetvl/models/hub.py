"""Ids of models, whose files are fetched from Hugging Face or ModelScope.

`ckpt/Qwen2.5-VL-7B-Instruct` is a directory if there is one, whatever its name looks like. Otherwise
`Qwen/Qwen2.5-VL-7B-Instruct` is fetched by huggingface_hub and `modelscope:Qwen/Qwen2.5-VL-7B-Instruct` by modelscope.
Both keep a cache (HF_HOME, MODELSCOPE_CACHE), which is used as it is where there is no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from duetvl.core.errors import CheckpointError, first_line
from duetvl.models.settings import SETTINGS

MODELSCOPE: Final = "modelscope:"
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIG: Final = ("config.json", "*.safetensors.index.json")
_WEIGHTS: Final = ("*.safetensors",)


def is_id(path: str | Path) -> bool:
    """Whether this names a model of a hub: no directory is called so, and it has an owner and a name."""
    text = str(path)
    return not Path(path).is_dir() and (text.startswith(MODELSCOPE) or _ID.fullmatch(text) is not None)


def fetch(model: str, *, weights: bool) -> Path:
    """The directory that an id's files were fetched to; without `weights` only what is needed to encode records.

    Raises CheckpointError where they can neither be fetched nor are in the cache.
    """
    patterns = [*_CONFIG, *SETTINGS, *(_WEIGHTS if weights else ())]
    if model.startswith(MODELSCOPE):
        return _fetched(model.removeprefix(MODELSCOPE), "ModelScope", _modelscope, patterns)
    return _fetched(model, "Hugging Face", _hugging_face, patterns)


Download = Callable[[str, list[str], bool], str]


def _fetched(model: str, hub: str, download: Download, patterns: list[str]) -> Path:
    if not _ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is no id of {hub}: expected OWNER/NAME, such as Qwen/Qwen2.5-VL-7B-Instruct")
    try:
        return Path(download(model, patterns, False))
    except CheckpointError:
        raise
    except Exception as error:  # whatever their HTTP clients raise, which differs between versions
        cause = first_line(error)
    try:
        return Path(download(model, patterns, True))  # ModelScope's does not look there by itself
    except Exception:
        raise CheckpointError(
            f"{model}: no such directory, and {hub} did not give it ({cause}); give the directory of a model, or fetch "
            f"it where there is a network and point the library's cache there ({_CACHES[hub]})"
        ) from None


_CACHES: Final = {"Hugging Face": "HF_HOME", "ModelScope": "MODELSCOPE_CACHE"}


def _hugging_face(model: str, patterns: list[str], cache_only: bool) -> str:
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, allow_patterns=patterns, local_files_only=cache_only))


def _modelscope(model: str, patterns: list[str], cache_only: bool) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{MODELSCOPE}{model}: needs the modelscope library, which is not installed: pip install modelscope; or "
            f"give the directory of a model"
        ) from None
    return str(snapshot_download(model, allow_patterns=patterns, local_files_only=cache_only))
