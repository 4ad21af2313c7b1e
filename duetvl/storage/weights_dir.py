"""Weights of a model directory in the Hugging Face layout: read slice by slice, written in shards."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.boxes import Box, LocalPart, Shape
from duetvl.core.errors import CheckpointError
from duetvl.core.half import widened
from duetvl.storage.files import WEIGHT_FILES, read_object, write_text
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file

Tensor = Any
Rename = Callable[[str], "str | None"]

MAX_SHARD_BYTES: Final = 5 * 10**9
INDEX: Final = "model.safetensors.index.json"
_SHARD: Final = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLED: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS: Final = ("float64", "float32", "float16", "bfloat16")


class ModelWeights(Protocol):
    """The tensors of a model by canonical name, wherever they are: nothing is read before it is asked for."""

    @property
    def directory(self) -> Path:
        """Where they are, for messages."""
        ...

    @property
    def names(self) -> Collection[str]:
        """Those that are there."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape as stored."""
        ...

    def view(self, name: str, shape: Shape | None = None) -> np.ndarray:
        """The bits of a tensor in its own shape, or a folded one (see `same_numbers`)."""
        ...

    def read(self, name: str, box: Box, shape: Shape | None = None) -> np.ndarray:
        """The bits of a box of `view(name, shape)`, of which no more is read; in one piece or not."""
        ...

    def release(self, name: str) -> None:
        """Give back the memory of the tensor's mapped pages."""
        ...

    def place(self, name: str) -> tuple[str, int]:
        """Where it is, to read tensors in the order of the disk."""
        ...

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise CheckpointError unless exactly these tensors are there, in these shapes, as floating point."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a directory by canonical name, each with its file and its name there."""

    directory: Path
    places: Mapping[str, tuple[TensorFile, str]]

    @property
    def names(self) -> Collection[str]:
        """See ModelWeights."""
        return self.places.keys()

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape on disk."""
        file, stored = self.places[name]
        return file.specs[stored]

    def view(self, name: str, shape: Shape | None = None) -> np.ndarray:
        """A mapped array, without a copy, in the shape on disk or a folded one (see `same_numbers`)."""
        file, stored = self.places[name]
        return file.view(stored) if shape is None else file.view(stored).reshape(shape)

    def read(self, name: str, box: Box, shape: Shape | None = None) -> np.ndarray:
        """A box of `view`."""
        return cut(name, self.view(name, shape), box)

    def release(self, name: str) -> None:
        """Give back the memory of the tensor's mapped pages."""
        file, stored = self.places[name]
        file.release(stored)

    def place(self, name: str) -> tuple[str, int]:
        """See ModelWeights."""
        file, stored = self.places[name]
        return file.path.name, file.position(stored)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """See ModelWeights."""
        check_weights(self, shapes)


