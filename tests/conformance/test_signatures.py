"""Every backend has every operation, with the same parameters: names, kinds, order and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import pytest
from frameworks import need

from duetvl.core.autograd import Autograd
from duetvl.core.backend import Backend
from duetvl.core.checkpoint_io import CheckpointIO
from duetvl.core.collectives import Collectives
from duetvl.core.device import Device
from duetvl.core.kv_cache import KVCache
from duetvl.core.ops import Ops
from duetvl.core.optimizer import Optimizer
from duetvl.core.unsupported import Gap

PROTOCOLS: dict[str, type] = {
    "ops": Ops, "autograd": Autograd, "collectives": Collectives, "kv_cache": KVCache, "optimizer": Optimizer,
    "checkpoint_io": CheckpointIO, "device": Device,
}  # fmt: skip


def operations(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


def shape_of(function: object) -> list[tuple[str, str, object]]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(p.name, p.kind.description, p.default) for p in parameters]


def missing_or_different(protocol: type, implementation: type) -> Iterator[str]:
    for name in operations(protocol):
        found, specified = getattr(implementation, name, None), getattr(protocol, name)
        if isinstance(found, Gap):
            continue
        # An implementation that inherits from the protocol has its empty methods, which would answer None.
        if found is None or found is specified:
            yield f"{implementation.__name__} lacks {name}{inspect.signature(specified)}"
        elif shape_of(found) != shape_of(specified):
            yield f"{implementation.__name__}.{name}{inspect.signature(found)}, not {inspect.signature(specified)}"


@pytest.mark.parametrize("part", PROTOCOLS)
def test_backend_has_every_operation_with_the_same_signature(be: Backend, part: str) -> None:
    problems = list(missing_or_different(PROTOCOLS[part], type(getattr(be, part))))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("part", PROTOCOLS)
def test_backend_has_every_attribute(be: Backend, part: str) -> None:
    for name in inspect.get_annotations(PROTOCOLS[part]):
        assert hasattr(getattr(be, part), name), f"{part}.{name}"


KERNELS = [
    ("torch_npu", "kernels_cuda", "CudaOps", Ops),
    ("torch_npu", "kernels_cuda", "CudaKVCache", KVCache),
    ("torch_npu", "kernels_npu", "NpuOps", Ops),
    ("torch_npu", "kernels_npu", "NpuKVCache", KVCache),
    ("torch_npu", "kernels_npu", "NpuOptimizer", Optimizer),
    ("mindspore", "kernels_ascend", "AscendOps", Ops),
    ("mindspore", "kernels_ascend", "AscendKVCache", KVCache),
]


@pytest.mark.parametrize(("backend", "module", "name", "protocol"), KERNELS)
def test_kernels_of_other_devices_have_the_same_signatures(
    backend: str, module: str, name: str, protocol: type
) -> None:
    need(backend)
    problems = list(missing_or_different(protocol, getattr(import_module(f"duetvl.backends.{backend}.{module}"), name)))
    assert not problems, "\n".join(problems)


def test_the_check_sees_a_difference() -> None:
    class Lacking(CheckpointIO):
        def save(self, y: object) -> None:  # type: ignore[override]
            """Another parameter name."""

    assert [problem.split("(")[0] for problem in missing_or_different(CheckpointIO, Lacking)] == [
        "Lacking lacks load", "Lacking.save",
    ]  # fmt: skip
