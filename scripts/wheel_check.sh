#!/usr/bin/env bash
# Builds a wheel of the tracked files, installs it with MindSpore alone into an empty environment, and trains with it.
#
#   scripts/wheel_check.sh [EXTRA]    torch instead of mindspore, say
#
# What an editable install of the checkout hides shows here: a module or a data file that is not in the wheel, a
# dependency that is not declared, a use of the framework that is not installed. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-mindspore}
python=${PYTHON:-$root/.venv/bin/python}
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
unset PYTHONPATH

mkdir "$room/tree"
cd "$root"
git ls-files -z | xargs -0 cp --parents -t "$room/tree"  # a build in the checkout would pack what an old one has left
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$room" "$room/tree"
wheel=$(echo "$room"/duetvl-*.whl)
"$python" -m venv "$room/venv"
"$room/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$wheel[$extra]"

cd "$room"
export PATH="$room/venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PYTHONPATH="$room/tree/tests/training" python -c 'import pathlib, tiny_run; tiny_run.write_recipe(pathlib.Path())'
python -c 'import duetvl; from duetvl.models.qwen_vl.config import published_names as names
assert "/venv/" in duetvl.__file__ and len(names()) == 7, (duetvl.__file__, names())'
duetvl --version
duetvl doctor
duetvl check tiny.json
duetvl train tiny.json checkpoint.export=true
duetvl export runs/tiny -o exported
cmp exported/model.safetensors runs/tiny/export/model.safetensors
mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir exported \
    --cfg.parallel_config.llm_pp_layers [[2]] --cfg.parallel_config.vit_pp_layers [[2]] \
    --cfg.parallel_config.tp_size 1
mm-convert verify exported mm
echo "the wheel $(basename "$wheel") works with $extra alone"
