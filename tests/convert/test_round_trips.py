"""Hugging Face -> MindSpeed-MM -> resplit -> Hugging Face, bit for bit, whatever the divisions."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duetvl.convert.commands import hf_to_mm, mm_to_hf, resplit
from duetvl.convert.layouts import Layout
from duetvl.convert.plans import Options
from duetvl.convert.verify import Difference, verify
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.stages import Rows
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file
from tests.convert.tiny import mm_files, random_bits, read_hf, same, tiny_config, write_hf

QUIET = Options()
DIVISIONS: list[tuple[Rows, Rows]] = [
    (((4,),), ((4,),)),
    (((1, 3),), ((4, 0),)),
    (((0, 0, 4),), ((2, 1, 1),)),
    (((0, 1), (2, 1)), ((1, 3), (0, 0))),
    (((0, 0, 1), (0, 1, 2)), ((3, 0, 1), (0, 0, 0))),
]


def round_trip(folder: Path, first: Layout, second: Layout, *, kind: str = "pt", hf: str = "hf") -> None:
    """hf -> first -> second -> back, then all four are the same."""
    hf_to_mm(folder / hf, folder / "a", first, QUIET, kind=kind)  # type: ignore[arg-type]
    resplit(folder / "a", folder / "b", first, second, QUIET, kind=kind, hf_dir=folder / hf)  # type: ignore[arg-type]
    mm_to_hf(folder / "b", folder / hf, folder / "back", second, QUIET)


@pytest.mark.parametrize(
    ("family", "tied", "canonical"), list(product(["qwen2_vl", "qwen2_5_vl"], [False, True], [False, True]))
)
def test_grid(tmp_path: Path, family: str, tied: bool, canonical: bool) -> None:
    dtypes = {(False, False): "bfloat16", (True, False): "float16", (False, True): "float32", (True, True): "bfloat16"}
    config = tiny_config(family, tied=tied)
    bits = write_hf(tmp_path / "hf", config, dtypes[tied, canonical], shard_bytes=20_000)
    for number, (text, vision) in enumerate(DIVISIONS):
        first = Layout(text, vision, (1, 2, 4)[number % 3], canonical=canonical)
        other = DIVISIONS[(number + 2) % len(DIVISIONS)]
        second = Layout(*other, (4, 1, 2)[number % 3], vision_tp=2 if number % 2 else 0, canonical=canonical)
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copytree(tmp_path / "hf", folder / "hf")
        round_trip(folder, first, second, kind="safetensors" if number == 3 else "pt")
        assert same(read_hf(folder / "back"), bits)
        found = [f for f in verify(folder / "a", folder / "b") if isinstance(f, Difference)]
        assert not found


def test_back_is_the_same_directory(tmp_path: Path) -> None:
    """Shards, index, configuration and what belongs to the model beside them, but no adapter and no trainer's state."""
    write_hf(tmp_path / "hf", tiny_config(), shard_bytes=20_000)
    before = fingerprint(tmp_path / "hf")
    for name in ("adapter_config.json", "trainer_state.json", "rng_state_0.pth", "model-q8.gguf"):
        (tmp_path / "hf" / name).write_text("left by a trainer")
    assert len([name for name in before if name.endswith(".safetensors")]) > 2
    division = Layout(*DIVISIONS[3], 2)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", division, QUIET)
    mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back", division, QUIET)
    assert fingerprint(tmp_path / "back") == before
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in TensorFile(tmp_path / "back" / file).specs


def test_index_keeps_what_it_says(tmp_path: Path) -> None:
    """All but the size and the names, which are the new files' own."""
    write_hf(tmp_path / "hf", tiny_config(), shard_bytes=20_000)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    size = index["metadata"]["total_size"]
    index["metadata"] |= {"total_size": 1, "total_parameters": 7, "source": "量子"}
    path.write_text(json.dumps({"note": ["kept"], **index}), encoding="utf-8")
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", Layout(*DIVISIONS[1]), QUIET)
    mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back", Layout(*DIVISIONS[1]), QUIET)
    back = json.loads((tmp_path / "back" / path.name).read_text(encoding="utf-8"))
    assert back["metadata"] == {"total_size": size, "total_parameters": 7, "source": "量子"}
    assert back["note"] == ["kept"]
    assert back["weight_map"] == index["weight_map"]


