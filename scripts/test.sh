#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/conformance -k attention
# --full: what takes minutes as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder  # all of them: two files at a time
exec python -m pytest "$@"
