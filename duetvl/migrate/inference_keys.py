"""inference_*.json of MindSpeed-MM: what of it `duetvl infer` takes, and why the rest is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.inference.defaults import NOT_DONE, TAKEN, changes_tokens
from duetvl.migrate.reading import flat_keys
from duetvl.migrate.report import Report, Values
from duetvl.migrate.tables import MODEL, Table
from duetvl.storage.files import read_object
from duetvl.training.recipe.text import show

_GENERATION: Final = "generation_config."
_DTYPES: Final = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "fp32": "float32",
    "float32": "float32",
}  # fmt: skip
_NOT_DONE: Final[Mapping[str, tuple[Any, ...]]] = {**NOT_DONE, "num_return_sequences": (1,), "num_return_groups": (1,)}
_NO_BEAMS: Final = "beam search is not supported"
_HOW: Final = "how tokens are computed or returned; it does not affect them"

# What files of inference and of evaluation have alike.
HOW_IT_RUNS: Final = {
    "device": "--device", "dtype": "--dtype", "min_pixels": "--min-pixels", "max_pixels": "--max-pixels",
    "tokenizer.from_pretrained": "MODEL if none is given, otherwise --base of a MindSpeed-MM directory",
    f"{_GENERATION}do_sample": "--temperature 0 if it is false",
    f"{_GENERATION}max_new_tokens": "--max-new-tokens", f"{_GENERATION}min_new_tokens": "--min-new-tokens",
    f"{_GENERATION}eos_token_id": "--stop-token", f"{_GENERATION}stop_strings": "--stop",
    **{_GENERATION + name: f"--{name.replace('_', '-')}" for name in TAKEN},
}  # fmt: skip
INFERENCE: Final = Table(
    "inference.json",
    used={
        "image_path": "--image", "video_path": "--video", "prompts": "--prompt", **HOW_IT_RUNS,
    },
    not_needed={
        **MODEL.not_needed,
        **{f"{part}.freeze": "nothing is trained" for part in (
            "image_encoder.vision_encoder", "image_encoder.vision_projector", "text_decoder")},
        **{f"{part}.pipeline_num_layers": "the layout is read from the checkpoint's files" for part in (
            "image_encoder.vision_encoder", "text_decoder")},
        "*.recompute_granularity": "nothing is trained",
        "text_decoder.tokenizer_type": "tokenizer.json is read",
        "text_decoder.is_encoder_decoder": "these models are not",
        "pipeline_class": "there is only one pipeline", "model_id": "the family is read from config.json",
        "image_processer_path": "preprocessor_config.json of the model's directory is read",
        "image_processor_path": "preprocessor_config.json of the model's directory is read",
        "tokenizer.hub_backend": "tokenizer.json is read", "tokenizer.autotokenizer_name": "tokenizer.json is read",
        "tokenizer.*": "tokenizer.json is read",
        **dict.fromkeys((f"{_GENERATION}{name}" for name in (
            "length_penalty", "early_stopping", "num_assistant_tokens", "num_assistant_tokens_schedule",
            "prompt_lookup_num_tokens", "max_matching_ngram_size")), _NO_BEAMS),
        **dict.fromkeys((f"{_GENERATION}{name}" for name in (
            "kv_cache", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
            "return_dict_in_generate", "return_legacy_cache", "cache_implementation", "cache_config", "low_memory",
            "remove_invalid_values", "renormalize_logits", "split_batch")), _HOW),
        **dict.fromkeys((f"{_GENERATION}{name}" for name in (
            "bos_token_id", "pad_token_id", "vision_start_token_id", "image_token_id", "video_token_id",
            "decoder_start_token_id")), "ids are read from the model's config.json; there is no padding"),
        f"{_GENERATION}max_length": "max_new_tokens limits the answer",
        **dict.fromkeys((f"{_GENERATION}{name}" for name in _NOT_DONE), "only its value without effect is accepted"),
        f"{_GENERATION}tensor_model_parallel_size": "the layout is read from the checkpoint's files",
        f"{_GENERATION}pipeline_model_parallel_size": "the layout is read from the checkpoint's files",
    },
    cannot={**MODEL.cannot},
)  # fmt: skip


def read_inference(path: Path, *, allow_unknown: bool = False) -> tuple[dict[str, Any], Report]:
    """The options of `duetvl infer` that a file says, and what became of each of its keys.

    `media` is a list of (kind, path). Raises ConfigError for what is not known, or would change the answer and is not
    done, unless that is allowed and noted.
    """
    content = read_object(path, ConfigError)
    if not {"prompts", "generation_config", "pipeline_class"} & content.keys():
        raise ConfigError(
            f"{path}: is not an inference_*.json: it has none of prompts, generation_config, pipeline_class"
        )
    report = Report(allow_unknown)
    values = Values(INFERENCE, flat_keys(content), report)
    options = {**_asked(values, report), **where_it_runs(values, report), **how_tokens_are_chosen(values, report)}
    values.account()
    return options, report


def _asked(values: Values, report: Report) -> dict[str, Any]:
    """The prompt, its media, the model and where it runs."""
    found: dict[str, Any] = {}
    media = [(kind, values.text(f"{kind}_path")) for kind in ("image", "video")]
    found["media"] = [(kind, path) for kind, path in media if path]
    for kind, path in found["media"]:
        report.add("used", f"{kind}_path", f"--{kind} {path}")
    prompts = values.get("prompts")
    prompts = prompts[0] if isinstance(prompts, list) and len(prompts) == 1 else prompts
    if prompts is not None and not isinstance(prompts, str):
        raise ConfigError(f"{INFERENCE.title}: prompts is {show(prompts)}, expected one text; give others to --input")
    found["prompt"] = prompts
    if prompts is not None:
        report.add("used", "prompts", f"--prompt {prompts}")
    for name in ("min_pixels", "max_pixels"):
        if values.peek(name) is not None:
            option = f"--{name.replace('_', '-')} {values.peek(name)}"
            report.add("changed", name, f"{option}; MindSpeed-MM's pipeline ignores it")
    return found


def where_it_runs(values: Values, report: Report) -> dict[str, Any]:
    """The model, its device and dtype, and the bounds of pictures."""
    found: dict[str, Any] = {name: values.whole(name) for name in ("min_pixels", "max_pixels")}
    dtype = values.text("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"{values.table.title}: dtype is {show(dtype)}, expected one of {', '.join(_DTYPES)}")
    found["dtype"] = None if dtype is None else _DTYPES[dtype]
    found["device"], found["pretrained"] = values.text("device"), values.text("tokenizer.from_pretrained")
    for name in ("min_pixels", "max_pixels", "dtype", "device"):
        if found[name] is not None and not report.mentions(name):
            report.add("used", name, f"--{name.replace('_', '-')} {found[name]}")
    if found["pretrained"]:
        report.add("used", "tokenizer.from_pretrained", values.table.used["tokenizer.from_pretrained"])
    return found


def how_tokens_are_chosen(values: Values, report: Report) -> dict[str, Any]:
    """How tokens are chosen, and what ends an answer; what would change that and is not done is refused or noted."""
    found: dict[str, Any] = {name: values.number(_GENERATION + name) for name in TAKEN}
    found["top_k"] = values.whole(f"{_GENERATION}top_k")
    for name in ("max_new_tokens", "min_new_tokens"):
        found[name] = values.whole(_GENERATION + name)
    sampled = values.switch(f"{_GENERATION}do_sample", True)
    if not sampled:
        found |= {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
    if f"{_GENERATION}do_sample" in values:
        report.add("used", f"{_GENERATION}do_sample", "as the values below say" if sampled else "--temperature 0")
    ends = values.get(f"{_GENERATION}eos_token_id")
    ends = ends if isinstance(ends, list) or ends is None else [ends]
    if ends is not None and not all(isinstance(number, int) and not isinstance(number, bool) for number in ends):
        raise ConfigError(f"{values.table.title}: eos_token_id is {show(ends)}, expected token ids")
    found["stop_token"] = ends
    stops = values.get(f"{_GENERATION}stop_strings")
    found["stop"] = [stops] if isinstance(stops, str) else stops
    for name, value in found.items():
        key = {"stop_token": "eos_token_id", "stop": "stop_strings"}.get(name, name)
        if value is not None and not report.mentions(f"{_GENERATION}{key}"):
            report.add("used", _GENERATION + key, f"--{name.replace('_', '-')} {value}")
    for key, nothing in _NOT_DONE.items():
        value = values.peek(f"{_GENERATION}{key}")
        if changes_tokens(value, nothing):
            report.lacks(values.table.title, f"{_GENERATION}{key}", f" is {show(value)}, which is not done")
    return found
