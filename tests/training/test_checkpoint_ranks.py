"""Checkpoints of many ranks: who writes what, and that any layout reads what any other has written."""

from __future__ import annotations

from itertools import product

import divided_state
import numpy as np
import pytest
from divided_state import LAYOUTS, SHAPES, cut, held, ranks_of, snapshot, whole
from numpy_backend import numpy_backend

from duetvl.core.backend import load_backend
from duetvl.core.boxes import Box, fills
from duetvl.core.errors import CheckpointError
from duetvl.storage.finding import find_checkpoint
from duetvl.training.checkpoints import writing
from duetvl.training.checkpoints.checkpoint import load_checkpoint


def save(run_dir, division, numbers, backend, make=np.array, step=7):
    """All ranks of a layout write, one after the other; no process is needed for that."""
    staging = writing.begin_save(run_dir, step, 0)
    written = []
    for one in ranks_of(division):
        taken = snapshot(held(one, numbers, make, seed=step), one, backend, step)
        written.append(writing.write_share(staging, taken, one.rank, division.mesh.size))
    return writing.commit(staging, writing.make_manifest(taken, written))


def load(ref, division, numbers, backend, make=np.array):
    """The state of a rank, read into tensors that held other numbers."""
    state = held(division, numbers, make)
    load_checkpoint(
        ref,
        parameters=state.parameters,
        owned=state.owned,
        optimizer_state=state.optimizer,
        everything=state.everything,
        backend=backend,
    )
    return state


def assert_holds(state, numbers, bits=np.asarray):
    for kind, path, part, tensor in state.tensors():
        wanted = cut(numbers[kind][path], part)
        assert np.array_equal(bits(tensor).reshape(wanted.shape), wanted), (kind, path)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("writer", LAYOUTS)
def test_any_layout_reads_what_any_other_has_written(tmp_path, writer, half):
    numbers, others, backend = whole(1, half), whole(2, half), numpy_backend()
    save(tmp_path, LAYOUTS[writer], numbers, backend)
    ref = find_checkpoint(tmp_path)
    assert set(ref.manifest.optimizer_steps) == set(SHAPES) - set(divided_state.FROZEN)
    for reader in LAYOUTS.values():
        for one in ranks_of(reader):
            state = load(ref, one, others, backend)
            assert_holds(state, numbers)
            assert set(state.optimizer.step.values()) <= {7}


def test_bytes_are_divided_evenly_and_every_rank_writes_a_file_of_its_own(tmp_path):
    """Beyond what one row more or less makes: of 8 parameters no two have their remainder on the same rank."""
    division, numbers = LAYOUTS["dp 2 x tp 2"], whole(1)
    shares = [snapshot(held(one, numbers), one, numpy_backend()).nbytes for one in ranks_of(division)]
    path = save(tmp_path, division, numbers, numpy_backend())
    assert sum(shares) == sum(4 * x.size for kind in ("weights",) for x in numbers[kind].values()) + sum(
        2 * 4 * x.size for p, x in numbers["exp_avg"].items() if p not in divided_state.FROZEN
    )
    assert max(shares) < 1.25 * min(shares)
    names = {file.name for file in path.iterdir()}
    assert names == {"manifest.json"} | {
        f"{kind}-{rank:05}-of-00004.safetensors" for kind in ("weights", "exp_avg", "exp_avg_sq") for rank in range(4)
    }


def test_a_dtype_that_is_not_stored_comes_from_the_masters_by_boxes(tmp_path):
    numbers, backend = whole(1, half=True), numpy_backend()
    save(tmp_path, LAYOUTS["dp 2 x tp 3"], numbers, backend)
    for one in ranks_of(LAYOUTS["tp 3"]):
        state = load(find_checkpoint(tmp_path), one, whole(2), backend)
        for path, p in state.owned.items():
            assert np.array_equal(p.tensor, cut(numbers["master"][path], p.place))
    save(tmp_path, LAYOUTS["dp 3"], whole(3), backend, step=8)
    for one in ranks_of(LAYOUTS["dp 2"]):
        state = load(find_checkpoint(tmp_path), one, whole(2, half=True), backend)
        for path, master in state.optimizer.master.items():
            assert np.array_equal(master, cut(whole(3)["weights"][path], state.owned[path].place))


def test_another_model_is_refused_by_a_rank_that_owns_no_row_of_it(tmp_path):
    numbers, backend = whole(1), numpy_backend()
    save(tmp_path, LAYOUTS["dp 2"], numbers, backend)
    for one in ranks_of(LAYOUTS["dp 16"]):
        state = held(one, numbers)
        next(p for p in state.parameters if p.path == "model.norm.weight").trainable = False
        state.owned.pop("model.norm.weight", None)
        with pytest.raises(CheckpointError, match=r"trained other parameters: 1 unknown here \(model.norm.weight\)"):
            load_checkpoint(
                find_checkpoint(tmp_path),
                parameters=state.parameters,
                owned=state.owned,
                optimizer_state=state.optimizer,
                backend=backend,
            )


def test_what_no_rank_has_written_is_missed(tmp_path):
    """Rank 0 has not all parameters itself: it asks for those of the whole model."""
    division, backend = LAYOUTS["pp 2 tied"], numpy_backend()
    staging, written = writing.begin_save(tmp_path, 7, 0), []
    for one in ranks_of(division):
        state = held(one, whole(1))
        state.parameters = [p for p in state.parameters if p.path != "model.layers.2.self_attn.k_proj.weight"]
        state.optimizer.exp_avg.pop("model.norm.weight", None)
        taken = snapshot(state, one, backend)
        written.append(writing.write_share(staging, taken, one.rank, 2))
    with pytest.raises(ValueError, match=r"'exp_avg of model.norm.weight', 'weights of model.layers.2.self_attn.k_pro"):
        writing.make_manifest(taken, written)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("first", "second"), [("torch_npu", "mindspore"), ("mindspore", "torch_npu")])
def test_there_and_back_over_backends_and_layouts_is_bit_for_bit(tmp_path, first, second, half):
    pytest.importorskip("torch")
    pytest.importorskip("mindspore")
    numbers, others = whole(1, half), whole(2, half)

    def tools(name):
        be = load_backend(name, "cpu")

        def make(array):
            dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
            return be.checkpoint_io.load(array, dtype, dtype)

        return be, make, lambda tensor: be.checkpoint_io.save(tensor)[0]

    journey = [("dp 2 x tp 2", first), ("pp 2 x tp 3 tied", second), ("tp 3", second), ("dp 2 x cp 2", first)]
    for number, (layout, name) in enumerate(journey):
        be, make, bits = tools(name)
        for one in ranks_of(LAYOUTS[layout]) if number else ():
            state = load(find_checkpoint(tmp_path / str(number - 1)), one, others, be, make)
            assert_holds(state, numbers, bits)
        save(tmp_path / str(number), LAYOUTS[layout], numbers, be, make)


def test_boxes_that_make_up_a_tensor():
    quarters = [Box((row, column), (2, 3)) for row, column in product((0, 2), (0, 3))]
    assert fills((4, 6), quarters)
    assert fills((), [Box((), ())])
    assert fills((0, 3), [])
    assert not fills((4, 6), quarters[:3])
    assert not fills((4, 6), [*quarters[:3], Box((1, 3), (2, 3))])  # as many numbers, some twice
    assert not fills((4, 6), [*quarters[:3], Box((2, 4), (2, 3))])
    assert not fills((4, 6), [*quarters, quarters[0]])
