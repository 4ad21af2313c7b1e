"""One of two ranks: whole trainings in several layouts through the NPU code path, over gloo. Started by torchrun.

`two_ranks.py DIRECTORY OUTPUT` with the models and data of whole_runs.Here; rank 0 leaves OUTPUT/curves.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def run_all(directory: Path, output: Path) -> None:
    """Train in every layout."""
    from npu.on_cpu import optimizer_of_torch_npu, torch_backend
    from npu.references import CALLS
    from npu.whole_runs import Here

    here, backend, curves = Here(directory, directory), torch_backend(), {}
    for name, (kind, family, layout) in LAYOUTS.items():
        CALLS.clear()
        with optimizer_of_torch_npu():
            curves[name] = here.curve(backend, kind, family, "float32", output / name, *layout)
        assert CALLS["npu_fusion_attention_grad"] > 0
    if backend.collectives.rank == 0:
        np.savez(output / "curves.npz", **curves)
    backend.collectives.stop()
    # One that is left may abort the process at its end, when it gives back a tensor that Python knew.
    assert not [name for name in thread_names() if "gloo" in name], "a group outlived its end"


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), *(str(TESTS / folder) for folder in ("training", "data"))]
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))
