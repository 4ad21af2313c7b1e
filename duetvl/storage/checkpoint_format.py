"""The training checkpoint on disk: which tensors it has, in which boxes of which files.

    run_dir/checkpoints/latest                              the name of the newest checkpoint
    run_dir/checkpoints/step-0000100/manifest.json          all but the tensors
    run_dir/checkpoints/step-0000100/weights-00000-of-00001.safetensors
    ...                              exp_avg-, exp_avg_sq-, master-...

A tensor is stored as boxes that together make it up, whatever layout wrote them, under the name `PATH@OFFSET` such as
`model.norm.weight@0` or `visual.patch_embed.proj.weight@0,0,0,0,0`. Every writer has its own file of each kind. So the
format knows neither ranks nor frameworks, and any box can be put together from those stored.

The manifest names every tensor (dtype, shape, boxes), every file (size, crc32) and carries a checksum of itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import Box, fills
from duetvl.core.errors import CheckpointError
from duetvl.storage.files import json_value
from duetvl.storage.tensor_files import NUMPY_DTYPES, FileRecord, TensorFile, TensorSpec

FORMAT: Final = "duetvl training checkpoint"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
KINDS: Final = ("weights", "exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True)
class Meta:
    """What a run is, beside its tensors; JSON values only.

    random_state: seed and counters. data_position: wherever the data pipeline will go on. extra: free.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    data_position: Mapping[str, Any] = field(default_factory=dict)
    random_state: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredBox:
    """One box of a tensor and the file that it is in."""

    file: str
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor as it is spread over files."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    def complete(self) -> bool:
        """Whether the boxes make up the tensor, each number once."""
        return fills(self.shape, [stored.box for stored in self.boxes])


StoredTensors = Mapping[str, Mapping[str, StoredTensor]]  # kind -> path -> where


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json."""

    step: int
    meta: Meta
    optimizer_steps: Mapping[str, int]
    files: tuple[FileRecord, ...]
    tensors: StoredTensors
    written_by: Mapping[str, str]

    def files_of(self, kinds: Collection[str]) -> list[FileRecord]:
        """The files that hold tensors of these kinds."""
        stored = (tensor for kind in kinds for tensor in self.tensors.get(kind, {}).values())
        names = {part.file for tensor in stored for part in tensor.boxes}
        return [record for record in self.files if record.name in names]

    def to_text(self) -> str:
        """JSON with its own checksum as the last entry."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "written_by": dict(self.written_by),
            **vars(self.meta),
            "optimizer_steps": dict(self.optimizer_steps),
            **stored_to_json(self.files, self.tensors),
        }
        content = json.loads(json.dumps(content, default=_plain))  # what a reader will see: keys are strings
        entries = {**content, "checksum": _checksum(content)}.items()
        # A line for each entry: an indented text of the tensors of many writers would take seconds.
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries) + "\n}\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Raises CheckpointError, with the cause alone, for what is damaged or of a later version."""
        try:
            content = json_value(text)
            checksum = content.pop("checksum")
            if content["format"] != FORMAT:
                raise CheckpointError(f"its format is {content['format']!r}, not {FORMAT!r}")
            if content["version"] != VERSION:
                raise CheckpointError(
                    f"its format has version {content['version']}, this duetvl reads {VERSION}; "
                    f"use the duetvl that wrote it"
                )
            if checksum != _checksum(content):
                raise CheckpointError("its manifest.json does not match its own checksum")
            if odd := [name for name in content["files"] if Path(name).name != name]:
                raise CheckpointError(f"its manifest.json names a file outside of its directory: {odd[0]!r}")
            files, tensors = stored_from_json(content)
            if broken := [path for stored in tensors.values() for path, one in stored.items() if not one.complete()]:
                raise ValueError(f"the boxes of {broken[0]} do not make up a tensor")
            return cls(
                step=content["step"],
                meta=Meta(**{name: content[name] for name in vars(Meta())}),
                optimizer_steps=content["optimizer_steps"],
                files=files,
                tensors=tensors,
                written_by=content["written_by"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"its manifest.json cannot be read: {error!r}") from None


@dataclass(frozen=True)
class StoredCheckpoint:
    """The tensors of a checkpoint directory, read by boxes."""

    path: Path
    manifest: Manifest
    _files: dict[str, TensorFile] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, kind: str, path: str, box: Box | None = None) -> tuple[np.ndarray, str]:
        """The bits of a tensor or of a box of it, and their dtype's name.

        A mapped view where one stored box has all of it; put together in memory otherwise.
        """
        stored = self.manifest.tensors[kind][path]
        box = box or Box.whole(stored.shape)
        if not box.inside(stored.shape):
            raise ValueError(f"{path} {stored.shape} does not contain {box}")
        parts = [(part, shared) for part in stored.boxes if (shared := box.overlap(part.box))]
        if len(parts) == 1 and parts[0][1] == box:
            return self._view(path, stored, parts[0][0])[box.seen_from(parts[0][0].box).slices], stored.dtype
        whole = np.empty(box.shape, NUMPY_DTYPES[stored.dtype])
        for part, shared in parts:
            view = self._view(path, stored, part)
            whole[shared.seen_from(box).slices] = view[shared.seen_from(part.box).slices]
        return whole, stored.dtype

    def release(self, kind: str, path: str) -> None:
        """Give back the memory of the tensor's mapped pages."""
        for part in self.manifest.tensors[kind][path].boxes:
            if part.file in self._files:
                self._files[part.file].release(box_name(path, part.box))

    def _view(self, path: str, stored: StoredTensor, part: StoredBox) -> np.ndarray:
        file, name = self._file(part.file), box_name(path, part.box)
        spec = TensorSpec(stored.dtype, part.box.shape)
        if file.specs.get(name) != spec:
            raise CheckpointError(f"{file.path}: has {file.specs.get(name)} for {name}, the manifest says {spec}")
        return file.view(name)

    def _file(self, name: str) -> TensorFile:
        """Mapped when the first of its tensors is asked for."""
        if name not in self._files:
            self._files[name] = TensorFile(self.path / name)
        return self._files[name]


