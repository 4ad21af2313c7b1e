"""Configurations: published sizes to the last parameter, every config.json, plain refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import duetvl.models.qwen_vl.config as config_module
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.qwen_vl.config import ModelConfig, load_config, published_config, published_names
from duetvl.models.qwen_vl.parameters import count_parameters, parameter_shapes

PUBLISHED = {  # total, vision tower with merger, merger in millions
    "Qwen2-VL-2B": (2_208_985_600, 665_271_296, 34.1),
    "Qwen2-VL-7B": (8_291_375_616, 675_759_104, 44.6),
    "Qwen2-VL-72B": (73_405_560_320, 699_356_672, 68.2),
    "Qwen2.5-VL-3B": (3_754_622_976, 668_684_288, 36.7),
    "Qwen2.5-VL-7B": (8_292_166_656, 676_550_144, 44.6),
    "Qwen2.5-VL-32B": (33_452_718_336, 688_841_984, 52.4),
    "Qwen2.5-VL-72B": (73_410_777_344, 704_573_696, 68.2),
}
ROPE: dict[str, Any] = {"type": "mrope", "mrope_section": [2, 3, 3]}
TEXT = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "max_position_embeddings": 512,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 3.7},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 52,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    },
}  # fmt: skip
DATA = Path(config_module.__file__).parent / "published"
FAMILIES = ("qwen2_vl", "qwen2_5_vl")


def flat(model_type: str = "qwen2_5_vl", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **TEXT,
        "rope_scaling": dict(ROPE),
        "vision_config": dict(VISION[model_type]),
        **changes,
    }


def vision(**changes: Any) -> dict[str, Any]:
    return {"vision_config": {**VISION["qwen2_5_vl"], **changes}}


def hf_config(model_type: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}[model_type]
    return getattr(transformers, kind)(
        **TEXT, rope_scaling=dict(ROPE), vision_config=dict(VISION[model_type]), **changes
    )


def test_all_published_sizes_are_here() -> None:
    assert set(published_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    shapes = parameter_shapes(published_config(name))
    total, visual, merger = PUBLISHED[name]
    assert count_parameters(shapes) == total
    assert count_parameters(shapes, "visual.") == visual
    assert count_parameters(shapes, "visual.merger.") == pytest.approx(merger * 1e6, abs=5e4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields(name: str) -> None:
    config = published_config(name)
    assert config.text.head_dim == 128
    assert config.text.mrope_section == (16, 24, 24)
    assert config.text.norm_eps == 1e-6
    assert config.vision.head_dim == 80
    assert config.tie_word_embeddings == (name in ("Qwen2-VL-2B", "Qwen2.5-VL-3B"))
    assert config.vision.tokens_per_second == (2 if "2.5" in name else None)
    assert config.vision.window == (112 if "2.5" in name else None)


def test_published_names_are_forgiving_and_helpful() -> None:
    assert published_config("Qwen/Qwen2.5-VL-7B-Instruct") == published_config("Qwen2.5-VL-7B")
    with pytest.raises(ConfigError, match=r"did you mean 'Qwen2\.5-VL-7B'"):
        published_config("Qwen2.5-VL-7")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_equal_transformers(model_type: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = hf_config(model_type, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(hf)
    theirs = {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        theirs[name] = tuple(parameter.shape)
    ours = parameter_shapes(ModelConfig.from_dict(flat(model_type, tie_word_embeddings=tied)))
    assert ours == theirs
    assert ("lm_head.weight" in ours) != tied


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_by_transformers_loads_equal(model_type: str, tied: bool, tmp_path: Path) -> None:
    hf_config(model_type, tie_word_embeddings=tied, dtype="bfloat16").save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    expected = ModelConfig.from_dict(flat(model_type, tie_word_embeddings=tied, torch_dtype="bfloat16"))
    assert load_config(tmp_path) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_we_write_loads_in_transformers(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = flat(model_type, tie_word_embeddings=True, torch_dtype="float32")
    config = ModelConfig.from_dict(data)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = hf_config(model_type, tie_word_embeddings=True, dtype="float32")
    for part in ("text_config", "vision_config"):
        ours, hf = (getattr(c, part).to_dict() for c in (theirs, expected))
        free = {"architectures", "mlp_ratio"}  # 3.6875 says the same as 3.7: 118 of 32
        assert {k: v for k, v in ours.items() if k in hf and k not in free} == {
            k: v for k, v in hf.items() if k not in free
        }
    assert theirs.tie_word_embeddings is True
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_writing_loses_nothing(name: str) -> None:
    config = published_config(name)
    source = json.loads((DATA / f"{name}.json").read_text())
    written = config.to_dict()
    assert ModelConfig.from_dict(written) == config
    assert {key: written[key] for key in source if key != "vision_config"} == {
        key: value for key, value in source.items() if key != "vision_config"
    }
    assert source["vision_config"].items() <= written["vision_config"].items()


# What the vision towers' classes have by default in transformers 4.45 to 4.49, which leave such keys out.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4,
        "num_heads": 16, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "qwen2_5_vl": {
        "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16,
        "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 4,
        "window_size": 112, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip
OLD = {"qwen2_vl": ["4.45.0.dev0", "4.45.2", "4.46.3", "4.47.1", "4.48.3", "4.49.0"], "qwen2_5_vl": ["4.49.0"]}


def as_saved_by(version: str, data: dict[str, Any]) -> dict[str, Any]:
    """A config.json as these versions write it."""
    defaults = CLASS_DEFAULTS[data["model_type"]]
    tower = {key: value for key, value in data["vision_config"].items() if value != defaults.get(key, ...)}
    return {**data, "vision_config": tower, "transformers_version": version}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_old_versions_leave_out_the_defaults_of_their_class(name: str) -> None:
    published = published_config(name)
    for version in [*OLD[published.model_type], "4.50.0.dev0"]:
        old = as_saved_by(version, published.to_dict())
        assert "depth" not in old["vision_config"]
        assert ModelConfig.from_dict(old) == published


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_left_out_is_the_class_default_and_not_a_published_value(model_type: str) -> None:
    """A width and a clock that no published model has, and the language model's width not in the place of 3584."""
    changes = {"hidden_size": 3584, "num_attention_heads": 224, "num_key_value_heads": 2}
    whole = flat(model_type, **changes, vision_config=dict(CLASS_DEFAULTS[model_type]))
    old = as_saved_by("4.49.0", whole)
    assert old["vision_config"] == {}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(whole)
    with pytest.raises(ConfigError, match="makes features of 3584 numbers, the language model takes 64"):
        ModelConfig.from_dict(flat(model_type, vision_config={}, transformers_version="4.49.0"))


