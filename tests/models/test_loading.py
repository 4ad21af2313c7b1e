"""Model directories of every layout that is about, read onto both backends, and what we write read by others."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from duetvl.core.backend import load_backend
from duetvl.core.boxes import Box, LocalPart, Slices
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.mesh import Mesh
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.loading import load_model
from duetvl.models.qwen_vl.names import canonical_names
from duetvl.parallel.division import Division
from duetvl.storage.files import staged_directory
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file
from duetvl.storage.weights_dir import load_parameters, open_weights, plan_shards, write_shards, write_weights

SHAPES = {
    "visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
    "visual.blocks.0.attn.qkv.weight": (24, 8),
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}
RANDOM = np.random.default_rng(0)
VALUES = {name: RANDOM.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
NAMES = canonical_names(tied=False)


def bf16(x):
    """Bits after rounding to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(x, dtype):
    return bf16(x) if dtype == "bfloat16" else x.astype(dtype)


def specs(arrays):
    return {n: TensorSpec("bfloat16" if x.dtype == np.uint16 else x.dtype.name, x.shape) for n, x in arrays.items()}


def put(path, arrays):
    write_tensor_file(path, specs(arrays), arrays.__getitem__, {"format": "pt"})


def sharded(directory, arrays=None):
    arrays = arrays or VALUES
    return write_shards(directory, specs(arrays), arrays.__getitem__, max_shard_bytes=400)


@pytest.fixture(scope="module", params=["torch_npu", "mindspore"])
def be(request):
    pytest.importorskip({"torch_npu": "torch"}.get(request.param, request.param))
    return load_backend(request.param, "cpu")


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_every_dtype_to_every_dtype(tmp_path, be, stored, dtype):
    edges = np.array(
        [1.00390625, 1.01171875, -0.0, 65504.0, 6e-8, 3.3895e38 if stored != "float16" else 1.0], np.float32
    )
    values = {**VALUES, "model.norm.weight": edges}
    on_disk = {name: encode(x, stored) for name, x in values.items()}
    put(tmp_path / "model.safetensors", on_disk)
    with np.errstate(over="ignore"):
        loaded = load_parameters(SHAPES, open_weights(tmp_path, NAMES), be, dtype)
        assert list(loaded) == list(SHAPES)
        for name, x in on_disk.items():
            expected = x if stored == dtype else encode(wide(x) if stored == "bfloat16" else x, dtype)
            raw, found = be.checkpoint_io.save(loaded[name])
            assert found == dtype
            assert tuple(loaded[name].shape) == SHAPES[name]
            assert raw.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("layout", ["single", "indexed", "no_index", "renamed", "headless", "other_file_name"])
def test_every_layout(tmp_path, layout):
    shapes = dict(SHAPES)
    if layout == "single":
        put(tmp_path / "model.safetensors", VALUES)
    elif layout == "other_file_name":
        put(tmp_path / "weights.safetensors", VALUES)
    elif layout in ("indexed", "no_index"):
        assert len(sharded(tmp_path)) > 2
        if layout == "no_index":
            (tmp_path / "model.safetensors.index.json").unlink()
    else:
        spell = {"renamed": new_name, "headless": lambda name: new_name(name).removeprefix("model.")}[layout]
        shapes.pop("lm_head.weight") if layout == "headless" else None
        put(tmp_path / "model.safetensors", {spell(name): VALUES[name] for name in shapes})
    weights = open_weights(tmp_path, NAMES)
    weights.check(shapes)
    assert all(np.array_equal(weights.view(name), VALUES[name]) for name in shapes)


