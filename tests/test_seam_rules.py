"""Rules that keep the frameworks below the seam, read from the source: nothing is imported here but the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from duetvl.core import autograd, checkpoint_io, collectives, device, kv_cache, ops, optimizer

PACKAGE = Path(__file__).parents[1] / "duetvl"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"torch", "torch_npu", "mindspore", "torchvision", "jax", "tensorflow"}

# Which packages of ours each may import, itself apart. Every arrow points down (docs/architecture.md).
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "storage": {"core"},
    "backends": {"core"},
    "models": {"core", "storage"},
    "parallel": {"core", "models"},
    "cost_model": {"core", "models", "parallel"},
    "convert": {"core", "storage", "models"},
    "data": {"core", "storage"},
    "training": {"core", "storage", "models", "parallel", "cost_model", "convert", "data"},
    "planning": {"core", "storage", "models", "parallel", "cost_model", "convert", "training"},
    "launch": {"core", "training", "cli"},
    "migrate": {"core", "storage", "models", "data", "training", "inference"},
    "inference": {"core", "storage", "models", "parallel", "data"},
    "serving": {"core", "storage", "models", "data", "inference"},
    "evaluation": {"core", "storage", "models", "data", "inference"},
}
CORE_MAY_IMPORT = {"numpy", "pydantic", "duetvl"}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively; the rules read full names"
            yield node.lineno, node.module or ""
            if node.module == "duetvl":
                yield from ((node.lineno, f"duetvl.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) == "import_module":
            yield from ((node.lineno, str(given.value)) for given in node.args if isinstance(given, ast.Constant))


# -- who imports what ------------------------------------------------------------------------------------------------


def test_frameworks_are_imported_by_their_backends_alone() -> None:
    own = {"torch_npu": {"torch", "torch_npu"}, "mindspore": {"mindspore"}}
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        allowed = own.get(parts[1], set()) if parts[0] == "backends" else set()
        refused = FRAMEWORKS - allowed
        found = [f"{name_of(path)}:{line} {module}" for line, module in imports(path) if top(module) in refused]
        assert not found, found


def top(module: str) -> str:
    return module.partition(".")[0]


def test_core_imports_numpy_pydantic_and_the_standard_library() -> None:
    allowed = CORE_MAY_IMPORT | set(sys.stdlib_module_names)
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == "core":
            found = [f"{name_of(path)}:{line} {module}" for line, module in imports(path) if top(module) not in allowed]
            assert not found, found


def test_our_packages_import_downwards() -> None:
    for path in FILES:
        package = path.relative_to(PACKAGE).parts[0]
        if package in LAYERS:
            below = LAYERS[package] | {package, "version"}
            found = [
                f"{name_of(path)}:{line} {module}"
                for line, module in imports(path)
                if module.startswith("duetvl.") and module.split(".")[1] not in below
            ]
            assert not found, found


def test_a_backend_does_not_import_the_other() -> None:
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        if parts[0] == "backends" and len(parts) == 3:
            other = {"torch_npu": "mindspore", "mindspore": "torch_npu"}[parts[1]]
            assert not [m for _, m in imports(path) if m.startswith(f"duetvl.backends.{other}")], name_of(path)


# -- what code above the seam does with tensors ----------------------------------------------------------------------

# Files of models/ and parallel/ that compute with numpy, on the host.
ON_THE_HOST = {
    "adapters.py", "config.py", "flops.py", "host.py", "init.py", "loading.py", "lora.py", "memory.py", "merged.py",
    "names.py", "peft_files.py", "plan.py", "sharding.py", "tables.py", "weights.py",
}  # fmt: skip
TENSOR_FILES = [
    path for path in FILES
    if path.relative_to(PACKAGE).parts[0] in ("models", "parallel") and path.name not in ON_THE_HOST
]  # fmt: skip
# The seam itself, and modules that are no tensors.
NO_TENSORS = {
    "np", "math", "self", "config", "ops", "autograd", "collectives", "optimizer", "kv_cache", "device",
    "checkpoint_io",
}  # fmt: skip
METHODS = {
    "view", "reshape", "transpose", "permute", "expand", "squeeze", "unsqueeze", "flatten", "contiguous", "clone",
    "repeat", "chunk", "unbind", "sum", "mean", "max", "min", "argmax", "matmul", "mm", "bmm", "softmax", "exp", "log",
    "sqrt", "rsqrt", "abs", "square", "norm", "float", "half", "bfloat16", "int", "long", "bool", "to", "type", "item",
    "tolist", "numpy", "asnumpy", "cpu", "cuda", "npu", "size", "numel", "nelement", "detach", "backward",
    "register_hook", "masked_fill", "masked_scatter", "gather", "scatter", "index_select",
}  # fmt: skip
ATTRIBUTES = {"grad", "requires_grad", "T", "mT", "data", "device", "dtype", "is_cuda", "grad_fn"}


ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.MatMult)


def last_name(node: ast.expr) -> str:
    """`ops` of `self.ops`, `x` of `x`; empty for what has no name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def misuse(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that ask of a tensor what the seam does not promise."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield node.lineno, "@ (use ops.matmul: it fails on MindSpore in bfloat16)"
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ARITHMETIC) and not counts(node):
            yield node.lineno, "augmented assignment (on MindSpore it can silently do nothing: write x = x + y)"
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Subscript) and sliced(t) for t in node.targets):
            yield node.lineno, "assignment to a slice (use ops.scatter_rows, or ops.write_slice for a cache)"
        elif isinstance(node, ast.Attribute) and last_name(node.value) not in NO_TENSORS:
            in_place = node.attr.endswith("_") and not node.attr.startswith("_")
            if id(node) in called and (node.attr in METHODS or in_place):
                yield node.lineno, f".{node.attr}() (use ops.{node.attr.rstrip('_')})"
            elif id(node) not in called and node.attr in ATTRIBUTES:
                yield node.lineno, f".{node.attr} (a tensor has .shape and .ndim)"


