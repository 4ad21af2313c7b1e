#!/usr/bin/env bash
# Checks and figures of one NVIDIA GPU, in at most 8 minutes and without a network: benchmarks/results/gpu.md.
#
#   scripts/gpu_check.sh [--only sft lora ...]     PYTHON names the interpreter
#
# torch has to be there, and pytest and transformers for the parts that compare; what is missing is a row of the page.
# On a CPU the same way: scripts/gpu_check.sh --device cpu --tiny --output /tmp/gpu.md
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
