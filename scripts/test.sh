#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/conformance -k attention
# --full: what takes minutes as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python -m pytest "$@"
