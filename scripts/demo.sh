#!/usr/bin/env bash
# Sets up .venv, then trains a tiny Qwen2.5-VL on drawn pictures, on PyTorch and on MindSpore, and compares the two.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python scripts/demo/run.py "$@"
