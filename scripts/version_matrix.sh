#!/usr/bin/env bash
# Runs the core of the tests on the oldest, a middle and the newest version of each framework, and writes the table of
# docs/backends.md. Each version gets an environment of its own (2 to 7 GB): torch alone, and MindSpore with the torch
# that the references of the conformance suite are computed with.
#
#   scripts/version_matrix.sh [FOLDER]    FOLDER keeps the environments for the next run; a temporary one by default
#
# Needs Python 3.10, 3.11 and 3.12 on the PATH. ROWS chooses among the lines below by number: ROWS="1 5".
# Without ROWS the table is written anew, with it only the rows that were run are replaced.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
versions=(  # the framework, Python, and what is installed beside it
    "torch==2.6.0 3.10"
    "torch==2.10.0 3.11"
    "torch==2.14.1 3.12"
    "mindspore==2.9.0 3.10 torch==2.10.0"
    "mindspore==2.10.0 3.12 torch==2.13.0"
)
core=(
    tests/core tests/storage tests/conformance tests/npu tests/models tests/inference
    tests/training/test_{step,precision,loop,vl_run,lora_run,dpo_run}.py
)

python_of() {
    local found
    for found in $(type -ap "python$1" || true); do
        if "$found" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$found"
            return
        fi
    done
    echo "error: python$1 with venv is not on the PATH" >&2
    return 1
}

run_row() {  # number, framework, python, what is installed beside it
    local number=$1 framework=$2 version=$3 beside=${4:-} venv="$folder/${2//==/-}-$3" only=() last
    echo "$framework on Python $version ..." >&2
    [ -x "$venv/bin/python" ] || "$(python_of "$version")" -m venv "$venv"
    # torch reads transformers 5 as well, but what the references were written against is 4.57.
    "$venv/bin/python" -m pip install -q -e "$root[parquet]" "$framework" ${beside:+"$beside"} \
        "numpy==1.26.4" "transformers==4.57.6" peft accelerate pytest hypothesis
    if [ -n "$beside" ]; then only=(-k "not torch_npu"); fi
    last=$(cd "$root" && OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -v -p no:cacheprovider "${only[@]}" "${core[@]}" |
        tee "$venv/log" | tail -1 || true)
    echo "$number|${framework//==/ }|$version|$last" | tee -a "$folder/results" >&2
}

cd "$root"
if [ -z "${ROWS:-}" ]; then rm -f "$folder/results"; fi
for number in ${ROWS:-${!versions[@]}}; do
    # shellcheck disable=SC2086  # the words of a row are its columns
    run_row "$number" ${versions[$number]}
done

python3 - "$folder/results" docs/backends.md <<'PYTHON'
import re
import sys

results, document = sys.argv[1:]
rows = {}
for line in open(results, encoding="utf-8"):
    number, framework, python, summary = line.rstrip("\n").split("|")
    counts = {word: count for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)}
    failed = sum(int(counts.get(word, 0)) for word in ("failed", "error", "errors"))
    rows[int(number)] = f"| {framework} | {python} | {counts.get('passed', 0)} | {failed} | {counts.get('skipped', 0)} |"
head = ["| framework | Python | passed | failed | skipped |", "|---|---|---|---|---|"]
table = "\n".join([*head, *(rows[number] for number in sorted(rows))])
text = open(document, encoding="utf-8").read()
begin, end = "<!-- versions: written by scripts/version_matrix.sh -->\n", "\n<!-- end of versions -->"
before, _, rest = text.partition(begin)
after = rest.partition(end)[2]
open(document, "w", encoding="utf-8").write(before + begin + table + end + after)
print(table)
PYTHON
! grep -qE "[0-9]+ (failed|error)" "$folder/results"