def box_name(path: str, box: Box) -> str:
    """Name of a box in its file."""
    return f"{path}@{','.join(map(str, box.offset))}"


def file_name(kind: str, rank: int, ranks: int) -> str:
    """Name of the file that one writer makes of one kind."""
    return f"{kind}-{rank:05}-of-{ranks:05}.safetensors"


def stored_to_json(files: Iterable[FileRecord], tensors: StoredTensors) -> dict[str, Any]:
    """Files and the tensors in them as JSON values."""
    return {
        "files": {record.name: {"size": record.size, "crc32": record.crc32} for record in files},
        "tensors": {
            kind: {path: _tensor_to_json(one) for path, one in stored.items()} for kind, stored in tensors.items()
        },
    }


def stored_from_json(
    content: Mapping[str, Any],
) -> tuple[tuple[FileRecord, ...], dict[str, dict[str, StoredTensor]]]:
    """What `stored_to_json` wrote; KeyError, TypeError or ValueError for anything else."""
    files = tuple(FileRecord(name, **record) for name, record in content["files"].items())
    tensors = {
        kind: {path: _tensor_from_json(one) for path, one in stored.items()}
        for kind, stored in content["tensors"].items()
    }
    return files, tensors


def _tensor_to_json(stored: StoredTensor) -> dict[str, Any]:
    boxes = [[part.file, list(part.box.offset), list(part.box.shape)] for part in stored.boxes]
    return {"dtype": stored.dtype, "shape": list(stored.shape), "boxes": boxes}


def _tensor_from_json(data: Mapping[str, Any]) -> StoredTensor:
    boxes = tuple(StoredBox(file, Box(tuple(offset), tuple(shape))) for file, offset, shape in data["boxes"])
    if data["dtype"] not in NUMPY_DTYPES:
        raise ValueError(f"dtype {data['dtype']!r} is none of {', '.join(NUMPY_DTYPES)}")
    return StoredTensor(data["dtype"], tuple(data["shape"]), boxes)


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a checkpoint keeps JSON values, not {type(value).__name__}: {value!r}")
