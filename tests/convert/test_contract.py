"""The layout of MindSpeed-MM, literally: names, orders, shares, directories, and the divisions that its guides show."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from duetvl.convert.commands import hf_to_mm
from duetvl.convert.layouts import Layout, Model, check_layout, stored_tensors
from duetvl.convert.plans import Options
from duetvl.core.errors import ConfigError
from duetvl.models.qwen_vl.config import published_config
from tests.convert.tiny import as_torch, assert_files_equal, expected_files, mm_files, tiny_config, write_hf

torch = pytest.importorskip("torch")

V7 = [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]]
P7 = [[10, 10, 10, 2], [0, 0, 0, 0], [0, 0, 0, 0]]


def layout(text: list[list[int]], vision: list[list[int]], tp: int = 1, **more: object) -> Layout:
    return Layout(tuple(map(tuple, text)), tuple(map(tuple, vision)), tp, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("text", "vision", "tp", "tied", "canonical"),
    [
        ([[4]], [[4]], 1, False, False),
        ([[4]], [[4]], 2, True, False),
        ([[1, 3]], [[4, 0]], 4, True, False),
        ([[0, 1, 3]], [[3, 1, 0]], 2, False, False),
        ([[0, 0], [1, 1], [0, 2]], [[1, 3], [0, 0], [0, 0]], 2, False, False),
        ([[0, 2, 2]], [[4, 0, 0]], 2, True, True),
    ],
)
def test_files_are_those_of_the_contract(
    tmp_path: Path, family: str, text: list[list[int]], vision: list[list[int]], tp: int, tied: bool, canonical: bool
) -> None:
    config = tiny_config(family, tied=tied)
    bits = write_hf(tmp_path / "hf", config)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", layout(text, vision, tp, canonical=canonical), Options())
    tensors = {name: as_torch(array, "bfloat16") for name, array in bits.items()}
    assert_files_equal(mm_files(tmp_path / "mm"), expected_files(tensors, config, text, vision, tp, canonical))


def test_tree_and_modes(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", layout([[4]], [[4]], 2), Options())
    hf_to_mm(tmp_path / "hf", tmp_path / "pp", layout([[1, 3]], [[4, 0]], 1), Options())
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("[mp][mp]/release/*")}
    assert found == {"mm/release/mp_rank_00", "mm/release/mp_rank_01", "pp/release/mp_rank_00_000",
                     "pp/release/mp_rank_00_001"}  # fmt: skip
    for path in (tmp_path / "mm", *(tmp_path / "mm").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_group_order_of_fused_qkv() -> None:
    """Two groups of two heads, on two ranks: [q0, q1, k0, v0] and [q2, q3, k1, v1]."""
    model = Model.of(tiny_config(heads=4, kv_heads=2))
    found = [
        s
        for s in stored_tensors(model, layout([[4]], [[4]], 2))
        if s.name.endswith("layers.0.self_attention.linear_qkv.weight")
    ]
    text = [s for s in found if s.name.startswith("text")]
    told = [[(p.name.split(".")[-2], p.box.offset[0], p.box.shape[0]) for p in s.pieces] for s in text]
    assert told == [
        [("q_proj", 0, 16), ("k_proj", 0, 8), ("v_proj", 0, 8)],
        [("q_proj", 16, 16), ("k_proj", 8, 8), ("v_proj", 8, 8)],
    ]
    vision = [s for s in found if s.name.startswith("image")][1]  # heads 2 and 3 of [q; k; v], 16 rows each
    assert [p.box.offset[0] for p in vision.pieces] == [8, 24, 40, 12, 28, 44]


def test_replicated_heads() -> None:
    """Four ranks, two key heads: ranks 0 and 1 have the first."""
    model = Model.of(tiny_config(heads=4, kv_heads=2))
    replicated = layout([[4]], [[4]], 4, replicate_kv=True)
    for canonical in (False, True):
        rows = [
            piece.box.offset[0]
            for stored in stored_tensors(model, layout([[4]], [[4]], 4, replicate_kv=True, canonical=canonical))
            for piece in stored.pieces
            if piece.name == "model.layers.0.self_attn.k_proj.weight"
        ]
        assert rows == [0, 0, 8, 8]
    check_layout(model, replicated)
    with pytest.raises(ConfigError, match=r"does not divide the 2 key and value heads.*replicate_kv true"):
        check_layout(model, layout([[4]], [[4]], 4))


def test_vision_may_be_divided_otherwise(tmp_path: Path) -> None:
    """As many directories as the larger; the smaller tower repeats."""
    write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", layout([[4]], [[4]], 4, vision_tp=2), Options())
    files = [content["model"] for content in mm_files(tmp_path / "mm").values()]
    assert len(files) == 4
    name = "image_encoder.encoder.blocks.layers.1.self_attention.linear_qkv.weight"
    assert [tuple(f[name].shape) for f in files] == [(24, 16)] * 4
    assert torch.equal(files[0][name], files[2][name])
    assert not torch.equal(files[0][name], files[1][name])
    assert files[0]["text_decoder.embedding.word_embeddings.weight"].shape[0] == 12


def test_published_7b_with_virtual_stages_places_everything() -> None:
    """The example of the guides, for which the original lost layers 21 to 27, the last norm and the head."""
    model = Model.of(published_config("Qwen2-VL-7B"))
    placed = list(stored_tensors(model, layout(V7, P7)))
    assert {piece.name for stored in placed for piece in stored.pieces} == set(model.shapes)
    by_name = {(s.stage, s.name): s for s in placed}
    assert (3, "text_decoder.embedding.word_embeddings.weight") in by_name
    assert (11, "text_decoder.output_layer.weight") in by_name
    assert (
        by_name[4, "text_decoder.decoder.layers.0.mlp.linear_fc2.weight"].pieces[0].name
        == "model.layers.1.mlp.down_proj.weight"
    )
    assert (
        by_name[11, "text_decoder.decoder.layers.1.mlp.linear_fc2.weight"].pieces[0].name
        == "model.layers.27.mlp.down_proj.weight"
    )
    assert (
        by_name[8, "text_decoder.decoder.layers.3.input_layernorm.weight"].pieces[0].name
        == "model.layers.20.input_layernorm.weight"
    )


@pytest.mark.parametrize(
    ("model", "text", "vision", "tp"),
    [
        ("Qwen2-VL-2B", [28], [32], 1), ("Qwen2-VL-7B", [1, 10, 10, 7], [32, 0, 0, 0], 1),
        ("Qwen2-VL-72B", [5, 11, 11, 11, 11, 11, 11, 9], [32] + [0] * 7, 2),
        ("Qwen2-VL-72B", [17, 21, 22, 20], [32, 0, 0, 0], 2),
        ("Qwen2.5-VL-3B", [36], [32], 1), ("Qwen2.5-VL-7B", [12, 16], [32, 0], 1),
        ("Qwen2.5-VL-7B", [1, 10, 10, 7], [32, 0, 0, 0], 1), ("Qwen2.5-VL-32B", [1] + [9] * 7, [32] + [0] * 7, 2),
        ("Qwen2.5-VL-72B", [6, 11, 11, 11, 11, 11, 11, 8], [32] + [0] * 7, 2),
    ],
)  # fmt: skip
def test_divisions_of_the_guides(model: str, text: list[int], vision: list[int], tp: int) -> None:
    known = Model.of(published_config(model))
    division = layout([text], [vision], tp)
    assert check_layout(known, division) == []
    numbers = sum(int(np.prod(s.shape)) for s in stored_tensors(known, division))
    assert numbers >= sum(int(np.prod(shape)) for shape in known.shapes.values())


@pytest.mark.parametrize(
    ("text", "vision", "tp", "more", "message"),
    [
        ([[1, 10, 10, 6]], [[32, 0, 0, 0]], 1, {}, r"places 27 layers, the model has 28; .* would be \[7, 7, 7, 7\]"),
        ([[1, 10, 10, 7]], [[30, 0, 0, 0]], 1, {}, "vit_pp_layers.* places 30 layers, the model has 32"),
        ([[1, 10, 10, 7]], [[30, 2, 0, 0]], 1, {}, "vision must be complete before the language model starts"),
        ([[1, 10, 10, 7], [0, 0, 0]], [[32, 0, 0, 0]], 1, {}, "differ in length"),
        ([[28]], [[31, 1]], 1, {}, "has 2 stages, llm_pp_layers .* has 1"),
        ([[14, 0], [0, 14]], [[32]], 1, {}, "give both one number for each stage"),
        ([[28]], [[32]], 3, {}, "tp_size 3 does not divide the 4 key and value heads"),
        ([[28]], [[32]], 8, {"replicate_kv": True}, "must be a multiple of 4 that divides the 28 heads"),
        ([[28]], [[32]], 4, {"vision_tp": 3}, "3 ranks do not divide the 16 heads of the vision tower"),
        ([[28]], [[32]], 1, {"vision_tp": 8}, "8 ranks do not divide axis 0 of visual.blocks.0.mlp.gate_proj"),
    ],
)  # fmt: skip
def test_impossible_divisions(
    text: list[list[int]], vision: list[list[int]], tp: int, more: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(Model.of(published_config("Qwen2.5-VL-7B")), layout(text, vision, tp, **more))


def test_shorter_vision_list_warns() -> None:
    model = Model.of(published_config("Qwen2.5-VL-7B"))
    assert "other stages get none" in check_layout(model, layout([[12, 16]], [[32]]))[0]
