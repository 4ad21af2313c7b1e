#!/usr/bin/env bash
# Train a recipe with PyTorch, one process for each device: `duetvl launch` over torchrun, on CPU, CUDA or Ascend.
#
#   NPROC=8 bash launch/torch_npu/train.sh RECIPE [--device cpu|cuda|npu] [--resume [DIR[@STEP]]] [section.key=value ...]
#
# All arguments are those of `duetvl train`. Several nodes: NNODES, NODE_RANK and MASTER (HOST:PORT of node 0), and the
# same command on each. RESTARTS, LOG_DIR as in docs/many_ranks.md. PYTHON chooses the interpreter; the project's .venv
# comes first otherwise.
set -euo pipefail

# As MindSpeed-MM's scripts have them for Ascend, where torch_npu and CANN read them; what you have set stays. None has
# been tried with duetvl on Ascend yet. For 72B they also have MULTI_STREAM_MEMORY_REUSE=2 (memory of one stream is used
# by another) and PYTORCH_NPU_ALLOC_CONF=expandable_segments:True (less fragmented memory).
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"        # operators are dispatched from a second thread
export COMBINED_ENABLE="${COMBINED_ENABLE:-1}"            # operators on tensors that are not contiguous are joined
export CPU_AFFINITY_CONF="${CPU_AFFINITY_CONF:-1}"        # processes are bound to processors: 1 coarsely, 2 finely
export NPU_ASD_ENABLE="${NPU_ASD_ENABLE:-0}"              # no detection of silent errors
export ACLNN_CACHE_LIMIT="${ACLNN_CACHE_LIMIT:-100000}"   # how many prepared operators are kept

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" torch PyTorch
launch torch_npu "$@"
