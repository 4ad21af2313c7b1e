"""Two checkpoints compared tensor by tensor, whatever their layouts."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duetvl.convert.inferred import infer_model
from duetvl.convert.layouts import Layout, Model
from duetvl.convert.mindspeed import MindSpeedDirectory, is_mindspeed, open_mindspeed
from duetvl.convert.names import VisionOrder
from duetvl.convert.sources import SourceModel, open_source
from duetvl.convert.streaming import FragmentedTensors, row_chunks
from duetvl.convert.vision_order import OLD_RELEASES, find_order
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError
from duetvl.core.half import widened
from duetvl.models.qwen_vl.config import load_config


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ."""

    name: str
    text: str


def verify(
    a: Path,
    b: Path,
    *,
    orders: tuple[VisionOrder | None, VisionOrder | None] = (None, None),
    hf_dir: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Difference | str]:
    """Compare two checkpoints of any layouts; the names of equal tensors, and what differs, one by one.

    `orders` of the fused qkv of each one's vision tower; None: the one that the other's weights, or those in `hf_dir`,
    show, else that of present releases.
    """
    first, second = _open_both(a, b, orders, hf_dir, say)
    for path, tensors in ((a, first), (b, second)):
        yield from differing_copies(path, tensors)
    for name in sorted(set(first.specs) | set(second.specs)):
        if name not in first.specs or name not in second.specs:
            yield Difference(name, f"absent in {a if name not in first.specs else b}")
            continue
        text = _difference(name, first, second)
        yield Difference(name, text) if text else name


def _open_both(
    a: Path,
    b: Path,
    orders: tuple[VisionOrder | None, VisionOrder | None],
    hf_dir: Path | None,
    say: Callable[[str], None],
) -> tuple[FragmentedTensors, FragmentedTensors]:
    opened = [open_mindspeed(path) if is_mindspeed(path) else open_source(path, say=say) for path in (a, b)]
    directories = [
        (each, order) for each, order in zip(opened, orders, strict=True) if not isinstance(each, SourceModel)
    ]
    layouts = [replace(each.layout, vision_qkv=order, replicate_kv=True) for each, order in directories]
    sources = [each for each in opened if isinstance(each, SourceModel)]
    if hf_dir:
        model = Model.of(load_config(hf_dir))
    elif sources:
        model = sources[0].model
    else:
        exact = len({(each.canonical, each.vision_order) for each in layouts}) > 1
        model = infer_model(directories[0][0], layouts[0], layouts[1:], exact=exact, writes=False)
    base = sources[0].tensors if sources else _base(hf_dir)
    readers = iter(
        [_logical(each, layout, model, base, say) for (each, _), layout in zip(directories, layouts, strict=True)]
    )
    first, second = (each.tensors if isinstance(each, SourceModel) else next(readers) for each in opened)
    return first, second


def _logical(
    directory: MindSpeedDirectory,
    layout: Layout,
    model: Model,
    base: FragmentedTensors | None,
    say: Callable[[str], None],
) -> FragmentedTensors:
    seen = model if directory.has("text_decoder.") else model.only("visual.")
    tensors = directory.logical(seen, layout)
    if base is None or layout.vision_qkv or layout.canonical:
        return tensors
    try:
        order = find_order(directory, layout, seen, base)
    except CheckpointError:
        return tensors  # compared as it is, and different
    if order == "hf":
        say(f"{directory.path}: its vision tower has the qkv order of {OLD_RELEASES}, and is compared so")
    return directory.logical(seen, replace(layout, vision_qkv=order))


def _base(hf_dir: Path | None) -> FragmentedTensors | None:
    """The weights in a model directory that may have none."""
    try:
        return open_source(hf_dir).tensors if hf_dir else None
    except CheckpointError:
        return None


def differing_copies(
    path: Path, tensors: FragmentedTensors, only: Container[str] | None = None
) -> Iterator[Difference]:
    """What every rank should have alike, such as norms and a tied head; of the names in `only`, if given."""
    for name, copy in tensors.copies:
        if only is not None and name not in only:
            continue
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
    return (widened(bits, dtype) if dtype == "bfloat16" else bits).astype(np.float64)