@pytest.mark.parametrize("version", ["4.41.2", "4.50.0", "4.57.6", "5.24.0", None, "old", 5])
def test_other_versions_leave_nothing_out(version: Any) -> None:
    old = as_saved_by("4.49.0", published_config("Qwen2.5-VL-7B").to_dict())
    with pytest.raises(ConfigError, match="vision_config: depth is missing"):
        ModelConfig.from_dict({**old, "transformers_version": version})


def test_rotary_base_of_the_vision_tower_in_transformers_5() -> None:
    config = ModelConfig.from_dict(flat() | vision(rope_parameters={"rope_type": "axial", "rope_theta": 5000.0}))
    assert config.vision.rope_theta == 5000
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert "rope_parameters" not in ModelConfig.from_dict(flat()).to_dict()["vision_config"]


def test_rope_parameters_of_transformers_5() -> None:
    data = flat()
    nested = {key: data.pop(key) for key in TEXT if key != "rope_theta"}
    del data["rope_scaling"], data["rope_theta"]
    nested["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]
    }  # fmt: skip
    nested["layer_types"] = ["full_attention"] * 3
    assert ModelConfig.from_dict({**data, "text_config": nested}) == ModelConfig.from_dict(flat())


@pytest.mark.parametrize(("version", "tied"), [("4.57.6", False), ("5.2.0", True)])
def test_which_tie_flag_counts(version: str, tied: bool) -> None:
    nested = {**TEXT, "rope_scaling": ROPE, "tie_word_embeddings": False}
    data = {
        "model_type": "qwen2_vl", "vision_config": VISION["qwen2_vl"], "text_config": nested,
        "tie_word_embeddings": True, "transformers_version": version,
    }  # fmt: skip
    assert ModelConfig.from_dict(data).tie_word_embeddings is tied


def test_text_config_wins_over_stale_flat_keys() -> None:
    nested = {**TEXT, "rope_scaling": ROPE}
    config = ModelConfig.from_dict({**flat(), "vocab_size": 7, "text_config": nested})
    assert config.text.vocab_size == 400


