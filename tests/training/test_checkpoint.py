"""The training checkpoint: what it keeps, what it notices, what a kill leaves, and who may read it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy_backend import SHAPES, numpy_backend, optimizer_state, parameters, save_checkpoint

import duetvl
from duetvl.core.boxes import Box, LocalPart, Slices
from duetvl.core.errors import CheckpointError
from duetvl.core.optimizer import ParameterGroup
from duetvl.core.params import Parameter
from duetvl.storage.checkpoint_format import Manifest, Meta
from duetvl.storage.finding import checkpoints_dir, find_checkpoint, has_checkpoint
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.checkpoints import checkpoint as ck
from duetvl.training.checkpoints import writing
from duetvl.training.checkpoints.pieces import LocalTensor, on_host

META = Meta(
    recipe={"optim": {"lr": 1e-5}},
    model_config={"model_type": "qwen2_5_vl"},
    data_position={"epoch": 1, "sample": np.int64(17)},
    random_state={"seed": 3, "counter": 2**40},
    extra={"best": 0.5},
)


def save(run_dir, step, seed=None, half=False, **options):
    params = parameters(step if seed is None else seed, half)
    state = optimizer_state(params, step, half)
    save_checkpoint(
        run_dir,
        step=step,
        parameters=params.values(),
        optimizer_state=state,
        meta=META,
        backend=numpy_backend(),
        **options,
    )
    return params, state


def load(ref, params, state):
    return ck.load_checkpoint(ref, parameters=params.values(), optimizer_state=state, backend=numpy_backend())


def steps(run_dir):
    return sorted(path.name for path in checkpoints_dir(run_dir).iterdir() if path.is_dir())


@pytest.mark.parametrize("half", [False, True])
def test_everything_comes_back_bit_for_bit(tmp_path, half):
    params, state = save(tmp_path, 100, half=half)
    fresh = parameters(1, half)
    fresh_state = optimizer_state(fresh, 2, half)
    storage = {path: p.tensor.ctypes.data for path, p in fresh.items()}

    ref = find_checkpoint(tmp_path)
    meta = load(ref, fresh, fresh_state)

    assert ref.step == 100
    assert ref.rejected == ()
    assert meta == Meta(**{**vars(META), "data_position": {"epoch": 1, "sample": 17}})
    assert fresh_state.step == state.step
    for path in SHAPES:
        assert fresh[path].tensor.tobytes() == params[path].tensor.tobytes()
        assert fresh[path].tensor.ctypes.data == storage[path]
    for kind, slot in state.slots().items():
        assert {p: x.tobytes() for p, x in fresh_state.slots()[kind].items()} == {
            p: x.tobytes() for p, x in slot.items()
        }


def test_files_are_ordinary_safetensors(tmp_path):
    params, _ = save(tmp_path, 100)
    folder = tmp_path / "checkpoints/step-0000100"
    assert sorted(path.name for path in folder.iterdir()) == [
        "exp_avg-00000-of-00001.safetensors",
        "exp_avg_sq-00000-of-00001.safetensors",
        "manifest.json",
        "weights-00000-of-00001.safetensors",
    ]
    stored = pytest.importorskip("safetensors.numpy").load_file(folder / "weights-00000-of-00001.safetensors")
    assert set(stored) == {"visual.patch_embed.proj.weight@0,0,0,0,0", "model.norm.weight@0", "lm_head.weight@0,0"}
    assert np.array_equal(stored["model.norm.weight@0"], params["model.norm.weight"].tensor)


def test_weights_alone(tmp_path):
    params, _ = save(tmp_path, 5)
    fresh = parameters(1)
    load(find_checkpoint(tmp_path), fresh, None)
    assert all(np.array_equal(fresh[path].tensor, params[path].tensor) for path in SHAPES)


def test_another_dtype_goes_through_the_master(tmp_path):
    half, state = save(tmp_path, 5, half=True)
    whole = parameters(1)
    load(find_checkpoint(tmp_path), whole, optimizer_state(whole, 1))
    assert all(np.array_equal(whole[path].tensor, state.master[path]) for path in SHAPES)

    params, _ = save(tmp_path, 6)
    fresh_state = optimizer_state(half, 1, half=True)
    load(find_checkpoint(tmp_path), half, fresh_state)
    assert all(np.array_equal(fresh_state.master[path], params[path].tensor) for path in SHAPES)


# -- finding and rotating ---------------------------------------------------------------------------------------------


def test_rotation_and_chosen_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == ["step-0000020", "step-0000030"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-0000030\n"
    assert find_checkpoint(tmp_path, 20).step == 20
    assert find_checkpoint(tmp_path / "checkpoints/step-0000020").step == 20
    with pytest.raises(CheckpointError, match="no checkpoint of step 10; there are 20, 30"):
        find_checkpoint(tmp_path, 10)


def test_a_run_that_goes_back_is_not_lost_behind_its_old_branch(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 11, keep_last=2)
    assert steps(tmp_path) == ["step-0000011", "step-0000030"]
    assert find_checkpoint(tmp_path).step == 11


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 10)
    params, _ = save(tmp_path, 10, seed=77)
    fresh = parameters(1)
    load(find_checkpoint(tmp_path), fresh, None)
    assert np.array_equal(fresh["lm_head.weight"].tensor, params["lm_head.weight"].tensor)
    assert steps(tmp_path) == ["step-0000010"]


def test_nothing_to_load(tmp_path):
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="has no checkpoint; give the directory of a run"):
        find_checkpoint(tmp_path)


# -- damage -----------------------------------------------------------------------------------------------------------


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "flip_last":
        data[-2] ^= 1
    else:
        data = data[: len(data) - 3]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "flip_last", "cut", "remove"])
@pytest.mark.parametrize("name", ["manifest.json", "exp_avg-00000-of-00001.safetensors"])
def test_a_damaged_newest_is_told_and_passed_over(tmp_path, name, how):
    save(tmp_path, 10)
    save(tmp_path, 20)
    path = tmp_path / "checkpoints/step-0000020" / name
    path.unlink() if how == "remove" else damage(path, how)

    ref = find_checkpoint(tmp_path, pass_over=True)
    assert ref.step == 10
    assert len(ref.rejected) == 1
    assert "step-0000020" in ref.rejected[0]
    assert name in ref.rejected[0]
    for step in (None, 20):  # what was asked for is met, or it is an error
        with pytest.raises(CheckpointError, match="step-0000020"):
            find_checkpoint(tmp_path, step)
    with pytest.raises(CheckpointError, match=rf"give {tmp_path}@10 for the undamaged one of step 10$"):
        find_checkpoint(tmp_path)


def test_a_newest_that_has_been_removed_is_missed(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    shutil.rmtree(tmp_path / "checkpoints/step-0000020")
    with pytest.raises(CheckpointError, match=r"step-0000020: the newest checkpoint, is not there .* give .*@10 for"):
        find_checkpoint(tmp_path)
    ref = find_checkpoint(tmp_path, pass_over=True)
    assert (ref.step, len(ref.rejected)) == (10, 1)


@pytest.mark.parametrize("how", ["flip", "remove"])
def test_weights_alone_need_no_other_file(tmp_path, how):
    params, _ = save(tmp_path, 10)
    moments = tmp_path / "checkpoints/step-0000010/exp_avg-00000-of-00001.safetensors"
    moments.unlink() if how == "remove" else damage(moments, how)
    with pytest.raises(CheckpointError, match="exp_avg-00000"):
        find_checkpoint(tmp_path)
    stored = find_checkpoint(tmp_path, kinds=("weights",)).stored
    assert np.array_equal(stored.read("weights", "lm_head.weight")[0], params["lm_head.weight"].tensor)
    damage(tmp_path / "checkpoints/step-0000010/weights-00000-of-00001.safetensors", "flip")
    with pytest.raises(CheckpointError, match=r"weights-00000-of-00001\.safetensors does not match its checksum"):
        find_checkpoint(tmp_path, kinds=("weights",))


def test_a_checkpoint_is_found_under_another_name(tmp_path):
    save(tmp_path, 10)
    best = (tmp_path / "checkpoints/step-0000010").rename(tmp_path / "best")
    assert find_checkpoint(best).step == find_checkpoint(best, 10).step == 10
    with pytest.raises(CheckpointError, match="best: is the checkpoint of step 10, not of step 20"):
        find_checkpoint(best, 20)


def test_a_manifest_names_no_file_elsewhere(tmp_path):
    save(tmp_path, 10)
    manifest = find_checkpoint(tmp_path).manifest
    files = tuple(replace(record, name=f"../{record.name}") for record in manifest.files)
    with pytest.raises(CheckpointError, match="names a file outside of its directory"):
        Manifest.from_text(replace(manifest, files=files).to_text())


def test_all_damaged(tmp_path):
    save(tmp_path, 10)
    damage(tmp_path / "checkpoints/step-0000010/weights-00000-of-00001.safetensors", "flip")
    with pytest.raises(CheckpointError, match=r"does not match its checksum; no other checkpoint can be used"):
        find_checkpoint(tmp_path)


def test_later_format_version(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "checkpoints/step-0000010/manifest.json"
    path.write_text(path.read_text().replace('"version": 1,', '"version": 2,'))
    with pytest.raises(CheckpointError, match="version 2, this duetvl reads 1"):
        find_checkpoint(tmp_path, 10)


def test_another_model_is_refused_before_anything_is_written(tmp_path):
    save(tmp_path, 10)
    ref = find_checkpoint(tmp_path)
    other = parameters(1, shapes={**SHAPES, "lm_head.weight": (6, 7), "model.extra": (2,)})
    before = {path: p.tensor.copy() for path, p in other.items()}
    expected = r"another model: 1 tensor\(s\) absent \(model.extra\); 1 of another shape \(lm_head.weight \[5, 7\]"
    with pytest.raises(CheckpointError, match=expected):
        load(ref, other, None)
    assert all(np.array_equal(other[path].tensor, before[path]) for path in other)

    params = parameters(1)
    params["model.norm.weight"].trainable = params["visual.patch_embed.proj.weight"].trainable = False
    trained = optimizer_state({"lm_head.weight": params["lm_head.weight"]}, 1)
    with pytest.raises(CheckpointError, match=r"trained other parameters: 2 unknown here"):
        load(ref, params, trained)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("duetvl.storage.tensor_files.os.fsync", full)
    with pytest.raises(CheckpointError, match="step 20 could not be written: No space left on device; earlier ones"):
        save(tmp_path, 20)
    assert steps(tmp_path) == ["step-0000010"]
    assert find_checkpoint(tmp_path).step == 10


# -- kills ------------------------------------------------------------------------------------------------------------

SAME_PATH = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
KILLED = """
import os, signal
from numpy_backend import numpy_backend, optimizer_state, parameters, save_checkpoint
from duetvl.storage.checkpoint_format import Meta