def new_name(name):
    """As the modules of transformers >= 4.52 are called."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.") if name.startswith("model.") else name


def test_tied_head_and_buffers_are_left_out(tmp_path):
    extra = {**VALUES, "visual.rotary_pos_emb.inv_freq": np.ones(2, np.float32)}
    put(tmp_path / "model.safetensors", extra)
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    open_weights(tmp_path, canonical_names(tied=True)).check(tied)
    open_weights(tmp_path, NAMES).check(SHAPES)


def test_parts(tmp_path, be):
    """Of boxes in the middle of a tensor, of columns, and of several boxes; counted as what was read."""
    put(tmp_path / "model.safetensors", {name: bf16(x) for name, x in VALUES.items()})
    slices = {
        "visual.blocks.0.attn.qkv.weight": Slices((Box((4, 0), (4, 8)), Box((12, 0), (4, 8)), Box((20, 0), (4, 8)))),
        "model.layers.0.self_attn.q_proj.weight": Slices((Box((0, 2), (6, 3)),), 1),
        "model.norm.weight": Slices((Box((5,), (1,)),)),
    }

    def part_of(name, shape):
        return LocalPart(shape, slices.get(name, Slices.whole(shape)))

    seen = []
    loaded = load_parameters(SHAPES, open_weights(tmp_path), be, "float32", part_of=part_of, progress=seen.append)
    for name, x in VALUES.items():
        wanted = np.concatenate([x[box.slices] for box in part_of(name, x.shape).slices.boxes])
        assert np.array_equal(be.to_numpy(loaded[name]), wide(bf16(wanted)))
    assert sum(seen) == 2 * sum(x.size for x in map(be.to_numpy, loaded.values()))
    slices["model.norm.weight"] = Slices((Box((5,), (2,)),))
    with pytest.raises(ValueError, match="does not contain"):
        load_parameters(SHAPES, open_weights(tmp_path), be, "float32", part_of=part_of)


@pytest.mark.parametrize("vision", ["divide", "shard"])
@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2.5-tied"])
def test_a_rank_loads_the_cut_of_the_whole(tiny, be, name, vision):
    """To the bit, whatever the degree; of a model on one rank, no parameter is a part."""
    whole = load_model(tiny.directory(name), backend=be, dtype="bfloat16")
    assert all(parameter.part is None for parameter in whole.parameters.values())
    for tp in (2, 3) if vision == "divide" else (2,):
        for rank in range(tp):
            division = Division.of(whole.config, Mesh(tp=tp), rank, vision=vision)
            part = load_model(tiny.directory(name), backend=be, dtype="bfloat16", division=division)
            for path, parameter in part.parameters.items():
                expected = parameter.place.of(be.to_numpy(whole.parameters[path].tensor))
                assert be.to_numpy(parameter.tensor).tobytes() == np.ascontiguousarray(expected).tobytes(), path
                assert parameter.place == division.part(path, whole.parameters[path].shape)
            assert part.parameters["model.embed_tokens.weight"].part is not None


def test_degrees_that_a_model_cannot_have(tiny):
    config = load_config(tiny.directory("qwen2-tied"))
    heads, vision = config.text.num_heads, config.vision.num_heads
    with pytest.raises(ConfigError, match=f"parallel.tp 99: the model has {heads} query heads.* are 1 to {heads}, "):
        Division.of(config, Mesh(tp=99), 0)
    with pytest.raises(ConfigError, match=f"are 1 to {vision}, .*; or divide frames instead: parallel.vision=divide"):
        Division.of(config, Mesh(tp=vision + 1), 0, vision="shard")


def test_patch_embedding_as_a_matrix(tmp_path, be):
    put(tmp_path / "model.safetensors", VALUES)
    flat = {**SHAPES, "visual.patch_embed.proj.weight": (8, 24)}
    loaded = load_parameters(flat, open_weights(tmp_path), be, "float32")["visual.patch_embed.proj.weight"]
    assert np.array_equal(be.to_numpy(loaded), VALUES["visual.patch_embed.proj.weight"].reshape(8, 24))


def test_loaded_tensors_are_the_model_s_own(tmp_path, be):
    """Writing to them reaches neither the file nor another load."""
    put(tmp_path / "model.safetensors", VALUES)
    first = load_parameters(SHAPES, open_weights(tmp_path), be, "float32")["model.norm.weight"]
    be.ops.assign(first, be.ops.zeros((6,)))
    second = load_parameters(SHAPES, open_weights(tmp_path), be, "float32")["model.norm.weight"]
    assert np.array_equal(be.to_numpy(second), VALUES["model.norm.weight"])


def test_progress_counts_all_bytes(tmp_path, be):
    put(tmp_path / "model.safetensors", VALUES)
    seen = []
    load_parameters(SHAPES, open_weights(tmp_path), be, "bfloat16", progress=seen.append)
    assert sum(seen) == sum(x.nbytes for x in VALUES.values())


# -- what is wrong with a directory -----------------------------------------------------------------------------------


def refused(directory, pattern, shapes=SHAPES):
    with pytest.raises(CheckpointError, match=pattern) as caught:
        open_weights(directory, NAMES).check(shapes)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_without_weights(tmp_path):
    refused(tmp_path / "absent", "no such directory")
    refused(tmp_path, "has no weights; expected model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "has an adapter only")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(tmp_path, "only in a format of pickles .*safe_serialization=True")


def test_missing_shards(tmp_path):
    files = sharded(tmp_path)
    files[1].unlink()
    refused(tmp_path, rf"1 of {len(files)} shards missing \({files[1].name}\); download the rest")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, rf"1 of {len(files)} shards missing \({files[1].name}\); download the rest")


def test_index_of_something_else(tmp_path):
    files = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "a.b": files[0].name}}))
    refused(tmp_path, rf"1 tensor\(s\) named that are not in their shard \(a.b in {files[0].name}\)")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused(tmp_path, "names files outside its directory")
    for broken in ('{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(broken)
        refused(tmp_path, r"index\.json: is not an index of shards: it has no weight_map .*; download it again")
    for broken, why in (("{", "cannot be read as JSON"), ("[]", "expected an index of shards, found list")):
        index.write_text(broken)
        refused(tmp_path, rf"index\.json: {why}")
    index.write_text(json.dumps(content).replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x", ', 1))
    refused(tmp_path, "the key 'model.norm.weight' is given twice in one object; keep one of them")


def test_an_index_with_a_byte_order_mark(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text(), encoding="utf-8-sig")
    assert open_weights(tmp_path, NAMES).places.keys() == VALUES.keys()


def test_truncated_shard(tmp_path):
    last = sharded(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(tmp_path, rf"{last.name}: is truncated")


def test_weights_of_another_model(tmp_path):
    put(tmp_path / "model.safetensors", VALUES)
    other = {name: shape for name, shape in SHAPES.items() if name != "model.norm.weight"}
    other |= {"model.layers.0.self_attn.q_proj.weight": (6, 5)} | {f"model.layers.{n}.mlp": (2,) for n in range(5)}
    refused(
        tmp_path,
        r"not those of its config \(10 tensors expected, 6 found\): "
        r"5 tensor\(s\) absent \(model.layers.0.mlp, model.layers.1.mlp, model.layers.2.mlp, ...\); "
        r"1 not part of the model \(model.norm.weight\); "
        r"1 of another shape \(model.layers.0.self_attn.q_proj.weight \[6, 6\] instead of \[6, 5\]\)",
        other,
    )


def test_quantized_weights(tmp_path):
    put(tmp_path / "model.safetensors", {**VALUES, "model.norm.weight": np.ones(6, np.int8)})
    refused(tmp_path, r"1 not floating point \(model.norm.weight int8\)")


def test_a_tensor_twice(tmp_path):
    put(tmp_path / "model.safetensors", {**VALUES, "model.language_model.norm.weight": np.ones(6, np.float32)})
    refused(tmp_path, "model.norm.weight is stored twice: .*'model.language_model.norm.weight'")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_written_shards_and_index(tmp_path, be):
    tensors = {name: be.ops.from_numpy(x, "bfloat16") for name, x in VALUES.items()}
    with staged_directory(tmp_path / "out") as staging:
        files = write_weights(staging, tensors, be, max_shard_bytes=300)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes // 2 for x in VALUES.values())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert [path.name for path in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    for name, x in VALUES.items():
        file = TensorFile(tmp_path / "out" / index["weight_map"][name])
        assert file.specs[name] == TensorSpec("bfloat16", x.shape)
        assert np.array_equal(file.view(name), bf16(x))
    with pytest.raises(CheckpointError, match="has weights already"):
        write_weights(tmp_path / "out", tensors, be)


def test_plan_of_shards():
    sizes = {name: TensorSpec("float32", (size,)) for name, size in {"a": 2, "b": 2, "c": 9, "d": 1, "e": 1}.items()}
    assert plan_shards(sizes, 16) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards({}, 16) == [[]]


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 40_000])
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    be = load_backend("torch_npu", "cpu")
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2, "patch_size": 2},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)

    stored = open_weights(tmp_path / "theirs", canonical_names(tied=True))
    shapes = {name: stored.spec(name).shape for name in stored.places}
    assert {name.split(".")[0] for name in shapes} == {"visual", "model"}
    loaded = load_parameters(shapes, stored, be, "bfloat16")
    write_weights(tmp_path / "ours", loaded, be, max_shard_bytes=max_shard_bytes)
    config.save_pretrained(tmp_path / "ours")

    again = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    wanted = model.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in again.state_dict().items())


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading
from duetvl.core.backend import load_backend
from duetvl.core.boxes import Box, LocalPart, Slices
from duetvl.storage.weights_dir import load_parameters, open_weights
def status(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
be = load_backend({backend!r}, "cpu")
shapes = {{name: spec.shape for name, spec in ((n, weights.spec(n)) for weights in [open_weights({path!r})]
          for n in weights.places)}}
before, peak, done = status("RssAnon"), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
def part_of(name, shape):
    return LocalPart(shape, Slices((Box((0, 0), (shape[0], shape[1] // {columns})),), 1))
loaded = load_parameters(shapes, open_weights({path!r}), be, {dtype!r}, part_of=part_of)
done.set()
watcher.join()
print(max(peak, status("RssAnon")) - before, status("RssFile"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "columns"), [("bfloat16", 1), ("float32", 1), ("bfloat16", 4)])
@pytest.mark.parametrize("backend", ["torch_npu", "mindspore"])
def test_peak_memory_is_the_model_and_a_tensor(tmp_path, backend, dtype, columns):
    """Where a rank holds one of so many parts of all columns, it is what it holds."""
    pytest.importorskip({"torch_npu": "torch"}.get(backend, backend))
    arrays = {f"w{n}": np.full((2048, 2048), n, np.uint16) for n in range(24)}  # 8 MiB each
    put(tmp_path / "model.safetensors", arrays)
    script = MEASURE.format(backend=backend, path=str(tmp_path), dtype=dtype, columns=columns)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    anonymous, _ = map(int, ran.stdout.split()[-2:])
    size = sum(x.nbytes for x in arrays.values()) * (2 if dtype == "float32" else 1) // columns
    assert size * 0.95 < anonymous < size * (1 + 1 / 24) + 12e6
