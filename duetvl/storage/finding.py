"""Finding a checkpoint of a run, and verifying it before anything of it is used.

Everything that reads a run comes through here: resuming, `duetvl export`, mm-convert. On many ranks rank 0
chooses, and all of them read the files that are to be verified, a share each (`found_by_all`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from duetvl.core.errors import CheckpointError
from duetvl.core.ranks import Ranks
from duetvl.storage.checkpoint_format import KINDS, MANIFEST, Manifest, Meta, StoredCheckpoint
from duetvl.storage.tensor_files import FileRecord, file_record

T = TypeVar("T")
Verify = Callable[[Path, Sequence[FileRecord]], list[str]]

STEP: Final = re.compile(r"step-(\d{7,})")
_REPLACED: Final = re.compile(r"\.(step-\d{7,})\.replaced")


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint whose files are as they were written, as far as they hold the kinds that were asked for.

    `rejected` says of each newer one that was passed over why: tell the user.
    """

    path: Path
    manifest: Manifest
    rejected: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps made when it was saved."""
        return self.manifest.step

    @property
    def meta(self) -> Meta:
        """What the run was, without reading a tensor."""
        return self.manifest.meta

    @property
    def weights_only(self) -> bool:
        """Whether it has no state of the optimizer."""
        return not self.manifest.tensors.get("exp_avg")

    @property
    def stored(self) -> StoredCheckpoint:
        """Its tensors, to be read."""
        return StoredCheckpoint(self.path, self.manifest)


def verify_files(path: Path, records: Sequence[FileRecord]) -> list[str]:
    """What is wrong with files of a directory: those that are not as they were recorded."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [problem for problem in pool.map(lambda record: _difference(path, record), records) if problem]


def find_checkpoint(
    run: str | Path,
    step: int | None = None,
    *,
    kinds: Collection[str] = KINDS,
    pass_over: bool = False,
    verify: Verify = verify_files,
) -> CheckpointRef:
    """The newest checkpoint of a run, or that of a chosen step; `run` may also be one checkpoint's own directory.

    The checksums of all files that hold tensors of `kinds` are verified; other files need not even be there. A damaged
    checkpoint is an error that names the one before it, unless `pass_over`: then the newest undamaged one is used, and
    `rejected` says what was passed over. A chosen step is never replaced by another. `verify` reads the files and says
    what is wrong with them. Raises CheckpointError.
    """
    run = Path(run)
    if is_checkpoint(run):
        ref = CheckpointRef(run, _verified(run, kinds, verify))
        if step not in (None, ref.step):
            raise CheckpointError(f"{run}: is the checkpoint of step {ref.step}, not of step {step}")
        return ref
    found = _candidates(run)
    if not found:
        raise CheckpointError(f"{checkpoints_dir(run)}: has no checkpoint; give the directory of a run that saved")
    if step is None:
        return _newest(run, found, kinds, pass_over, verify)
    if step not in found:
        steps = ", ".join(str(known) for known in sorted(found))
        raise CheckpointError(f"{checkpoints_dir(run)}: has no checkpoint of step {step}; there are {steps}")
    return CheckpointRef(found[step], _verified(found[step], kinds, verify))


def has_checkpoint(run: str | Path) -> bool:
    """Whether this is a run that has saved anything, damaged or not, or a checkpoint's own directory."""
    return is_checkpoint(Path(run)) or bool(_candidates(Path(run)))


def is_checkpoint(directory: Path) -> bool:
    """Whether this is one checkpoint's own directory. CheckpointError where it may not be looked into."""
    try:
        return (directory / MANIFEST).exists()
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror or error}") from None


def parse_run(text: str, own: Path | None = None) -> tuple[Path, int | None]:
    """A run and a step of it, from DIR, DIR@STEP or DIR@best; without DIR it is `own`.

    What exists is a DIR, also with an @. Raises CheckpointError, also where a run has not named its best checkpoint.
    """
    name, at, step = text.rpartition("@")
    if not at or Path(text).exists():
        name, step = text, ""
    elif step != "best" and not (step.isascii() and step.isdigit()):
        raise CheckpointError(f"{text}: after @ comes the number of a step, or best; found {step!r}")
    if not name and own is None:
        raise CheckpointError(f"{text!r}: names no run directory; give DIR or DIR@STEP")
    run = _run(Path(name)) if name or own is None else own
    return run, _best(run) if step == "best" else int(step) if step else None


def _best(run: Path) -> int:
    name = noted_name(checkpoints_dir(run), "best")
    if not (name and (match := STEP.fullmatch(name))):
        raise CheckpointError(
            f"{run}@best: no best checkpoint is recorded for this run; train with checkpoint.keep_best=eval_loss, "
            f"or give a step: {run}@STEP"
        )
    return int(match[1])


def _run(given: Path) -> Path:
    """A run's directory, also where its `checkpoints/` is given."""
    inner = given.name == checkpoints_dir("").name and not _candidates(given) and _candidates(given.parent)
    return given.parent if inner else given


def checkpoints_dir(run: str | Path) -> Path:
    """Where a run's checkpoints are."""
    return Path(run) / "checkpoints"