def save(run_dir, step):
    params = parameters(step)
    save_checkpoint(run_dir, step=step, parameters=params.values(), optimizer_state=optimizer_state(params, step),
                    meta=Meta(), backend=numpy_backend(), keep_last={keep})

def die_at(moment):
    count = 0
    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))

for moment in range(1, 1000):
    run_dir = os.path.join({root!r}, str(moment))
    save(run_dir, 10)
    child = os.fork()
    if not child:
        die_at(moment)
        save(run_dir, {step})
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


@pytest.mark.parametrize(("step", "keep"), [(20, 1), (20, 2), (10, 1)])
def test_a_kill_at_any_instant_leaves_a_loadable_checkpoint(tmp_path, step, keep):
    """Killed before each call that changes the directory, in turn, until a save lives to its end."""
    script = KILLED.format(root=str(tmp_path), step=step, keep=keep)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=SAME_PATH)
    moments = int(ran.stdout)
    assert moments > 10
    found = []
    for moment in range(1, moments):
        run_dir = tmp_path / str(moment)
        ref = find_checkpoint(run_dir)
        assert ref.rejected == ()
        found.append(ref.step)
        params = parameters(0)
        load(ref, params, optimizer_state(params, 0))
        assert np.array_equal(params["lm_head.weight"].tensor, parameters(ref.step)["lm_head.weight"].tensor)

        writing.remove_leftovers(run_dir)
        assert find_checkpoint(run_dir).step == ref.step
        assert not [name for name in steps(run_dir) if name.startswith(".")]
        save(run_dir, 30, keep_last=1)
        assert steps(run_dir) == ["step-0000030"]
    assert set(found) == {10, step}


