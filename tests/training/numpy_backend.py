"""As much of a backend as files need, on numpy arrays: quick to import in processes that are killed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.core.ranks import Ranks
from duetvl.training.checkpoints.checkpoint import take_snapshot
from duetvl.training.checkpoints.writing import begin_save, write_first


class NumpyFiles:
    """uint16 arrays stand for bfloat16."""

    def load(self, raw, stored, dtype):
        if stored == dtype:
            return raw.copy()
        values = (raw.astype(np.uint32) << 16).view(np.float32) if stored == "bfloat16" else raw
        if dtype == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # cut, not rounded
        return values.astype(dtype)

    def save(self, x):
        return x, name_of(x)


def name_of(x):
    return "bfloat16" if x.dtype == np.uint16 else x.dtype.name


def assign(dst, src):
    dst[...] = src


def numpy_backend():
    return SimpleNamespace(
        name="numpy",
        checkpoint_io=NumpyFiles(),
        ops=SimpleNamespace(dtype_of=name_of, assign=assign),
        capabilities=SimpleNamespace(framework="numpy"),
    )


ALONE = Ranks(SimpleNamespace(rank=0, size=1, gather_objects=lambda value: [value]))

SHAPES = {"visual.patch_embed.proj.weight": (6, 3, 2, 2, 2), "model.norm.weight": (7,), "lm_head.weight": (5, 7)}


def parameters(seed, half=False, shapes=SHAPES):
    random = np.random.default_rng(seed)
    values = {path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    if half:
        values = {path: (x.view(np.uint32) >> 16).astype(np.uint16) for path, x in values.items()}
    return {path: Parameter(path, x) for path, x in values.items()}


def optimizer_state(params, seed, half=False):
    random = np.random.default_rng(seed)
    state = AdamWState(step=dict.fromkeys(params, seed))
    for slot in [state.exp_avg, state.exp_avg_sq] + ([state.master] if half else []):
        slot.update({path: random.standard_normal(p.shape).astype(np.float32) for path, p in params.items()})
    return state


def save_checkpoint(run_dir, *, keep_last=None, **moment):
    """A checkpoint of this moment; `moment` is what `take_snapshot` takes."""
    return save_snapshot(run_dir, take_snapshot(**moment), keep_last)


def save_snapshot(run_dir, taken, keep_last=None):
    return write_first(begin_save(run_dir, taken.step, taken.nbytes, keep_last), taken, keep_last=keep_last)