@pytest.mark.parametrize("key", ["in_chans", "in_channels"])
def test_channels_under_both_names(key: str) -> None:
    data = flat()
    data["vision_config"][key] = 1
    assert ModelConfig.from_dict(data).vision.channels == 1


def test_qwen2_vision_widths_are_not_confused() -> None:
    vision = ModelConfig.from_dict(flat("qwen2_vl")).vision
    assert (vision.hidden_size, vision.out_hidden_size, vision.intermediate_size) == (32, 64, 118)
    assert (vision.norm, vision.mlp, vision.activation) == ("layer_norm", "plain", "quick_gelu")
    assert vision.window is None and vision.sees_frame(0)


def test_missing_out_hidden_size_is_the_language_width() -> None:
    data = flat()
    del data["vision_config"]["out_hidden_size"]
    assert ModelConfig.from_dict(data).vision.out_hidden_size == 64


def test_full_attention_layers() -> None:
    vision = ModelConfig.from_dict(flat()).vision
    assert [vision.sees_frame(layer) for layer in range(2)] == [False, True]
    assert (vision.norm, vision.mlp, vision.activation) == ("rms_norm", "gated", "silu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "is 'llama'; duetvl implements 'qwen2_vl', 'qwen2_5_vl'"),
        ({"model_type": None}, "model_type is None"),
        ({"use_sliding_window": True}, "use_sliding_window is not implemented"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented; known: silu"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not divisible by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "4 is not divisible by num_key_value_heads 3"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type 'yarn'"),
        ({"rope_scaling": None}, "rope_scaling is missing"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "has 8"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected an integer"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not implemented"),
        ({"head_dim": 32}, "head_dim 32 differs"),
        ({"vision_config": None}, "vision_config: expected an object, found None"),
        (vision(hidden_act="relu"), "hidden_act 'relu'"),
        (vision(num_heads=5), "not divisible by num_heads 5"),
        (vision(hidden_size=36), "not divisible by 4"),
        (vision(out_hidden_size=32), "takes 64"),
        (vision(tokens_per_second=None), "tokens_per_second"),
        (vision(fullatt_block_indexes=["7"]), "list of integers"),
        (vision(window_size=20), "smaller than one merged patch"),
        (vision(rope_parameters={"rope_type": "yarn"}), "rope_parameters: rope_type 'yarn' is not implemented"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000, expected an integer from 1 to 1000"),
        (vision(depth=10_000_000), "depth is 10000000"),
        ({"vocab_size": 10**15}, "vocab_size is 1000000000000000, expected"),
        ({"hidden_size": 10**400}, "hidden_size is <a number of 1329 bits>"),
        (vision(patch_size=10**9), "patch_size is 1000000000"),
        (vision(in_chans=10**9), "in_channels is 1000000000"),
        (vision(fullatt_block_indexes=[7] * 10**6), "fullatt_block_indexes is [7, 7"),
        (vision(fullatt_block_indexes=[-1]), "list of integers from 0"),
        ({"model_type": "qwen2_vl", "vision_config": {**VISION["qwen2_vl"], "mlp_ratio": 1e9}}, "MLP of 32000000000"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 10**400}, "rope_theta is <a number of 1329 bits>"),
        ({"model_type": ["qwen2_vl"]}, "model_type is ['qwen2_vl']"),
        ({"model_type": "x" * 10**6}, "model_type is 'xxx"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"text_config": [1]}, "text_config: expected an object"),
        ({"layer_types": 3, "hidden_size": "a\nb"}, r"hidden_size is 'a\nb'"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_that_names_the_file(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**flat(), **changes}, source="model/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("model/config.json: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_key_that_is_given_twice_is_no_choice(tmp_path: Path) -> None:
    text = json.dumps(flat())
    (tmp_path / "config.json").write_text(text.replace("{", '{"hidden_size": 8, ', 1))
    with pytest.raises(CheckpointError, match="the key 'hidden_size' is given twice in one object; keep one of them"):
        load_config(tmp_path)


def test_unreadable_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(flat()), encoding="utf-8-sig")
    assert load_config(tmp_path) == ModelConfig.from_dict(flat())
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        load_config(tmp_path)


def test_configs_are_values() -> None:
    config = published_config("Qwen2-VL-2B")
    assert hash(config) == hash(published_config("Qwen2-VL-2B"))
    assert replace(config, tie_word_embeddings=False) != config