def test_a_kill_in_the_middle_of_writing(tmp_path):
    """A process that saves without pause is killed at arbitrary times."""
    script = KILLED.split("for moment")[0].format(keep=2)
    script += f"\nfor step in range(1, 10**6):\n    save({str(tmp_path)!r}, step)\n    print(step, flush=True)\n"
    for wait in (1, 4, 9):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=SAME_PATH
        ) as child:
            seen = [int(child.stdout.readline()) for _ in range(wait)]
            os.kill(child.pid, signal.SIGKILL)
        ref = find_checkpoint(tmp_path)
        assert ref.rejected == ()
        assert ref.step >= seen[-1]
        for path in checkpoints_dir(tmp_path).glob("step-*"):
            writing.remove_directory(path)
        (checkpoints_dir(tmp_path) / "latest").unlink()


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_several_writers_and_any_reader(tmp_path):
    """Two processes write their halves, split along different axes for each kind; a third layout reads."""
    random = np.random.default_rng(0)
    weight, moment = (random.standard_normal((6, 8)).astype(np.float32) for _ in range(2))
    staging = writing.begin_save(tmp_path, 3, 0)
    written = []
    for rank in (0, 1):
        boxes = {"weights": Box((3 * rank, 0), (3, 8)), "exp_avg": Box((0, 5 * rank), (6, 5 if rank == 0 else 3))}
        pieces = [
            LocalTensor(
                kind, "w", LocalPart((6, 8), Slices((box,))), {"weights": weight, "exp_avg": moment}[kind][box.slices]
            )
            for kind, box in boxes.items()
        ]
        wanted = {kind: {"w": (6, 8)} for kind in boxes}
        mine = writing.Snapshot(3, META, {"w": 3}, tuple(on_host(pieces, numpy_backend())), {}, wanted)
        written.append(writing.write_share(staging, mine, rank, 2))
    with pytest.raises(ValueError, match="do not make up"):
        writing.make_manifest(mine, written[:1])
    with pytest.raises(ValueError, match="do not make up"):
        writing.make_manifest(mine, [*written, written[1]])
    writing.commit(staging, writing.make_manifest(mine, written))

    ref = find_checkpoint(tmp_path)
    stored = ref.stored
    for kind, whole in (("weights", weight), ("exp_avg", moment)):
        assert np.array_equal(stored.read(kind, "w")[0], whole)
        for box in (Box((1, 2), (4, 5)), Box((5, 7), (1, 1)), Box((0, 0), (3, 8)), Box((2, 0), (0, 8))):
            assert np.array_equal(stored.read(kind, "w", box)[0], whole[box.slices])
    parts = Slices((Box((4, 1), (2, 3)), Box((0, 1), (1, 3))))
    part = LocalTensor("weights", "w", LocalPart((6, 8), parts), np.zeros((3, 3), np.float32))
    ck.load_pieces(ref, [part], numpy_backend())
    assert np.array_equal(part.tensor, weight[[4, 5, 0], 1:4])


