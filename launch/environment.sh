# Sourced by the launch scripts with the module of their framework and its name: finds the project's root and the
# interpreter, `root` and `python`, and refuses to start where the interpreter lacks the framework.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $1" >&2
    exit 2
}

if [ -n "${PYTHON:-}" ]; then
    python="$(command -v "$PYTHON")" || fail "PYTHON=$PYTHON: no such program"
elif [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
else
    python="$(command -v python3)" || fail "there is no python3 on the path; name one: PYTHON=/path/to/python3"
fi

"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1" ||
    fail "$2 is not installed in $python: $python -m pip install 'duetvl[$1]', or name another: PYTHON=/path/to/python3"

# launch BACKEND ARGUMENTS: `duetvl launch` with what the environment says, and `duetvl train` with the arguments.
launch() {
    local backend="$1" options=()
    shift
    [ -z "${NNODES:-}" ] || options+=(--nnodes "$NNODES")
    [ -z "${NODE_RANK:-}" ] || options+=(--node-rank "$NODE_RANK")
    [ -z "${MASTER:-}" ] || options+=(--master "$MASTER")
    [ -z "${RESTARTS:-}" ] || options+=(--restarts "$RESTARTS")
    [ -z "${LOG_DIR:-}" ] || options+=(--log-dir "$LOG_DIR")
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec "$python" -m duetvl launch --backend "$backend" --nproc "${NPROC:-1}" ${options[@]+"${options[@]}"} -- train "$@"
}
