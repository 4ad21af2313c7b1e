#!/usr/bin/env bash
# Runs tests/npu through torch_npu's own operator schemas on a machine without an NPU (x86_64 Linux, gcc, Python 3.11).
#
#   scripts/npu_schema_check.sh [FOLDER]    FOLDER keeps the environment for the next run; a temporary one by default
#
# torch_npu links against CANN's libraries, so importing it needs stubs: one C file that defines every symbol that
# nothing else does. Its operators then exist with their true schemas, and tests/npu gives them CPU kernels.
# Where PYTHON names an interpreter with torch 2.13.0 and the tests' needs (.venv/bin/python after setup), only torch_npu
# is fetched, into FOLDER: installed, it would break a plain `import torch` where CANN is missing. Otherwise FOLDER gets
# an environment of its own, which PYTHON makes (default: python3.11); TORCH_INDEX names the index with the CPU build of
# torch (empty: pip's own settings). Status 3: torch_npu could not be fetched.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
version=2.13.0
python=${PYTHON:-python3.11}
site=$folder/site

if "$python" -c "import torch, pytest; assert torch.__version__.startswith('$version')" 2>/dev/null; then
    if [ ! -d "$site/torch_npu" ]; then
        "$python" -m pip install -q --no-deps --retries 1 --target "$site" torch_npu==$version || exit 3
    fi
else
    index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
    [ -x "$folder/venv/bin/python" ] || "$python" -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install -q ${index:+--extra-index-url "$index"} \
        torch==$version torch_npu==$version numpy==1.26.4 pytest "$root[eval]" || exit 3
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
fi
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')

stubs=$folder/stubs
mkdir -p "$stubs"
symbols() { nm -D "$@" 2>/dev/null | awk 'NF > 1 {print $(NF - 1), $NF}' | sed 's/@.*//'; }
needing=("$site"/torch_npu/_C*.so "$site"/torch_npu/lib/{libtorch_npu,libnpu_profiler,libtensorpipe}.so)
system=()
for name in libc.so.6 libm.so.6 libstdc++.so.6 libgcc_s.so.1 libpthread.so.0 libdl.so.2 librt.so.1 ld-linux-x86-64.so.2; do
    system+=("$(gcc -print-file-name=$name)")
done
comm -23 <(symbols "${needing[@]}" | awk '$1 == "U" && $2 !~ /^_?Py/ {print $2}' | sort -u) \
    <(symbols "${needing[@]}" "$torch"/lib/*.so "${system[@]}" | awk '$1 != "U" && $1 != "w" {print $2}' | sort -u) \
    >"$stubs/symbols"
awk '{print "int " $1 "() { return 0; }"}' "$stubs/symbols" >"$stubs/cann.c"
gcc -w -shared -fPIC -o "$stubs/libcann.so" "$stubs/cann.c"
for name in hccl ascendcl acl_op_compiler ge_runner graph acl_tdt_channel; do
    ln -sf libcann.so "$stubs/lib$name.so"
done
echo "stubs for $(wc -l <"$stubs/symbols") symbols of CANN in $stubs"

cd "$root"
LD_LIBRARY_PATH=$stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} DUETVL_REAL_TORCH_NPU=1 PYTHONPATH=$root:$site OMP_NUM_THREADS=1 \
    "$python" -m pytest -p no:cacheprovider --confcutdir=tests/npu tests/npu --ignore-glob="*test_ascend*"
