"""Names of parameters: ours are those of the published checkpoints; other spellings on disk are translated here.

| | vision tower | language model | head |
|---|---|---|---|
| published, and canonical | `visual.` | `model.` | `lm_head.weight` |
| modules of transformers >= 4.52 | `model.visual.` | `model.language_model.` | `lm_head.weight` |
| the same without the head (`Qwen2_5_VLModel`) | `visual.` | `language_model.` | |
"""

from __future__ import annotations

from collections.abc import Callable

_SPELLINGS = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
)
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # buffers that old versions saved


def canonical_name(stored: str, *, tied: bool) -> str | None:
    """The path of the parameter that is stored under this name; None for what is no parameter.

    A head that is tied to the embedding is none, even where a checkpoint stores it again.
    """
    if stored.endswith(_COMPUTED) or (tied and stored == "lm_head.weight"):
        return None
    for spelling, canonical in _SPELLINGS:
        if stored.startswith(spelling):
            return canonical + stored.removeprefix(spelling)
    return stored


def canonical_names(tied: bool) -> Callable[[str], str | None]:
    """`canonical_name` for one model, as `duetvl.storage.weights_dir.open_weights` takes it."""
    return lambda stored: canonical_name(stored, tied=tied)


def module_name(canonical: str) -> str:
    """How transformers >= 4.52 calls a module, or a parameter, of a model with a head."""
    if canonical.startswith("visual."):
        return f"model.{canonical}"
    return canonical.replace("model.", "model.language_model.", 1) if canonical.startswith("model.") else canonical
