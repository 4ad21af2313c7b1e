#!/usr/bin/env bash
# Creates .venv in the project's root with both frameworks and all tools, or brings it up to date; says where it is.
# Other scripts source it. Choose the interpreter with PYTHON=/path/to/python3.11.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

supported() {  # MindSpore 2.10 has wheels for Python 3.10 to 3.12
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3 python}; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10, 3.11 or 3.12 with venv was found (MindSpore has no wheels for others)." >&2
  echo "       Debian, Ubuntu: apt-get install python3.11 python3.11-venv; or: uv python install 3.11, pyenv install 3.11" >&2
  echo "       Then run this again, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
  return 1
}

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" | cksum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
  python=$(find_python)
  [ -x "$venv/bin/python" ] && supported "$venv/bin/python" || "$python" -m venv --clear "$venv"
  echo "Installing into $venv ($("$venv/bin/python" --version)); MindSpore alone is 800 MB to download ..." >&2
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root[torch,mindspore,parquet,guided,serve,eval,wandb,swanlab,dev]"
  printf '%s' "$wanted" > "$venv/.installed"
fi
export PATH="$venv/bin:$PATH"