@pytest.mark.parametrize("text", ['{"weight_map": []}', '{"metadata": [], "weight_map": {}}', "[]", "{"])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    write_hf(tmp_path / "hf", tiny_config(), shard_bytes=20_000)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", Layout(*DIVISIONS[1]), QUIET)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"index\.json: (is not an index of shards|expected an index of shards|cannot be read)"
    ):
        mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "no", Layout(*DIVISIONS[1], vision_qkv="hf"), QUIET)


@pytest.mark.parametrize(
    ("sections", "cause"),
    [("{", "sections in its header: cannot be read as JSON"), ("3", "has the sections"), ('["b"]', "has the sections")],
)
def test_sections_that_are_none(tmp_path: Path, sections: str, cause: str) -> None:
    """A safetensors edition says in its header which sections it has, as text in the text."""
    layout = Layout(*DIVISIONS[0])
    write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", layout, QUIET, kind="safetensors")
    path = next((tmp_path / "mm").rglob("*.safetensors"))
    file = TensorFile(path)
    write_tensor_file(path, file.specs, file.view, {**file.metadata, "sections": sections})
    with pytest.raises(CheckpointError, match=rf"model_optim_rng\.safetensors: .*{cause}"):
        mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "no", layout, QUIET)


def fingerprint(directory: Path) -> dict[str, str]:
    """Tensors by content, as headers may be written in another order; all else by its bytes."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix == ".safetensors":
            file = TensorFile(path)
            text = "".join(f"{n}{file.specs[n]}{file.view(n).tobytes().hex()}" for n in sorted(file.specs)).encode()
        else:
            text = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = hashlib.sha256(text).hexdigest()
    return found


def test_tied_model_into_stages_and_back(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config(tied=True))
    one, two = Layout(((4,),), ((4,),)), Layout(((1, 3),), ((4, 0),))
    hf_to_mm(tmp_path / "hf", tmp_path / "one", one, QUIET)
    resplit(tmp_path / "one", tmp_path / "two", one, two, QUIET)
    resplit(tmp_path / "two", tmp_path / "again", two, one, QUIET)
    name = "text_decoder.output_layer.weight"
    assert name not in mm_files(tmp_path / "one")["mp_rank_00"]["model"]
    head = mm_files(tmp_path / "two")["mp_rank_00_001"]["model"][name]
    embedding = mm_files(tmp_path / "two")["mp_rank_00_000"]["model"]["text_decoder.embedding.word_embeddings.weight"]
    assert head.equal(embedding)
    assert name not in mm_files(tmp_path / "again")["mp_rank_00"]["model"]


def test_head_that_is_not_the_embedding(tmp_path: Path) -> None:
    """Trained apart, with a config.json that ties them: half of the model would be lost without a word."""
    write_hf(tmp_path / "hf", tiny_config(tied=True))
    two = Layout(*DIVISIONS[1])
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", two, QUIET)
    path = tmp_path / "mm" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["text_decoder.output_layer.weight"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false in hf_dir's"):
        mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back", two, QUIET)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false in hf_dir's"):
        resplit(tmp_path / "mm", tmp_path / "one", two, Layout(*DIVISIONS[0]), QUIET, hf_dir=tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = Layout(*DIVISIONS[1], vision_qkv="interleaved")
    mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back", untied, QUIET)
    back = read_hf(tmp_path / "back")
    assert not np.array_equal(back["lm_head.weight"], back["model.embed_tokens.weight"])


def test_replicated_heads_round_trip(tmp_path: Path) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config(heads=8, kv_heads=2))
    for canonical in (False, True):
        wide = Layout(*DIVISIONS[1], 4, canonical=canonical, replicate_kv=True)
        narrow = Layout(*DIVISIONS[0], 2, canonical=canonical, replicate_kv=True)
        folder = tmp_path / str(canonical)
        hf_to_mm(tmp_path / "hf", folder / "a", wide, QUIET)
        with pytest.raises(ConfigError, match=r"add --cfg\.hf_config\.hf_dir"):
            resplit(folder / "a", folder / "b", wide, narrow, QUIET)
        resplit(folder / "a", folder / "b", wide, narrow, QUIET, hf_dir=tmp_path / "hf")
        mm_to_hf(folder / "b", tmp_path / "hf", folder / "back", narrow, QUIET)
        assert same(read_hf(folder / "back"), bits)
        assert not [f for f in verify(folder / "a", tmp_path / "hf") if isinstance(f, Difference)]


def test_new_names_of_transformers_are_read(tmp_path: Path) -> None:
    from duetvl.models.qwen_vl.loading import write_config
    from duetvl.models.qwen_vl.parameters import parameter_shapes

    config = tiny_config(tied=True)
    rng = np.random.default_rng(0)
    bits = {name: random_bits(shape, "bfloat16", rng) for name, shape in parameter_shapes(config).items()}
    new = {
        ("model." if n.startswith("visual") else "model.language_model.") + n.removeprefix("model."): n for n in bits
    }
    specs = {name: TensorSpec("bfloat16", bits[old].shape) for name, old in new.items()}
    specs["lm_head.weight"] = specs["model.language_model.embed_tokens.weight"]  # stored though tied
    new["lm_head.weight"] = "model.embed_tokens.weight"
    (tmp_path / "hf").mkdir()
    write_tensor_file(tmp_path / "hf" / "model.safetensors", specs, lambda n: bits[new[n]], {"format": "pt"})
    write_config(config, tmp_path / "hf", "bfloat16")
    round_trip(tmp_path, Layout(*DIVISIONS[1], 2), Layout(*DIVISIONS[2]))
    assert same(read_hf(tmp_path / "back"), bits)


@pytest.mark.parametrize("head_size", [8, 64, 256])
def test_heads_that_cannot_be_seen(tmp_path: Path, head_size: int) -> None:
    """Four ranks of two heads of 256 have the rows of eight of 128: no division is made on a guess."""
    heads = 8 // (head_size // 8) if head_size < 64 else 512 // head_size * 4
    config = tiny_config(heads=heads, kv_heads=heads // 2, head_size=head_size, vocabulary=16)
    bits = write_hf(tmp_path / "hf", config)
    one, two = Layout(*DIVISIONS[0]), Layout(*DIVISIONS[1], 2)
    hf_to_mm(tmp_path / "hf", tmp_path / "two", two, QUIET)
    with pytest.raises(ConfigError, match=r"its heads cannot be told from its files; add --cfg\.hf_config\.hf_dir"):
        resplit(tmp_path / "two", tmp_path / "no", two, Layout(*DIVISIONS[1], 4), QUIET)
    with pytest.raises(ConfigError, match="does not divide the"):
        resplit(tmp_path / "two", tmp_path / "no", two, Layout(*DIVISIONS[1], 2 * heads), QUIET, hf_dir=tmp_path / "hf")
    resplit(tmp_path / "two", tmp_path / "one", two, one, QUIET)
    mm_to_hf(tmp_path / "one", tmp_path / "hf", tmp_path / "back", one, QUIET)
    assert same(read_hf(tmp_path / "back"), bits)


def test_copied_heads_are_seen(tmp_path: Path) -> None:
    """Whatever their size; joined as if they were not, the rows would be those of another model."""
    write_hf(tmp_path / "hf", tiny_config(heads=8, kv_heads=2))
    wide = Layout(*DIVISIONS[1], 4, replicate_kv=True)
    hf_to_mm(tmp_path / "hf", tmp_path / "wide", wide, QUIET)
    with pytest.raises(ConfigError, match=r"add --cfg\.hf_config\.hf_dir"):
        resplit(tmp_path / "wide", tmp_path / "no", Layout(*DIVISIONS[1], 4), Layout(*DIVISIONS[1], 2), QUIET)


def test_vision_only(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config(tied=True))
    one, two = Layout(*DIVISIONS[1], 2), Layout(*DIVISIONS[2], 1)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", one, QUIET, vision_only=True)
    resplit(tmp_path / "mm", tmp_path / "re", one, two, QUIET)
    files = mm_files(tmp_path / "re")
    names = {name for content in files.values() for name in content["model"]}
    assert names
    assert all(name.startswith("image_encoder.") for name in names)
    told = {f.name for f in verify(tmp_path / "re", tmp_path / "hf") if isinstance(f, Difference)}
    assert told
    assert not any(name.startswith("visual.") for name in told)


def test_language_model_from_elsewhere(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config(), seed=0)
    write_hf(tmp_path / "llm", tiny_config(), seed=1)
    one = Layout(*DIVISIONS[0])
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", one, QUIET, language_dir=tmp_path / "llm")
    mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "back", one, QUIET)
    back, hf, llm = (read_hf(tmp_path / name) for name in ("back", "hf", "llm"))
    assert all(np.array_equal(back[n], (hf if n.startswith("visual.") else llm)[n]) for n in back)


def test_source_of_another_division_is_told(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", Layout(*DIVISIONS[1], 2), QUIET)
    for stated in (Layout(*DIVISIONS[0]), Layout(((2, 2),), ((4, 0),), 2), Layout(*DIVISIONS[1], 2, 1)):
        with pytest.raises(ConfigError, match=r"source_parallel_config says .*, but .*release has"):
            resplit(tmp_path / "mm", tmp_path / "no", stated, Layout(*DIVISIONS[0]), QUIET)
    fused = Layout(*DIVISIONS[1], 2, canonical=True)
    with pytest.raises(ConfigError, match="has fused q, k, v"):
        mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "no", fused, QUIET)
    assert not (tmp_path / "no").exists()


def test_verify_says_where_and_by_how_much(tmp_path: Path) -> None:
    bits = write_hf(tmp_path / "a", tiny_config(), "float32")
    name = "model.layers.2.mlp.down_proj.weight"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = TensorFile(tmp_path / "b" / "model.safetensors")
    at = file.position(name) + 8 + int.from_bytes((tmp_path / "b" / "model.safetensors").read_bytes()[:8], "little")
    with open(tmp_path / "b" / "model.safetensors", "r+b") as handle:
        handle.seek(at)
        handle.write(np.float32(bits[name].flat[0] + 0.5).tobytes())
    hf_to_mm(tmp_path / "b", tmp_path / "mm", Layout(*DIVISIONS[3], 2), QUIET)
    for other in ("b", "mm"):
        found = list(verify(tmp_path / "a", tmp_path / other))
        (difference,) = [f for f in found if isinstance(f, Difference)]
        assert difference.name == name
        assert difference.text == "1 of 2048 numbers differ, by up to 0.5"
        assert len(found) == len(bits)


# -- random divisions -------------------------------------------------------------------------------------------------


@st.composite
def divisions(draw: st.DrawFn, layers: int, depth: int) -> tuple[Rows, Rows]:
    """Any number of stages, any of them empty, vision before language."""
    pp, vpp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    stages = pp * vpp
    border = draw(st.integers(0, stages - 1))
    vision = [*_shares(draw, depth, border + 1), *[0] * (stages - border - 1)]
    text = [*[0] * border, *_shares(draw, layers, stages - border)]
    rows = [tuple(tuple(flat[row * pp : (row + 1) * pp]) for row in range(vpp)) for flat in (text, vision)]
    return rows[0], rows[1]


def _shares(draw: st.DrawFn, total: int, stages: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=stages - 1, max_size=stages - 1)))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for family, tied in product(["qwen2_vl", "qwen2_5_vl"], [False, True]):
        path = folder / f"{family}-{tied}"
        made[family, tied] = path, write_hf(path, tiny_config(family, layers=5, depth=3, tied=tied))
    return made


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_division(
    models: dict[tuple[str, bool], tuple[Path, dict[str, np.ndarray]]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    path, bits = models[data.draw(st.sampled_from(sorted(models)))]
    canonical, kind = data.draw(st.booleans()), data.draw(st.sampled_from(["pt", "safetensors"]))
    ranks, vision_ranks = st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2])
    first, second = (
        Layout(*data.draw(divisions(5, 3)), data.draw(ranks), data.draw(vision_ranks), canonical) for _ in range(2)
    )
    folder = tmp_path_factory.mktemp("any")
    shutil.copytree(path, folder / "hf")
    round_trip(folder, first, second, kind=kind)
    assert same(read_hf(folder / "back"), bits)
    shutil.rmtree(folder)


def test_missing_parts_are_told(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config())
    one = Layout(*DIVISIONS[1], 2)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", one, QUIET)
    shutil.rmtree(tmp_path / "mm" / "release" / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match=r"1 of 4 parts missing \(mp_rank_01_000\)"):
        mm_to_hf(tmp_path / "mm", tmp_path / "hf", tmp_path / "no", one, QUIET)
