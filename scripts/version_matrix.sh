#!/usr/bin/env bash
# Runs the core of the tests on the oldest, a middle and the newest version of each framework, and writes the table of
# docs/backends.md. Each version gets an environment of its own (2 to 7 GB): torch alone, and MindSpore with the torch
# that the references of the conformance suite are computed with.
#
#   scripts/version_matrix.sh [FOLDER]    FOLDER keeps the environments for the next run; a temporary one by default
#
# PYTHON is the version of the interpreter, 3.10, 3.11 (by default) or 3.12. ROWS chooses among the lines below by
# number: ROWS="0 4". Rows of the table that are not run stay as they are.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-3.11}
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
versions=(  # the framework, and what is installed beside it
    "torch==2.6.0"
    "torch==2.10.0"
    "torch==2.14.1"
    "mindspore==2.9.0 torch==2.13.0"
    "mindspore==2.10.0 torch==2.13.0"
)
core=(
    tests/core tests/storage tests/conformance tests/npu tests/models tests/inference
    tests/training/test_{step,precision,loop,vl_run,lora_run,dpo_run}.py
)

run_row() {  # framework, what is installed beside it
    local framework=$1 beside=${2:-} only=() summary
    local venv="$folder/${framework//==/-}-$python"
    echo "$framework on Python $python ..." >&2
    if [ ! -e "$venv/installed" ]; then
        "python$python" -m venv "$venv"
        "$venv/bin/python" -m pip install -q -e "$root[parquet]" "$framework" ${beside:+"$beside"} \
            numpy==1.26.4 transformers==4.57.6 peft accelerate pytest hypothesis
        touch "$venv/installed"
    fi
    if [ -n "$beside" ]; then only=(-k "not torch_npu"); fi
    summary=$(cd "$root" && PYTHONPATH=$root OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -v -p no:cacheprovider \
        "${only[@]}" "${core[@]}" | tee "$venv/log" | tail -1 || true)
    echo "${framework//==/ }|$python|$(date +%Y-%m-%d)|$summary" | tee "$venv/result" >&2
    results+=("$venv/result")
}

results=()
for number in ${ROWS:-${!versions[@]}}; do
    # shellcheck disable=SC2086  # the words of a row are its columns
    run_row ${versions[$number]}
done

"python$python" - "$root/docs/backends.md" "${results[@]}" <<'PYTHON'
import re
import sys

document, *results = sys.argv[1:]
begin, end = "<!-- versions: written by scripts/version_matrix.sh -->\n", "\n<!-- end of versions -->"
text = open(document, encoding="utf-8").read()
before, _, rest = text.partition(begin)
table, _, after = rest.partition(end)
rows = {tuple(line.split(" | ")[:2]): line for line in table.splitlines()[2:]}
for result in results:
    framework, python, day, summary = open(result, encoding="utf-8").read().rstrip("\n").split("|")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    key = (f"| {framework}", python)
    rows[key] = " | ".join([*key, str(counts.get("passed", 0)), str(failed), str(counts.get("skipped", 0)), f"{day} |"])
head = ["| framework | Python | passed | failed | skipped | run on |", "|---|---|---|---|---|---|"]
number = lambda words: ([int(part) for part in re.findall(r"\d+", words)], words)
ordered = sorted(rows, key=lambda key: (key[0].split()[1] != "torch", number(key[0]), number(key[1])))
written = "\n".join([*head, *(rows[key] for key in ordered)])
open(document, "w", encoding="utf-8").write(before + begin + written + end + after)
print(written)
PYTHON
! grep -qE "[0-9]+ (failed|error)|no tests ran" "${results[@]}"
