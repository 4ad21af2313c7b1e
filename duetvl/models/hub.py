"""Where a model is: a directory, or an id whose files are fetched from Hugging Face or ModelScope.

`ckpt/Qwen2.5-VL-7B-Instruct` is a directory if there is one, whatever its name looks like. Otherwise
`Qwen/Qwen2.5-VL-7B-Instruct` is fetched by huggingface_hub and `modelscope:Qwen/Qwen2.5-VL-7B-Instruct` by modelscope.
Both keep a cache (HF_HOME, MODELSCOPE_CACHE), which is used as it is where there is no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from duetvl.core.errors import CheckpointError

MODELSCOPE: Final = "modelscope:"
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SETTINGS: Final = ("*.json", "*.txt", "*.jinja", "LICENSE*")  # tokenizers, templates, settings
_WEIGHTS: Final = ("*.safetensors",)


def is_id(path: str | Path) -> bool:
    """Whether this names a model of a hub: no directory is called so, and it has an owner and a name."""
    text = str(path)
    return not Path(path).is_dir() and (text.startswith(MODELSCOPE) or _ID.fullmatch(text) is not None)


def model_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model, fetched if `path` is an id; without `weights` only what is needed to encode records.

    Raises CheckpointError where an id is given and it can neither be fetched nor is in the cache. What is neither a
    directory nor an id is handed back as it is: who reads it says what it lacks.
    """
    if not is_id(path):
        return Path(path)
    patterns = [*_SETTINGS, *(_WEIGHTS if weights else ())]
    text = str(path)
    if text.startswith(MODELSCOPE):
        return _fetched(text.removeprefix(MODELSCOPE), "ModelScope", _modelscope, patterns)
    return _fetched(text, "Hugging Face", _hugging_face, patterns)


Download = Callable[[str, list[str], bool], str]


def _fetched(model: str, hub: str, download: Download, patterns: list[str]) -> Path:
    if not _ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is no id of {hub}: expected OWNER/NAME, such as Qwen/Qwen2.5-VL-7B-Instruct")
    try:
        return Path(download(model, patterns, False))
    except CheckpointError:
        raise
    except Exception as error:  # whatever their HTTP clients raise, which differs between versions
        cause = _first_line(error)
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__