def check_weights(weights: ModelWeights, shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless exactly these tensors are stored, in these shapes, as floating point."""
    common = [name for name in shapes if name in weights.names]
    wrong = [name for name in common if not same_numbers(weights.spec(name).shape, shapes[name])]
    details = [f"{name} {list(weights.spec(name).shape)} instead of {list(shapes[name])}" for name in wrong]
    dtypes = [(name, weights.spec(name).dtype) for name in common]
    problems = [
        count_and_name("tensor(s) absent", [name for name in shapes if name not in weights.names]),
        count_and_name("not part of the model", [name for name in weights.names if name not in shapes]),
        count_and_name("of another shape", details),
        count_and_name("not floating point", [f"{name} {dtype}" for name, dtype in dtypes if dtype not in _FLOATS]),
    ]
    if any(problems):
        found = "; ".join(filter(None, problems))
        raise CheckpointError(
            f"{weights.directory}: the weights are not those of its config ({len(shapes)} tensors expected, "
            f"{len(weights.names)} found): {found}. Check that both come from the same model"
        )


def same_numbers(stored: Shape, wanted: Shape) -> bool:
    """Whether one shape is the other up to folded axes after the first.

    So a convolution kernel (out, channels, t, h, w) serves as a matrix (out, in), and the other way round.
    """
    return stored == wanted or (stored[:1] == wanted[:1] and math.prod(stored) == math.prod(wanted))


def count_and_name(what: str, names: Iterable[str], most: int = 3) -> str:
    """`"5 absent (a, b, c, ...)"`; empty without names."""
    names = list(names)
    return f"{len(names)} {what} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})" if names else ""


def open_weights(directory: str | Path, rename: Rename | None = None) -> StoredWeights:
    """Open the safetensors files of a model directory: a single one, or shards with or without their index.

    `rename` gives the canonical name of a stored one, or None for what is to be left out. Raises CheckpointError for
    a directory without weights, missing shards, damaged files, and an index that names what is not there.
    """
    directory = Path(directory)
    places: dict[str, tuple[TensorFile, str]] = {}
    for file in _weight_files(directory):
        for stored in file.specs:
            name = rename(stored) if rename else stored
            if name in places:
                other, twin = places[name]
                raise CheckpointError(
                    f"{directory}: {name} is stored twice: {twin!r} in {other.path.name}, {stored!r} in "
                    f"{file.path.name}; remove the files that do not belong to the model"
                )
            if name is not None:
                places[name] = file, stored
    return StoredWeights(directory, places)


def fingerprint(weights: ModelWeights) -> str:
    """8 hexadecimal digits that tell one model's weights from another's: names, shapes, and a few numbers of each.

    It costs no more than three pages of each tensor, and does not see a change anywhere else in them. The numbers are
    compared as float32, so a copy in a wider dtype is the same model.
    """
    total = 0
    for name in sorted(weights.names):
        spec = weights.spec(name)
        size = math.prod(spec.shape)
        total = zlib.crc32(f"{name} {list(spec.shape)}".encode(), total)
        for start in (0, size // 2, max(size - 16, 0)):
            numbers = np.require(_flat(weights, name, start, min(start + 16, size)), requirements="A")
            total = zlib.crc32(widened(numbers, spec.dtype).astype("<f4").tobytes(), total)
        weights.release(name)
    return f"{total:08x}"


def _flat(weights: ModelWeights, name: str, start: int, stop: int) -> np.ndarray:
    """The numbers [start, stop) of a tensor laid out in a row; no other rows of it are read."""
    shape = weights.spec(name).shape
    if not shape or start == stop:
        return weights.view(name).reshape(-1)[start:stop]
    row = math.prod(shape[1:])
    first, last = start // row, -(-stop // row)
    rows = weights.read(name, Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return rows.reshape(-1)[start - first * row : stop - first * row]


def load_parameters(
    shapes: Mapping[str, Shape],
    weights: ModelWeights,
    backend: Backend,
    dtype: str,
    *,
    part_of: Callable[[str, Shape], LocalPart] = lambda name, shape: LocalPart.all_of(shape),
    holds: Callable[[str], bool] = lambda name: True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Read parameters straight to the device, one after the other, in the order of `shapes`.

    `shapes` are those of the whole tensors. `holds` says which of them are read, and `part_of` which part of each; the
    rest takes no memory. At no time is more held than the result and one part. `progress` is called with the bytes of
    each part.
    CheckpointError when `weights` are not exactly these tensors, before any is read.
    """
    weights.check(shapes)
    loaded: dict[str, Tensor | None] = dict.fromkeys(filter(holds, shapes))
    for name in sorted(loaded, key=weights.place):
        spec, part = weights.spec(name), part_of(name, shapes[name])
        read = partial(weights.read, name, shape=shapes[name])
        loaded[name] = load_boxes(backend, read, spec.dtype, dtype, part, shapes[name])
        weights.release(name)
        if progress:
            progress(TensorSpec(spec.dtype, part.shape).nbytes)
    return loaded


def load_part(backend: Backend, view: np.ndarray, stored: str, dtype: str, part: LocalPart) -> Tensor:
    """A part of a mapped tensor, whose dtype is named `stored`, on the device in `dtype`; the rest is not read."""
    return load_boxes(backend, lambda box: view[box.slices], stored, dtype, part, view.shape)


def load_boxes(
    backend: Backend, read: Callable[[Box], np.ndarray], stored: str, dtype: str, part: LocalPart, shape: Shape
) -> Tensor:
    """`load_part` of a tensor of this shape whose boxes `read` gives."""
    if part.whole != shape or not all(box.inside(shape) for box in part.slices.boxes):
        raise ValueError(f"a tensor {shape} does not contain {part}")
    # Old files have headers of any length.
    aligned = (np.require(read(box), requirements="A") for box in part.slices.boxes)
    pieces = [backend.checkpoint_io.load(raw, stored, dtype) for raw in aligned]
    return backend.ops.concat(pieces, part.slices.axis)


def write_weights(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    backend: Backend,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a model's tensors, each in its own dtype; see `write_shards`."""
    specs = {name: TensorSpec(backend.ops.dtype_of(x), tuple(x.shape)) for name, x in tensors.items()}
    return write_shards(
        directory,
        specs,
        lambda name: backend.checkpoint_io.save(tensors[name])[0].reshape(specs[name].shape),
        max_shard_bytes=max_shard_bytes,
    )


def write_shards(
    directory: str | Path,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write `model.safetensors`, or shards with an index, and return the files of tensors.

    `fetch(name)` gives a tensor's bits when its turn comes: one at a time is held. A directory that has weights
    already is refused: write to the one that `duetvl.storage.files.staged_directory` gives, which also takes what the
    caller adds (config.json, tokenizer) and appears under its name only when all is there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if old := _matching(directory, WEIGHT_FILES):
        raise CheckpointError(f"{directory}: has weights already ({old[0].name}); choose another directory")
    shards = plan_shards(specs, max_shard_bytes)
    files = dict(zip(_shard_names(len(shards)), shards, strict=True))
    for file, names in files.items():
        # transformers refuses files that do not say in which framework's layout they are.
        write_tensor_file(directory / file, {name: specs[name] for name in names}, fetch, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    return [directory / file for file in files]


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut before a shard would grow beyond `max_bytes`; a larger tensor has one to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def cut(name: str, view: np.ndarray, box: Box) -> np.ndarray:
    """The box of a tensor's array. ValueError where it is not inside."""
    if not box.inside(view.shape):
        raise ValueError(f"{name} {view.shape} does not contain {box}")
    return view[box.slices]


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def _weight_files(directory: Path) -> list[TensorFile]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a local model directory")
    if (directory / "model.safetensors").exists():  # transformers, too, prefers it to an index
        return [TensorFile(directory / "model.safetensors")]
    if (directory / INDEX).exists():
        return _indexed_files(directory / INDEX)
    # An adapter of peft may lie beside the weights that it belongs to.
    found = [path for path in _matching(directory, ["*.safetensors"]) if not path.name.startswith("adapter_")]
    if not found:
        raise CheckpointError(_no_weights(directory))
    _check_shards(directory, found)
    return [TensorFile(path) for path in found]


def _no_weights(directory: Path) -> str:
    if pickled := _matching(directory, _PICKLED):
        return (
            f"{directory}: has weights only in a format of pickles ({pickled[0].name}), which duetvl does not open; "
            f"convert them once with transformers: `from_pretrained(...)`, then `save_pretrained(..., "
            f"safe_serialization=True)` (a MindSpeed-MM directory is converted by mm-convert)"
        )
    if (directory / "adapter_model.safetensors").exists():
        return f"{directory}: has an adapter only; give the directory of the model that it was trained on"
    return f"{directory}: has no weights; expected model.safetensors, or shards with {INDEX}"


def read_shard_index(index: Path) -> dict[str, Any]:
    """The content of a file `model.safetensors.index.json`: `weight_map`, from tensors to their files, and more."""
    content = read_object(index, CheckpointError, "an index of shards")
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(
            f"{index}: is not an index of shards: it has no weight_map from tensors to files; download it again"
        )
    return content


def _indexed_files(index: Path) -> list[TensorFile]:
    shards = {name: index.parent / file for name, file in read_shard_index(index)["weight_map"].items()}
    paths = sorted(set(shards.values()))
    if outside := [path.name for path in paths if path.parent != index.parent]:
        raise CheckpointError(f"{index}: names files outside its directory: {', '.join(outside[:3])}")
    if missing := [path.name for path in paths if not path.exists()]:
        raise CheckpointError(
            f"{index.parent}: {count_and_name(f'of {len(paths)} shards missing', missing)}; download the rest"
        )
    files = {path: TensorFile(path) for path in paths}
    if absent := [f"{name} in {path.name}" for name, path in shards.items() if name not in files[path].specs]:
        raise CheckpointError(
            f"{index}: {count_and_name('tensor(s) named that are not in their shard', absent)}; "
            f"index and shards are of different models or versions"
        )
    return list(files.values())


def _check_shards(directory: Path, paths: Iterable[Path]) -> None:
    """Shards without an index still say in their names how many there should be."""
    present = {path.name for path in paths}
    sets = {(m[1], m[3], len(m[2])) for name in present if (m := _SHARD.fullmatch(name))}
    expected = [
        f"{stem}-{number:0{width}}-of-{count}.safetensors"
        for stem, count, width in sets
        for number in range(1, int(count) + 1)
    ]
    if missing := [name for name in expected if name not in present]:
        raise CheckpointError(
            f"{directory}: {count_and_name(f'of {len(expected)} shards missing', missing)}; download the rest"
        )
