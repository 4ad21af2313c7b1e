#!/usr/bin/env bash
# Train a recipe on one process, started by msrun, on CPU or Ascend.
#
#   bash launch/mindspore/train.sh RECIPE [--device cpu|ascend] [--resume [DIR[@STEP]]] [section.key=value ...]
#
# All arguments are those of `duetvl train`. PYTHON chooses the interpreter; the project's .venv comes first otherwise.
# PORT is msrun's rendezvous (a free one by default), LOG_DIR where it keeps the logs of its workers.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" mindspore MindSpore
port="${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
logs="${LOG_DIR:-$(mktemp -d)}"

# mindspore.parallel.cluster.run is msrun; it starts whatever `python` is on the path.
export PATH="$(cd "$(dirname "$python")" && pwd):$PATH"
export GLOG_v="${GLOG_v:-3}"  # MindSpore's C++ log: errors only

# --join=True waits for the worker, and shows its log, $logs/worker_0.log, as it grows. msrun starts the same program
# once more as its scheduler, which with one worker has nothing to do and ends at once.
exec "$python" "$root/launch/start.py" mindspore.parallel.cluster.run --worker_num=1 --local_worker_num=1 \
    --master_port="$port" --log_dir="$logs" --join=True \
    "$root/duetvl/__main__.py" train "$@" --backend mindspore
