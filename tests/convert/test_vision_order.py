"""The vision tower's fused qkv of releases 2.1.0 to 2.3.0, which is [q; k; v]: found where it shows, else asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duetvl.convert.commands import hf_to_mm, mm_to_hf, resplit
from duetvl.convert.layouts import Layout
from duetvl.convert.names import VisionOrder
from duetvl.convert.plans import Options
from duetvl.convert.verify import Difference, verify
from duetvl.core.errors import ConfigError
from duetvl.core.half import narrowed, widened
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import write_shards
from tests.convert.tiny import mm_files, read_hf, same, tiny_config, write_hf

TWO = Layout(((1, 3),), ((4, 0),), 2)
ONE = Layout(((4,),), ((4,),))


class Said(list[str]):
    """What the user reads."""

    @property
    def options(self) -> Options:
        return Options(say=self.append)

    @property
    def warnings(self) -> list[str]:
        return [line for line in self if line.startswith("warning")]


@pytest.fixture
def said() -> Said:
    return Said()


def convert(folder: Path, order: VisionOrder, source: str = "hf", layout: Layout = TWO) -> Path:
    target = folder / f"mm-{order}"
    hf_to_mm(folder / source, target, replace(layout, vision_qkv=order), Options())
    return target


def change(folder: Path, bits: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """`trained`: every number moved by about `scale` of its size."""
    rng = np.random.default_rng(7)
    moved = {}
    for name, array in bits.items():
        values = widened(array, "bfloat16")
        moved[name] = narrowed(values + scale * rng.standard_normal(values.shape).astype(np.float32), "bfloat16")
    (folder / "trained").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (folder / "trained" / file).write_bytes((folder / "hf" / file).read_bytes())
    specs = {name: TensorSpec("bfloat16", array.shape) for name, array in moved.items()}
    write_shards(folder / "trained", specs, moved.__getitem__)
    return moved


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("order", ["hf", "interleaved"])
def test_frozen_tower(tmp_path: Path, said: Said, family: str, order: VisionOrder) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config(family))
    mm_to_hf(convert(tmp_path, order), tmp_path / "hf", tmp_path / "back", TWO, said.options)
    assert same(read_hf(tmp_path / "back"), bits)
    assert any("the qkv order of releases 2.1.0 to 2.3.0" in line for line in said) == (order == "hf")
    assert not said.warnings


@pytest.mark.parametrize("order", ["hf", "interleaved"])
def test_trained_tower(tmp_path: Path, order: VisionOrder) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config())
    trained = change(tmp_path, bits, 0.3)
    mm_to_hf(convert(tmp_path, order, "trained"), tmp_path / "hf", tmp_path / "back", TWO, Options())
    assert same(read_hf(tmp_path / "back"), trained)


def test_asks_where_it_does_not_show(tmp_path: Path) -> None:
    """Weights of another model, none, damaged ones, a tower that is not a number."""
    bits = write_hf(tmp_path / "hf", tiny_config())
    old = convert(tmp_path, "hf")
    write_hf(tmp_path / "other", tiny_config(), seed=5)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    change(tmp_path, bits, float("nan"))
    for name in ("other", "bare", "damaged", "trained"):
        with pytest.raises(ConfigError, match=r"add --cfg.vit_qkv_layout hf if .* else --cfg.vit_qkv_layout interleav"):
            mm_to_hf(old, tmp_path / name, tmp_path / "no", TWO, Options())
        assert not (tmp_path / "no").exists()
    mm_to_hf(old, tmp_path / "bare", tmp_path / "back", replace(TWO, vision_qkv="hf"), Options())
    assert same(read_hf(tmp_path / "back"), bits)


def test_what_is_stated_is_done(tmp_path: Path, said: Said) -> None:
    """With a warning where the weights show otherwise."""
    bits = write_hf(tmp_path / "hf", tiny_config())
    old = convert(tmp_path, "hf")
    mm_to_hf(old, tmp_path / "hf", tmp_path / "wrong", replace(TWO, vision_qkv="interleaved"), said.options)
    assert not same(read_hf(tmp_path / "wrong"), bits)
    assert ["but beside the weights in" in line for line in said.warnings] == [True]


def test_orders_that_are_one(tmp_path: Path) -> None:
    """The canonical structure has one order, and zeros have none: nothing is asked."""
    bits = write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", replace(TWO, canonical=True), Options())
    write_hf(tmp_path / "other", tiny_config(), seed=5)
    mm_to_hf(tmp_path / "mm", tmp_path / "other", tmp_path / "back", TWO, Options())
    assert same(read_hf(tmp_path / "back"), bits)
    change(tmp_path, {n: np.zeros_like(array) if "attn.qkv" in n else array for n, array in bits.items()}, 0.0)
    zeros = convert(tmp_path, "hf", "trained")
    mm_to_hf(zeros, tmp_path / "other", tmp_path / "back-zeros", TWO, Options())
    assert same(read_hf(tmp_path / "back-zeros"), read_hf(tmp_path / "trained"))


def test_base_in_another_dtype_and_spelling(tmp_path: Path) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config())
    wide = {name: widened(array, "bfloat16") for name, array in bits.items()}
    spelled = {("model." if n.startswith("visual") else "model.language_model.") + n.removeprefix("model."): n
               for n in wide if n != "lm_head.weight"} | {"lm_head.weight": "lm_head.weight"}  # fmt: skip
    specs = {key: TensorSpec("float32", wide[name].shape) for key, name in spelled.items()}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    write_shards(tmp_path / "wide", specs, lambda key: wide[spelled[key]])
    mm_to_hf(convert(tmp_path, "hf"), tmp_path / "wide", tmp_path / "back", TWO, Options())
    assert same(read_hf(tmp_path / "back"), bits)


def first_rank(directory: Path) -> np.ndarray:
    content = next(iter(mm_files(directory).values()))["model"]
    return content["image_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.weight"].float().numpy()


def test_resplit_keeps_the_order(tmp_path: Path, said: Said) -> None:
    """Whether it shows or not; the other order only where it is asked for."""
    write_hf(tmp_path / "hf", tiny_config())
    old = convert(tmp_path, "hf", layout=TWO)
    wanted = first_rank(_one(tmp_path, "hf"))
    resplit(old, tmp_path / "unseen", TWO, ONE, said.options)
    assert not said.warnings
    resplit(old, tmp_path / "seen", TWO, ONE, said.options, hf_dir=tmp_path / "hf")
    assert any("it keeps that order" in line for line in said)
    for name in ("unseen", "seen"):
        assert np.array_equal(first_rank(tmp_path / name), wanted)
    new = replace(ONE, vision_qkv="interleaved")
    resplit(old, tmp_path / "new", TWO, new, said.options, hf_dir=tmp_path / "hf")
    resplit(old, tmp_path / "stated", replace(TWO, vision_qkv="hf"), ONE, said.options, hf_dir=tmp_path / "hf")
    for name in ("new", "stated"):
        assert np.array_equal(first_rank(tmp_path / name), first_rank(_one(tmp_path, "interleaved")))
    with pytest.raises(ConfigError, match=r"add --cfg\.source_vit_qkv_layout hf if"):
        resplit(old, tmp_path / "no", TWO, new, said.options)


def _one(folder: Path, order: VisionOrder) -> Path:
    target = folder / f"one-{order}"
    if not target.exists():
        hf_to_mm(folder / "hf", target, replace(ONE, vision_qkv=order), Options())
    return target


def test_verify_finds_it_too(tmp_path: Path, said: Said) -> None:
    write_hf(tmp_path / "hf", tiny_config())
    old, new = convert(tmp_path, "hf"), convert(tmp_path, "interleaved")

    def differences(a: Path, b: Path, **more: object) -> list[str]:
        return [f.name for f in verify(a, b, say=said.append, **more) if isinstance(f, Difference)]  # type: ignore

    assert differences(old, tmp_path / "hf") == differences(tmp_path / "hf", old) == []
    assert len(said) == 2 and all("qkv order of releases 2.1.0 to 2.3.0" in line for line in said)
    assert differences(old, new, hf_dir=tmp_path / "hf") == []
    assert len(differences(old, new)) == 8
    assert len(differences(old, tmp_path / "hf", orders=("interleaved", None))) == 8