def test_manifest_with_missing_boxes_is_damaged(tmp_path):
    save(tmp_path, 10)
    manifest = find_checkpoint(tmp_path).manifest
    stored = manifest.tensors["weights"]["lm_head.weight"]
    manifest.tensors["weights"]["lm_head.weight"] = type(stored)(stored.dtype, (6, 7), stored.boxes)
    with pytest.raises(CheckpointError, match="do not make up a tensor"):
        Manifest.from_text(manifest.to_text())


# -- the frameworks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backends():
    pytest.importorskip("torch")
    pytest.importorskip("mindspore")
    return {name: duetvl.core.backend.load_backend(name, "cpu") for name in ("torch_npu", "mindspore")}


def run_state(be, dtype, seed):
    values = {path: p.tensor for path, p in parameters(seed).items()}
    params = {path: Parameter(path, be.ops.from_numpy(x, dtype)) for path, x in values.items()}
    state = be.optimizer.create([ParameterGroup(list(params.values()))])
    for slot in (state.exp_avg, state.exp_avg_sq):
        for path, x in slot.items():
            be.ops.assign(x, be.ops.from_numpy(np.abs(values[path]) / 3))
    return params, state


def bits(be, params, state):
    tensors = {"weights": {path: p.tensor for path, p in params.items()}, **state.slots()}
    return {
        (kind, path): be.checkpoint_io.save(x)[0].tobytes()
        for kind, slot in tensors.items()
        for path, x in slot.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("writer", "reader"), [("torch_npu", "mindspore"), ("mindspore", "torch_npu")])
def test_bits_are_the_same_on_the_other_backend(tmp_path, backends, writer, reader, dtype):
    params, state = run_state(backends[writer], dtype, 1)
    state.step = dict.fromkeys(params, 12)
    save_checkpoint(
        tmp_path, step=12, parameters=params.values(), optimizer_state=state, meta=META, backend=backends[writer]
    )
    there, there_state = run_state(backends[reader], dtype, 2)
    ref = find_checkpoint(tmp_path)
    ck.load_checkpoint(ref, parameters=there.values(), optimizer_state=there_state, backend=backends[reader])
    assert bits(backends[reader], there, there_state) == bits(backends[writer], params, state)
    assert there_state.step == state.step
    assert ref.manifest.written_by["backend"] == writer
    assert TensorFile(ref.path / "weights-00000-of-00001.safetensors").specs["model.norm.weight@0"].dtype == dtype
