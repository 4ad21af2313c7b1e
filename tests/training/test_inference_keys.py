"""inference_*.json of MindSpeed-MM as options of `duetvl infer`: each key is taken, or its reason is said."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from duetvl.commands.mindspeed import apply, apply_evaluation
from duetvl.core.errors import ConfigError
from duetvl.migrate.evaluation_keys import read_evaluation
from duetvl.migrate.inference_keys import read_inference

CONTENT: dict[str, Any] = {
    "pipeline_class": "Qwen2VlPipeline",
    "img_context_token_id": 151655,
    "image_encoder": {
        "vision_encoder": {"model_id": "qwen2vit", "num_layers": 32, "freeze": True, "pipeline_num_layers": [32, 0]},
        "vision_projector": {"model_id": "lnmlp", "freeze": True},
    },
    "text_decoder": {"model_id": "qwen2lm", "use_infer_fa": True, "is_encoder_decoder": False, "tokenizer_type": "HF"},
    "text_encoder": None,
    "dtype": "bf16",
    "device": "npu",
    "tokenizer": {"hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": "ckpt/hf/Qwen"},
    "generation_config": {
        "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001, "min_p": None, "repetition_penalty": 1.05,
        "max_new_tokens": 128, "min_new_tokens": None, "eos_token_id": [5, 6], "num_beams": 1, "typical_p": 1.0,
        "kv_cache": True, "max_length": 20, "pad_token_id": 5, "early_stopping": False, "stop_strings": "END",
        "token_healing": False, "cache_config": None,
    },
    "patch": {"infer_fa": True},
    "min_pixels": 1003520,
    "max_pixels": 12845056,
    "image_path": "demo.jpeg",
    "prompts": "Describe this image.",
}  # fmt: skip


def written(directory: Path, **changes: Any) -> Path:
    """The file with other values; `generation_config__num_beams` is the one of that section."""
    content = json.loads(json.dumps(CONTENT))
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (content[section] if section else content)[key] = value
    file = directory / "inference.json"
    file.write_text(json.dumps(content))
    return file


def test_every_key_is_taken_or_explained(tmp_path: Path) -> None:
    options, report = read_inference(written(tmp_path))
    assert options == {
        "prompt": "Describe this image.", "media": [("image", "demo.jpeg")], "pretrained": "ckpt/hf/Qwen",
        "dtype": "bfloat16", "device": "npu", "min_pixels": 1003520, "max_pixels": 12845056, "temperature": 0.1,
        "top_k": 1, "top_p": 0.001, "min_p": None, "repetition_penalty": 1.05, "max_new_tokens": 128,
        "min_new_tokens": None, "stop_token": [5, 6], "stop": ["END"],
    }  # fmt: skip
    told = {name for note in report.notes for name in note.key.split(", ")}

    def leaves(value: Any, path: str = "") -> list[str]:
        if not isinstance(value, dict):
            return [path]
        return [name for key, below in value.items() for name in leaves(below, f"{path}.{key}" if path else key)]

    assert set(leaves(CONTENT)) <= told
    text = "\n".join(report.lines())
    assert "--min-pixels 1003520; MindSpeed-MM's pipeline ignores it" in text
    assert "only its value without effect is accepted" in text


def test_without_sampling_it_is_greedy(tmp_path: Path) -> None:
    options, _ = read_inference(written(tmp_path, generation_config__do_sample=False))
    assert (options["temperature"], options["top_k"], options["top_p"]) == (0.0, None, None)
    assert options["repetition_penalty"] == 1.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_config__num_beams": 4}, "generation_config.num_beams is 4, which is not done"),
        ({"generation_config__no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ({"generation_config__bad_words_ids": [[1]]}, "bad_words_ids"),
        ({"generation_config__temprature": 1.0}, "did you mean 'generation_config.temperature'"),
        ({"audio_path": "x.wav"}, "audio_path is not known"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bf16"),
        ({"prompts": ["a", "b"]}, "expected one text; give others to --input"),
        ({"generation_config__eos_token_id": "x"}, "expected token ids"),
        ({"generation_config__top_k": 1.5}, "expected a whole number"),
    ],
)
def test_what_is_not_known_or_not_done_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_inference(written(tmp_path, **changes))
    assert message in str(caught.value)


def test_it_may_be_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, generation_config__num_beams=4, audio_path="x.wav")
    _, report = read_inference(file, allow_unknown=True)
    assert {"generation_config.num_beams", "audio_path"} <= {
        note.key for note in report.notes if note.kind == "unknown"
    }


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"dataset_param": {}}')
    with pytest.raises(ConfigError, match=r"data.json: is not an inference_\*.json"):
        read_inference(tmp_path / "data.json")


def test_options_of_the_user_come_first(tmp_path: Path) -> None:
    names = (
        "min_pixels max_pixels dtype device temperature top_k top_p min_p stop repetition_penalty max_new_tokens "
        "min_new_tokens stop_token input media base model prompt"
    )
    given = Namespace(**dict.fromkeys(names.split()), from_mindspeed=written(tmp_path), allow_unknown=False)
    given.model, given.prompt = "hf", "mine"
    given.temperature, given.device = 0.0, "cpu"
    lines = list(apply(given))
    assert (given.prompt, given.media) == ("mine", None)
    assert (given.temperature, given.device, given.top_k, given.model, given.base) == (0.0, "cpu", 1, "hf", None)
    assert any("--temperature 0.1" in line for line in lines)
    (tmp_path / "mm" / "release").mkdir(parents=True)
    given.model = str(tmp_path / "mm")
    list(apply(given))
    assert given.base == "ckpt/hf/Qwen"


# -- evaluate_*.json --------------------------------------------------------------------------------------------------


def evaluation(directory: Path, **changes: Any) -> Path:
    """The same file as it is for an evaluation."""
    content = {
        name: value for name, value in CONTENT.items() if name not in ("pipeline_class", "image_path", "prompts")
    }
    content |= {
        "model_id": "Qwen2VlPipeline", "dataset_path": "./AI2D_TEST.tsv", "evaluation_dataset": "ai2d_test",
        "evaluation_model": "qwen2_vl_7b", "result_output_path": "./evaluation_outputs/", **changes,
    }  # fmt: skip
    file = directory / "evaluate.json"
    file.write_text(json.dumps(content))
    return file


def test_every_key_of_an_evaluation_is_taken_or_explained(tmp_path: Path) -> None:
    options, report = read_evaluation(evaluation(tmp_path))
    assert options == {
        "data": Path("AI2D_TEST.tsv"), "task": "ai2d_test", "profile": "qwen2_vl",
        "output": Path("evaluation_outputs/qwen2_vl_7b_ai2d_test"), "pretrained": "ckpt/hf/Qwen", "dtype": "bfloat16",
        "device": "npu", "min_pixels": 1003520, "max_pixels": 12845056, "temperature": 0.1, "top_k": 1,
        "top_p": 0.001, "min_p": None, "repetition_penalty": 1.05, "max_new_tokens": 128, "min_new_tokens": None,
        "stop_token": [5, 6], "stop": ["END"],
    }  # fmt: skip
    told = {note.key for note in report.notes}
    for key in (
        "dataset_path", "evaluation_dataset", "evaluation_model", "result_output_path", "use_custom_prompt",
        "min_pixels", "model_id", "patch.infer_fa", "text_decoder.use_infer_fa", "generation_config.pad_token_id",
    ):  # fmt: skip
        assert key in told, key
    options, _ = read_evaluation(evaluation(tmp_path, use_custom_prompt=False))
    assert options["profile"] == "vlmevalkit"


def test_options_come_before_the_evaluation_file(tmp_path: Path) -> None:
    names = ("model", "base", "profile", "task", "output", "data", "device", "dtype", "temperature", "top_k", "top_p",
             "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens", "stop_token", "stop", "min_pixels",
             "max_pixels")  # fmt: skip
    args = Namespace(**dict.fromkeys(names), from_mindspeed=evaluation(tmp_path), allow_unknown=False)
    args.profile, args.data = "vlmevalkit", Path("other.tsv")
    lines = list(apply_evaluation(args))
    assert (args.profile, args.data, args.task) == ("vlmevalkit", Path("other.tsv"), "ai2d_test")
    assert args.model == "ckpt/hf/Qwen" and any("evaluation_dataset" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "x"}, r"evaluate\.json: dataset is not known"),
        ({"use_custom_prompt": "yes"}, "use_custom_prompt is 'yes', expected true or false"),
        ({"dataset_path": 3}, "dataset_path is 3, expected a text"),
    ],
)
def test_what_an_evaluation_file_says_wrongly(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_evaluation(evaluation(tmp_path, **changes))
    with pytest.raises(ConfigError, match=r"is not an evaluate_.*json: it has neither evaluation_dataset"):
        read_evaluation(written(tmp_path))
