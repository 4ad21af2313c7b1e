#!/usr/bin/env bash
# Train a recipe with PyTorch, one process for each device: `duetvl launch` over torchrun, on CPU, CUDA or Ascend.
#
#   NPROC=8 bash launch/torch_npu/train.sh RECIPE [--device cpu|cuda|npu] [--resume [DIR[@STEP]]] [section.key=value ...]
#
# All arguments are those of `duetvl train`. Several nodes: NNODES, NODE_RANK and MASTER (HOST:PORT of node 0), and the
# same command on each. RESTARTS, LOG_DIR as in docs/many_ranks.md. PYTHON chooses the interpreter; the project's .venv
# comes first otherwise.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" torch PyTorch
launch torch_npu "$@"
