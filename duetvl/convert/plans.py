"""A directory that is to be made: told before it is written, checked, and then there whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from duetvl.convert.layouts import Layout
from duetvl.convert.names import Tower
from duetvl.convert.streaming import CHUNK, LogicalTensors, Output, Progress, row_chunks, write_files
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.storage.files import staged_directory, write_text

_BASE_MEMORY: Final = 120 * 10**6  # Python, numpy, headers


@dataclass(frozen=True)
class Options:
    """How to go about it. `start(bytes)` gives what to tell of the progress; `say` takes lines."""

    overwrite: bool = False
    dry_run: bool = False
    workers: int = 2
    start: Callable[[int], Progress | None] = lambda _: None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class DirectoryPlan:
    """A directory to be made. `texts` and `copies` are small files of it; `private`: modes as MindSpeed-MM's."""

    target: Path
    outputs: Sequence[Output]
    source: LogicalTensors
    texts: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    private: bool = False
    layout: Layout | None = None

    @property
    def size(self) -> int:
        """Bytes of the files of tensors."""
        return sum(output.file.size for output in self.outputs)


def execute(plan: DirectoryPlan, inputs: Sequence[Path], options: Options) -> None:
    """Write the directory, or say what would be written. `inputs` are left alone whatever happens."""
    _check_apart(plan.target, inputs)
    if options.dry_run:
        for line in _describe(plan, options):
            options.say(line)
        return
    _check_space(plan)
    progress, started = options.start(plan.size), time.monotonic()
    try:
        with staged_directory(plan.target, overwrite=options.overwrite) as staging:
            write_files(staging, plan.outputs, plan.source, workers=options.workers, progress=progress)
            for name, path in plan.copies.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, staging / name)
            for name, text in plan.texts.items():
                write_text(staging / name, text)
            if plan.private:
                _set_modes(staging)
    except OSError as error:
        raise CheckpointError(f"{plan.target}: cannot be written: {error.strerror or error}") from None
    finally:
        getattr(progress, "close", lambda: None)()
    seconds = max(time.monotonic() - started, 1e-3)
    options.say(
        f"{plan.target}: {len(plan.outputs)} file(s), {show_bytes(plan.size)} in {seconds:.1f} s "
        f"({show_bytes(plan.size / seconds)}/s)"
    )


def _check_apart(target: Path, inputs: Sequence[Path]) -> None:
    """A source is never written to, not even with overwrite."""
    for path in inputs:
        a, b = target.resolve(), path.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ConfigError(f"{target}: is not apart from the source {path}; choose another directory")


def _existing(target: Path) -> Path:
    """The nearest directory above that is there."""
    return next(parent for parent in target.absolute().parents if parent.exists())


def _check_space(plan: DirectoryPlan) -> None:
    there = _existing(plan.target)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CheckpointError(f"{plan.target}: cannot be written: {there} is no directory that may be written to")
    free = shutil.disk_usage(there).free
    needed = plan.size + sum(path.stat().st_size for path in plan.copies.values())
    if needed > free:
        raise CheckpointError(f"{plan.target}: needs {show_bytes(needed)}, but {there} has {show_bytes(free)} free")


def _set_modes(staging: Path) -> None:
    for folder, _, names in os.walk(staging):
        os.chmod(folder, 0o750)
        for name in names:
            os.chmod(Path(folder) / name, 0o640)


def _describe(plan: DirectoryPlan, options: Options) -> Iterator[str]:
    refused = not options.overwrite and plan.target.is_dir() and any(plan.target.iterdir())
    yield f"{plan.target} would be {'refused, as it exists already' if refused else 'written'}; nothing is"
    if plan.layout is not None:
        yield from _describe_stages(plan.layout)
    for output in plan.outputs:
        yield f"  {output.path}: {show_bytes(output.file.size)}, {len(output.tensors)} tensor(s)"
    for name in (*plan.texts, *plan.copies):
        yield f"  {name}"
    free = shutil.disk_usage(_existing(plan.target)).free
    yield (
        f"{len(plan.outputs)} file(s) of tensors, {show_bytes(plan.size)}; free: {show_bytes(free)}; "
        f"memory: about {show_bytes(predicted_peak(plan, options.workers))} with {options.workers} worker(s)"
    )


def _describe_stages(layout: Layout) -> Iterator[str]:
    titles: Mapping[Tower, str] = {"vision": "vision", "text": "language"}
    firsts = dict.fromkeys(titles, 0)
    for stage in range(layout.pp * layout.vpp):
        parts = []
        for tower, title in titles.items():
            count = layout.stages(tower)[stage]
            span = f"{title} layers {firsts[tower]} to {firsts[tower] + count - 1}"
            parts.append(span if count else f"no {title} layers")
            firsts[tower] += count
        virtual = f", virtual stage {stage // layout.pp}" if layout.vpp > 1 else ""
        yield f"  pipeline rank {stage % layout.pp}{virtual}: {', '.join(parts)}"


def predicted_peak(plan: DirectoryPlan, workers: int) -> int:
    """Most memory that writing takes: for each worker a chunk, the pages it was cut from, and a copy of it."""
    widest = 0
    for output in plan.outputs:
        for pieces in output.tensors.values():
            for piece in pieces:
                spec = plan.source.specs[piece.name]
                box = next(row_chunks(spec, piece.box))
                size = spec.nbytes * box.volume // max(Box.whole(spec.shape).volume, 1)
                cut = spec.nbytes * box.shape[0] // spec.shape[0] if box.volume else 0
                widest = max(widest, 2 * size + 2 * cut)
    return _BASE_MEMORY + workers * max(widest, CHUNK)


def show_bytes(count: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
