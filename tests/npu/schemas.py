"""Schemas of the operators that duetvl calls, as wheels of torch_npu register them.

The files in schema_texts are lines of `strings -n 20 torch_npu/lib/libtorch_npu.so` of each wheel (cp311, x86_64).
scripts/npu_schema_check.sh compares those of TORCH_NPU with what the imported package registers.
"""

from __future__ import annotations

from pathlib import Path

TORCH_NPU = "2.13.0"
OLDER = ("2.6.0", "2.9.0")


def schemas_of(version: str) -> dict[str, str]:
    """Operator -> schema."""
    lines = (Path(__file__).parent / "schema_texts" / f"{version}.txt").read_text().splitlines()
    return {line.partition("(")[0]: line for line in lines}


SCHEMAS = schemas_of(TORCH_NPU)
