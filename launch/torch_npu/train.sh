#!/usr/bin/env bash
# Train a recipe on one process, started by torchrun, on CPU, CUDA or Ascend (torch_npu).
#
#   bash launch/torch_npu/train.sh RECIPE [--device cpu|cuda|npu] [--resume [DIR[@STEP]]] [section.key=value ...]
#
# All arguments are those of `duetvl train`. PYTHON chooses the interpreter; the project's .venv comes first otherwise.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" torch PyTorch

# --standalone: a rendezvous of its own on a free port, so that several runs can share a machine. One process per
# device; this release trains on one. torchrun sets OMP_NUM_THREADS=1 unless it is set: on a CPU give it all cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
exec "$python" "$root/launch/start.py" torch.distributed.run --standalone --nproc_per_node=1 \
    -m duetvl train "$@" --backend torch_npu
