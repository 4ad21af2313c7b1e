"""Every command of the users' guides, as docs/mm_convert.md has them, on files of the published shapes (all sparse)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from duetvl.convert import plans
from duetvl.convert.cli import main
from duetvl.convert.names import lora_rules
from duetvl.convert.streaming import Output, PlannedFile, plan_tensor_file
from duetvl.models.qwen_vl.config import ModelConfig, published_config
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import plan_shards

DOCS = Path(__file__).parents[2] / "docs" / "mm_convert.md"
ORIGINAL_KEYS = (
    "save_vit_only", "trust_remote_code", "llm_hf_config.hf_dir", "parallel_config.vit_tp_size",
    "parallel_config.ep_size", "parallel_config.audio_pp_layers", "common_model_config.num_experts",
    "common_model_config.llm_hf_dir", "common_model_config.tie_word_embeddings",
)  # fmt: skip


def documented() -> list[str]:
    blocks = DOCS.read_text(encoding="utf-8").split("```bash\n")[1:]
    text = "\n".join(block.split("```")[0] for block in blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("mm-convert")]


def put_sparse(path: Path, planned: PlannedFile) -> None:
    """All but the tensors, of which each begins with its own number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.truncate(planned.size)
        marks = [(start, number.to_bytes(2, "little")) for number, start in enumerate(planned.starts.values(), 1)]
        for position, data in (*planned.fixed, *planned.finish(dict.fromkeys(planned.starts, 0)), *marks):
            handle.seek(position)
            handle.write(data)


def put_model(directory: Path, config: ModelConfig) -> None:
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in parameter_shapes(config).items()}
    shards = plan_shards(specs, 5 * 10**9)
    for number, names in enumerate(shards, 1):
        planned = plan_tensor_file({name: specs[name] for name in names}, {"format": "pt"})
        put_sparse(directory / f"model-{number:05}-of-{len(shards):05}.safetensors", planned)
    write_config(config, directory, "bfloat16")


def put_adapter(directory: Path) -> None:
    shapes = parameter_shapes(published_config("Qwen2.5-VL-7B"))
    specs = {}
    for rule in lora_rules(True, True):
        name = rule.parts[0].name.format(n=3)
        whole = shapes.get(name.replace(".lora_A", "").replace(".lora_B", ""))
        if whole is not None and "model.layers" in name:
            shape = (8, whole[1]) if "lora_A" in name else (whole[0], 8)
            specs[f"base_model.model.model.language_model.{name.removeprefix('model.')}"] = TensorSpec(
                "bfloat16", shape
            )
    put_sparse(directory / "adapter_model.safetensors", plan_tensor_file(specs, {"format": "pt"}))


def test_commands_of_the_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions leave sparse targets, which later commands of the page start from."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2-VL-72B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B",
                 "Qwen2.5-VL-72B"):  # fmt: skip
        put_model(Path("ckpt/hf_path") / f"{name}-Instruct", published_config(name))
    put_adapter(Path("ckpt/hf_path/Qwen2.5-VL-7B-Instruct-lora"))
    written: list[str] = []

    def sparse(folder: Path, outputs: list[Output], *_: object, **__: object) -> None:
        written.extend(str(output.path) for output in outputs)
        for output in outputs:
            put_sparse(folder / output.path, output.file)

    monkeypatch.setattr(plans, "write_files", sparse)
    monkeypatch.setattr(plans, "_check_space", lambda plan: None)
    lines = documented()
    assert len(lines) == 16
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] != "verify":
            assert main([*words, "--cfg.dry_run"]) == 0, line
            assert main(words) == 0, line
    assert len(written) > 80
    assert len(list(Path("ckpt/mm_path/Qwen2-VL-7B-Instruct-vpp/release").iterdir())) == 4
    assert len(list(Path("ckpt/mm_resplit_pp/Qwen2.5-VL-7B-Instruct/release").iterdir())) == 8


def test_keys_of_the_original_are_there() -> None:
    from duetvl.convert.options import HfToMm, key_names, key_tree

    assert {f"cfg.{key}" for key in ORIGINAL_KEYS} <= set(key_names(key_tree(HfToMm)))
