"""One of two ranks: whole trainings in several layouts through the code path of Ascend, without hccl.

`two_ranks.py DIRECTORY OUTPUT DTYPE BACKEND`, of `BACKENDS`, with the models and data of whole_runs.Here; started by
torchrun or msrun; rank 0 leaves OUTPUT/curves.npz.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
LAYOUTS = {  # kind, family, and the recipe's section `parallel`
    "tensors divided": ("sft", "qwen2_vl", ["parallel.tp=2"]),
    "rows divided, attention around a ring": ("sft", "qwen2_5_vl", ["parallel.cp=2", "parallel.cp_algorithm=ring"]),
    "samples divided": ("dpo", "qwen2_5_vl", ["parallel.dp=2"]),
}


def thread_names() -> list[str]:
    """Of this process, C++'s among them."""
    return [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]


@contextmanager
def torch_npu() -> Iterator[Any]:
    """NpuOps and all that goes with it, over gloo."""
    from npu.on_cpu import optimizer_of_torch_npu, torch_backend

    with optimizer_of_torch_npu():
        yield torch_backend()


@contextmanager
def mindspore() -> Iterator[Any]:
    """AscendOps and all that goes with it, over our own transport."""
    import pytest

    from duetvl.backends.mindspore.collectives import MindSporeCpuCollectives
    from npu.mindspore_references import stand_in
    from npu.on_cpu import mindspore_backend

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        backend = mindspore_backend()
        yield replace(backend, collectives=MindSporeCpuCollectives(backend.ops))


BACKENDS = {"torch_npu": torch_npu, "mindspore": mindspore}


def run_all(directory: Path, output: Path, dtype: str, name: str) -> None:
    """Train in every layout."""
    from npu.references import CALLS
    from npu.whole_runs import Here

    here, curves = Here(directory, directory), {}
    with BACKENDS[name]() as backend:
        for layout, (kind, family, words) in LAYOUTS.items():
            CALLS.clear()
            curves[layout] = here.curve(backend, kind, family, dtype, output / layout, *words)
            assert CALLS["npu_fusion_attention_grad"] > 0
        if backend.collectives.rank == 0:
            np.savez(output / "curves.npz", **curves)
        backend.collectives.stop()
    # One that is left may abort the process at its end, when it gives back a tensor that Python knew.
    assert not [thread for thread in thread_names() if "gloo" in thread], "a group outlived its end"


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), *(str(TESTS / folder) for folder in ("training", "data"))]
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
