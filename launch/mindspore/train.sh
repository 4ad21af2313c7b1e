#!/usr/bin/env bash
# Train a recipe with MindSpore, one process for each device: `duetvl launch` over msrun, on CPU or Ascend.
#
#   NPROC=8 bash launch/mindspore/train.sh RECIPE [--device cpu|ascend] [--resume [DIR[@STEP]]] [section.key=value ...]
#
# All arguments are those of `duetvl train`. Several nodes: NNODES, NODE_RANK and MASTER (HOST:PORT of node 0), and the
# same command on each. RESTARTS, LOG_DIR as in docs/many_ranks.md. PYTHON chooses the interpreter; the project's .venv
# comes first otherwise.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" mindspore MindSpore
launch mindspore "$@"