def counts(node: ast.AugAssign) -> bool:
    """`n += 1`, `start += len(x)`, `rows += 2 * n` of a name: of numbers, as far as one can see."""
    plain = (ast.Constant, ast.Name, ast.BinOp, ast.operator)
    length = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") in ("len", "int")
    whole = isinstance(node.value, ast.Constant) and isinstance(node.value.value, (int, str))
    mixed = isinstance(node.value, ast.BinOp) and all(isinstance(n, (*plain, ast.Load)) for n in ast.walk(node.value))
    return isinstance(node.target, ast.Name) and (length or whole or mixed)


def sliced(target: ast.Subscript) -> bool:
    return any(isinstance(node, ast.Slice) for node in ast.walk(target.slice))


@pytest.mark.parametrize("path", TENSOR_FILES, ids=name_of)
def test_tensors_are_used_through_the_seam(path: Path) -> None:
    found = [f"{name_of(path)}:{line} {what}" for line, what in misuse(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    ["y = x @ w", "x += y", "x.loss += y", "x[2:3] = y", "y = x.view(3)", "y = f(x).float()", "y = x.add_(z)",
     "g = w.grad", "y = x.T", "n = loss.item()", "loss.backward()"],
)  # fmt: skip
def test_the_rule_sees(line: str) -> None:
    assert list(misuse(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["y = ops.matmul(x, w)", "n += 1", "start += len(x)", "y = self.ops.reshape(x, (-1,))", "n = np.prod(s).tolist",
     "y = x[2:3] + x.shape[0]", "table[name] = x", "k = be.ops.sum(x)"],
)  # fmt: skip
def test_the_rule_lets_pass(line: str) -> None:
    assert not list(misuse(ast.parse(line)))


PROTOCOLS = {
    "ops": ops.Ops, "autograd": autograd.Autograd, "collectives": collectives.Collectives, "kv_cache": kv_cache.KVCache,
    "optimizer": optimizer.Optimizer, "checkpoint_io": checkpoint_io.CheckpointIO, "device": device.Device,
}  # fmt: skip


def test_nothing_above_the_seam_asks_for_what_the_protocols_lack() -> None:
    """`be.ops.x`, `backend.autograd.x` and so on, where the part is one of a backend or the variable `ops`."""
    found = []
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] in ("backends", "core"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            part = part_of_a_backend(node.value) if isinstance(node, ast.Attribute) else ""
            if part and not hasattr(PROTOCOLS[part], node.attr) and node.attr not in PROTOCOLS[part].__annotations__:
                found.append(f"{name_of(path)}:{node.lineno} {part}.{node.attr}")
    assert not found, "\n".join(found)


def part_of_a_backend(node: ast.expr) -> str:
    if isinstance(node, ast.Name) and node.id == "ops":
        return "ops"
    holder = last_name(node.value) if isinstance(node, ast.Attribute) else ""
    name = last_name(node)
    return name if name in PROTOCOLS and holder in ("be", "backend", "_backend") else ""


# -- what importing costs --------------------------------------------------------------------------------------------

HEAVY = ("torch", "torch_npu", "mindspore", "transformers", "matplotlib", "tensorboardX", "scipy", "pandas")


@pytest.mark.parametrize("module", ["duetvl", "duetvl.api", "duetvl.cli", "duetvl.core.backend"])
def test_import_loads_no_framework(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    program = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    assert len(loaded) < (20 if module == "duetvl" else 650), len(loaded)
