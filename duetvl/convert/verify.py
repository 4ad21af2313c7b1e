"""Two checkpoints compared tensor by tensor, whatever their layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duetvl.convert.layouts import Layout, Model
from duetvl.convert.mindspeed import MindSpeedDirectory, infer_model, is_mindspeed, open_mindspeed
from duetvl.convert.names import VisionOrder
from duetvl.convert.sources import Source, open_source
from duetvl.convert.streaming import FragmentedTensors, row_chunks
from duetvl.core.boxes import Box
from duetvl.models.qwen_vl.config import load_config


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ."""

    name: str
    text: str


def verify(
    a: Path, b: Path, *, orders: tuple[VisionOrder, VisionOrder], hf_dir: Path | None = None
) -> Iterator[Difference | str]:
    """Compare two checkpoints of any layouts; the names of equal tensors, and what differs, one by one."""
    first, second = _open_both(a, b, orders, hf_dir)
    for path, tensors in ((a, first), (b, second)):
        yield from _differing_copies(path, tensors)
    for name in sorted(set(first.specs) | set(second.specs)):
        if name not in first.specs or name not in second.specs:
            yield Difference(name, f"absent in {a if name not in first.specs else b}")
            continue
        text = _difference(name, first, second)
        yield Difference(name, text) if text else name


def _open_both(
    a: Path, b: Path, orders: tuple[VisionOrder, VisionOrder], hf_dir: Path | None
) -> tuple[FragmentedTensors, FragmentedTensors]:
    opened = [open_mindspeed(path) if is_mindspeed(path) else open_source(path) for path in (a, b)]
    layouts = [
        _with_order(each.layout, order)
        for each, order in zip(opened, orders, strict=True)
        if isinstance(each, MindSpeedDirectory)
    ]
    models = [Model.of(load_config(hf_dir))] if hf_dir else []
    models += [each.model for each in opened if isinstance(each, Source)]
    if not models:
        exact = len({(each.canonical, each.vision_qkv) for each in layouts}) > 1
        assert isinstance(opened[0], MindSpeedDirectory)  # as neither is a Source
        models = [infer_model(opened[0], layouts[0], layouts[1:], exact=exact)]
    found = []
    for each in opened:
        if isinstance(each, Source):
            found.append(each.tensors)
        else:
            seen = models[0] if each.has("text_decoder.") else models[0].only("visual.")
            found.append(each.logical(seen, layouts[0 if each is opened[0] else -1]))
    return found[0], found[1]


def _with_order(layout: Layout, order: VisionOrder) -> Layout:
    return Layout(layout.text, layout.vision, layout.tp, layout.vision_tp, layout.canonical, order, True)


def _differing_copies(path: Path, tensors: FragmentedTensors) -> Iterator[Difference]:
    """What every rank should have alike, such as norms and a tied head."""
    for name, copy in tensors.copies:
        equal = True
        for box in row_chunks(tensors.specs[name], copy.box):
            equal = equal and np.array_equal(copy.view(box), tensors.read(name, box))
            copy.store.release(copy.key)
            tensors.release(name)
        if not equal:
            yield Difference(name, f"differs between its copies in {path}: see {copy.key} in {copy.store.path}")


def _difference(name: str, first: FragmentedTensors, second: FragmentedTensors) -> str:
    a, b = first.specs[name], second.specs[name]
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    count, largest = 0, 0.0
    for box in row_chunks(a, Box.whole(a.shape)):
        x, y = first.read(name, box), second.read(name, box)
        if a.dtype != b.dtype or not np.array_equal(x, y):
            gaps = np.abs(_numbers(x, a.dtype) - _numbers(y, b.dtype))
            unlike = (x != y) if a.dtype == b.dtype else gaps != 0
            count += int(np.count_nonzero(unlike))
            largest = max(largest, float(np.max(gaps, initial=0.0, where=~np.isnan(gaps))))
        first.release(name)
        second.release(name)
    dtypes = f"dtype {a.dtype} and {b.dtype}; " if a.dtype != b.dtype else ""
    if not count:
        return f"{dtypes}the numbers are equal" if dtypes else ""
    return f"{dtypes}{count} of {Box.whole(a.shape).volume} numbers differ, by up to {largest:.3g}"


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)