def saved_steps(run: str | Path) -> set[int]:
    """The steps that a run has checkpoints of, damaged or not. Raises CheckpointError where it may not be read."""
    return set(_candidates(Path(run)))


def noted_name(folder: Path, note: Literal["latest", "best"]) -> str | None:
    """What `latest` or `best` names among a run's checkpoints; None where it cannot be read."""
    try:
        return (folder / note).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def step_name(step: int) -> str:
    """Directory name of the checkpoint of a step."""
    return f"step-{step:07}"


def _newest(
    run: Path, found: dict[int, Path], kinds: Collection[str], pass_over: bool, verify: Verify
) -> CheckpointRef:
    rejected = list(_gone(run, found))
    for step, path in found.items():
        try:
            ref = CheckpointRef(path, _verified(path, kinds, verify), tuple(rejected))
        except CheckpointError as error:
            rejected.append(str(error))
            continue
        if rejected and not pass_over:
            raise CheckpointError(f"{'; '.join(rejected)}; give {run}@{step} for the undamaged one of step {step}")
        return ref
    raise CheckpointError("; ".join(rejected) + "; no other checkpoint can be used instead")


def _gone(run: Path, found: dict[int, Path]) -> Iterator[str]:
    latest = _latest(checkpoints_dir(run))
    if latest is not None and latest not in found:
        yield f"{checkpoints_dir(run) / step_name(latest)}: the newest checkpoint, is not there any more"


def _candidates(run: Path) -> dict[int, Path]:
    """Step -> directory, best first: the latest, those before it backwards, then any after it backwards.

    Steps after the latest are of a branch that the run has gone back from, or killed just before `latest` was moved.
    Raises CheckpointError where the directory may not be read.
    """
    folder = checkpoints_dir(run)
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{run}: cannot be read: {error.strerror or error}") from None
    found = {match[1]: path for path in entries if (match := _REPLACED.fullmatch(path.name))}
    found |= {path.name: path for path in entries if STEP.fullmatch(path.name)}
    latest = _latest(folder)
    steps = {int(name.removeprefix("step-")): path for name, path in found.items()}
    return dict(sorted(steps.items(), key=lambda item: (latest is not None and item[0] > latest, -item[0])))


def _latest(folder: Path) -> int | None:
    name = noted_name(folder, "latest")
    return int(match[1]) if name and (match := STEP.fullmatch(name)) else None


def _verified(path: Path, kinds: Collection[str], verify: Verify) -> Manifest:
    """The manifest, once every file with tensors of these kinds is as it says."""
    try:
        manifest = Manifest.from_text((path / MANIFEST).read_text(encoding="utf-8"))
        problems = verify(path, manifest.files_of(kinds))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: is damaged or unknown: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is damaged: {MANIFEST} cannot be read: {error}") from None
    if problems:
        raise CheckpointError(f"{path}: is damaged: {'; '.join(problems)}")
    return manifest


def _difference(path: Path, record: FileRecord) -> str | None:
    try:
        size = (path / record.name).stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes instead of {record.size}"
        if file_record(path / record.name) != record:
            return f"{record.name} does not match its checksum"
    except OSError as error:
        return f"{record.name} cannot be read: {error.strerror or error}"
    return None


# -- on many ranks ----------------------------------------------------------------------------------------------------


class _Files(NamedTuple):
    """What rank 0 asks all ranks to verify."""

    path: Path
    records: Sequence[FileRecord]


def found_by_all(ranks: Ranks, find: Callable[[Verify], T]) -> T:
    """What `find` gives on rank 0, which alone runs it, or the DuetvlError that it raises: on all ranks.

    All ranks call this. Whenever `find` verifies files by the function that it is handed, every rank reads a share of
    them, and what one of them finds counts for all. On one process it is `find(verify_files)`.
    """
    if ranks.count == 1:
        return find(verify_files)

    def look() -> T:
        try:
            return find(partial(_asked, ranks))
        finally:
            ranks.agree(None)  # there is nothing more to verify

    while not ranks.writes and (files := ranks.agree(None)) is not None:
        _answered(ranks, files)
    return ranks.first(look)


def _asked(ranks: Ranks, path: Path, records: Sequence[FileRecord]) -> list[str]:
    return _answered(ranks, ranks.agree(_Files(path, records)))


def _answered(ranks: Ranks, files: _Files) -> list[str]:
    """The problems that all ranks together find, in the order of the ranks."""
    share = _dealt(files.records, ranks.count)[ranks.index]
    found = ranks.collectives.gather_objects(verify_files(files.path, share))
    return [problem if rank == 0 else f"{problem} (rank {rank})" for rank, part in enumerate(found) for problem in part]


def _dealt(records: Sequence[FileRecord], ranks: int) -> list[list[FileRecord]]:
    """The files of each rank: large ones first, each to the rank that has the fewest bytes so far."""
    shares: list[list[FileRecord]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for record in sorted(records, key=lambda record: (-record.size, record.name)):
        least = loads.index(min(loads))
        shares[least].append(record)
        loads[least] += record.size
    return shares
