"""LLaMA-Factory's model and fine-tuning keys to the sections `model`, `lora` and `dpo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.llamafactory.keys import Keys
from duetvl.models.qwen_vl.config import ModelConfig, load_config, published_config

_FROZEN: Final = {
    "vision": "freeze_vision_tower", "projector": "freeze_multi_modal_projector", "language": "freeze_language_model",
}  # fmt: skip
_PREFERENCE: Final = ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "ref_model")


def model_section(keys: Keys, method: str) -> dict[str, Any]:
    """Path, dtype and what is frozen. `method`: full, freeze or lora."""
    path = keys.text("model_name_or_path")
    if not path:
        raise ConfigError(f"{keys.table.title}: model_name_or_path is missing: the model to train")
    keys.note("model_name_or_path", f"model.path: {path}")
    section: dict[str, Any] = {"path": path, "dtype": _dtype(keys)}
    frozen = [part for part, key in _FROZEN.items() if keys.switch(key)]
    if method == "lora":
        for part, key in _FROZEN.items():
            keys.note(key, f"{part} gets {'no adapters' if part in frozen or part == 'projector' else 'adapters'}")
        return section
    for part, key in _FROZEN.items():
        keys.note(key, "model.freeze: " + (part if part in frozen else f"without {part}"))
    if method == "freeze":
        frozen = _whole_layers(keys, path, frozen)
    return section | {"freeze": frozen}


def _dtype(keys: Keys) -> str:
    bf16, fp16 = keys.switch("bf16") or keys.switch("pure_bf16"), keys.switch("fp16")
    if bf16 and fp16:
        raise ConfigError(f"{keys.table.title}: bf16 and fp16 are both true; remove one of them")
    dtype = "bfloat16" if bf16 else "float16" if fp16 else "float32"
    for key in ("bf16", "fp16"):
        if key in keys:
            keys.note(key, f"model.dtype: {dtype}")
    if keys.switch("pure_bf16"):
        keys.note("pure_bf16", f"model.dtype: {dtype} - with float32 master weights beside it", changed=True)
    if not bf16 and not fp16:
        keys.report.add("added", "model.dtype", "float32, as neither bf16 nor fp16 is true")
    return dtype


def _whole_layers(keys: Keys, path: str, frozen: list[str]) -> list[str]:
    """`finetuning_type: freeze`: all but the last N layers of the language model is frozen, or but the first N."""
    title = keys.table.title
    for key, usual in (("freeze_trainable_modules", "all"), ("freeze_extra_modules", None)):
        if keys.get(key, usual) != usual:
            keys.report.lacks(title, key, ": duetvl's import leaves whole layers trained, all of their modules")
    if "freeze_trainable_modules" in keys:
        keys.note("freeze_trainable_modules", "all modules of the trained layers")
    if "vision" not in frozen:
        keys.report.lacks(title, "freeze_vision_tower: false", ": with finetuning_type freeze, vision is kept frozen")
    config = _config(path)
    total, count = config.text.num_layers, keys.whole("freeze_trainable_layers")
    rest = f"0-{total - count - 1}" if count > 0 else f"{-count}-{total - 1}"
    patterns = [f"model.layers.{rest}"] if abs(count) < total else []
    keys.note("freeze_trainable_layers", f"model.freeze: {patterns[0] if patterns else 'no layer'} of {total} layers")
    head = [] if config.tie_word_embeddings else ["lm_head"]
    return ["vision", "projector", *patterns, "model.embed_tokens", "model.norm", *head]


def _config(path: str) -> ModelConfig:
    if Path(path).expanduser().is_dir():
        return load_config(Path(path).expanduser())
    try:
        return published_config(path)
    except ConfigError:
        raise ConfigError(
            f"model_name_or_path {path}: finetuning_type freeze counts its layers, and it is neither a directory nor a "
            f"published model; give its directory"
        ) from None


def lora_section(keys: Keys) -> dict[str, Any]:
    """Adapters: rank, alpha, dropout and which layers get one."""
    adapters = keys.names("adapter_name_or_path")
    if len(adapters) > 1 or (adapters and keys.switch("create_new_adapter")):
        keys.report.lacks(
            keys.table.title, "adapter_name_or_path", ": merge adapters into the model first, with `duetvl merge`"
        )
    if adapters:
        keys.note("adapter_name_or_path", f"lora.adapter: {adapters[-1]}, with its rank, alpha and layers")
        return {"adapter": adapters[-1]}
    rank = keys.take("lora_rank", "lora.rank", whole=True, least=1)
    alpha = float(keys.number("lora_alpha", 2 * rank))
    keys.note("lora_alpha", f"lora.alpha: {alpha:g}")
    dropout = keys.take("lora_dropout", "lora.dropout")
    section: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": _targets(keys)}
    for key, field in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if keys.switch(key):
            section[field] = True
            keys.note(key, f"lora.{field}: true")
    return section


def _targets(keys: Keys) -> list[str]:
    """`all` is every linear layer of the parts that are not frozen, and never the projector."""
    names = keys.names("lora_target")
    parts = [part for part in ("language", "vision") if not keys.switch(_FROZEN[part])]
    if not parts:
        raise ConfigError(
            f"{keys.table.title}: freeze_vision_tower and freeze_language_model are both true, so no layer gets an "
            f"adapter; set one of them to false"
        )
    prefixes = {"language": "model.layers.*.", "vision": "visual.blocks.*."}
    targets = parts if names == ["all"] else [prefixes[part] + name for name in names for part in parts]
    if len(parts) == 2 and names != ["all"]:
        targets = names
    keys.note("lora_target", f"lora.targets: {', '.join(targets)}")
    return targets


def dpo_section(keys: Keys) -> dict[str, Any]:
    """The preference loss and its reference."""
    section: dict[str, Any] = {"loss": keys.one_of("pref_loss", ("sigmoid", "hinge", "ipo"))}
    keys.note("pref_loss", f"dpo.loss: {section['loss']}")
    for key, field in (("pref_beta", "beta"), ("pref_ftx", "pref_ftx"), ("dpo_label_smoothing", "label_smoothing")):
        section[field] = keys.take(key, f"dpo.{field}")
    if reference := keys.text("ref_model"):
        section["reference"] = reference
        keys.note("ref_model", f"dpo.reference: {reference}")
    return section


def unused_preferences(keys: Keys) -> None:
    """Note the keys of DPO in a file whose stage is another; they have no effect there either."""
    for key in _PREFERENCE:
        if keys.peek(key) is not None:
            keys.report.add("not needed", key, "stage is not dpo")
