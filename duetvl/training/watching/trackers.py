"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, SwanLab.

The libraries of the latter two are optional. A run keeps one id with each of them, in `trackers.json` of its
directory, so that a resumed run goes on in the same curves.
"""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from duetvl.core.errors import CheckpointError, ConfigError, first_line
from duetvl.storage.files import read_object, write_text
from duetvl.training.recipe.sections import LogSection, Recipe

Row = Mapping[str, Any]
_LIBRARIES: Final = ("wandb", "swanlab")


class Tracker(Protocol):
    """A place for the numbers of a run. Its first error is a warning, and it is not called again; the run continues."""

    name: str

    def write(self, row: Row) -> None:
        """Numbers of one step: `step`, and finite numbers by name."""
        ...

    def write_texts(self, step: int, rows: Sequence[Row]) -> None:
        """Generated answers: texts `sample`, `prompt`, `answer`, `expected`."""
        ...

    def close(self) -> None:
        """Everything has been written."""
        ...


def check_trackers(log: LogSection) -> None:
    """Raise ConfigError where a library that the recipe asks for is not installed."""
    for name in _LIBRARIES:
        if getattr(log, name) is not None and find_spec(name) is None:
            raise ConfigError(
                f"log.{name}: {getattr(log, name)} needs the library {name}, which is not installed: "
                f"pip install 'duetvl[{name}]', or remove log.{name}"
            )


def open_trackers(recipe: Recipe, run_dir: Path, after: int) -> list[Tracker]:
    """The trackers that a recipe asks for, of a run that goes on after step `after`."""
    found: list[Tracker] = []
    if recipe.log.tensorboard:
        found.append(TensorBoard(run_dir / "tensorboard", after))
    if recipe.log.wandb is not None:
        found.append(_started("wandb", "WANDB_MODE", lambda id: WeightsAndBiases(recipe, run_dir, id), run_dir))
    if recipe.log.swanlab is not None:
        found.append(_started("swanlab", "SWANLAB_MODE", lambda id: SwanLab(recipe, run_dir, id), run_dir))
    return found


def _started(name: str, mode: str, start: Callable[[str], Tracker], run_dir: Path) -> Tracker:
    try:
        return start(run_id(run_dir, name))
    except Exception as error:  # whatever they raise without a login or a network
        raise ConfigError(
            f"log.{name}: {name} could not start a run: {first_line(error)}; log in with it, or set {mode}=offline"
        ) from error


def run_id(run_dir: Path, tracker: str) -> str:
    """The run's name with a tracker, made at its first start: 21 letters and digits, which all of them allow."""
    file = run_dir / "trackers.json"
    ids = read_object(file, CheckpointError) if file.exists() else {}
    if tracker not in ids:
        letters = string.ascii_lowercase + string.digits
        ids[tracker] = "".join(secrets.choice(letters) for _ in range(21))
        write_text(file, json.dumps(ids) + "\n")
    return ids[tracker]


def tag(key: str) -> str:
    """Name of a curve: those of evaluations apart from those of steps."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def in_words(row: Row) -> str:
    """A generated answer, for places that show one text."""
    return f"{row['answer']}\n\nexpected: {row['expected']}\n\nprompt: {row['prompt']}"


class TensorBoard:
    """Event files, through tensorboardX.

    Events are written by the calling thread: tensorboardX's own dies silently on a full disk, and then the run hangs
    on its queue. Each row is on disk at once.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, after: int = 0):
        """Values after step `after` that are there already are not shown."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._summary, self._event = summary, Event
        # The name that the library makes has whole seconds: two quick starts would write into one file.
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        if after:
            restart = Event(step=after + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
            self._writer.write_event(restart)
        self._writer.flush()

    def write(self, row: Row) -> None:
        """See Tracker."""
        values = {key: value for key, value in row.items() if key != "step"}
        self._add(row["step"], [self._summary.scalar(tag(key), value) for key, value in values.items()])

    def write_texts(self, step: int, rows: Sequence[Row]) -> None:
        """See Tracker."""
        self._add(step, [self._summary.text(f"answers/{row['sample']}", in_words(row)) for row in rows])

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()

    def _add(self, step: int, summaries: Sequence[Any]) -> None:
        for one in summaries:
            self._writer.write_event(self._event(step=step, summary=one, wall_time=time.time()))
        self._writer.flush()


class WeightsAndBiases:
    """A run on wandb.ai or, where WANDB_MODE says so, on disk."""

    name = "wandb"

    def __init__(self, recipe: Recipe, run_dir: Path, identity: str):
        """Start the run, or go on with it."""
        self._library = import_module("wandb")
        self._run = self._library.init(
            project=recipe.log.wandb,
            id=identity,
            resume="allow",
            name=run_dir.resolve().name,
            dir=str(run_dir.resolve()),
            config=recipe.model_dump(mode="json"),
        )
        # Its own counter only grows; a run that goes back to a checkpoint has to name its steps itself.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """See Tracker."""
        self._run.log({"step": row["step"], **{tag(key): value for key, value in row.items() if key != "step"}})

    def write_texts(self, step: int, rows: Sequence[Row]) -> None:
        """See Tracker."""
        columns = ["step", "sample", "prompt", "answer", "expected"]
        table = self._library.Table(columns=columns, data=[[step, *(row[key] for key in columns[1:])] for row in rows])
        self._run.log({"step": step, "answers": table})

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class SwanLab:
    """A run on swanlab.cn or, where SWANLAB_MODE says so, on disk."""

    name = "swanlab"

    def __init__(self, recipe: Recipe, run_dir: Path, identity: str):
        """Start the run, or go on with it."""
        self._library = import_module("swanlab")
        self._run = self._library.init(
            project=recipe.log.swanlab,
            id=identity,
            resume="allow",
            experiment_name=run_dir.resolve().name,
            logdir=str(run_dir.resolve() / "swanlog"),
            config=recipe.model_dump(mode="json"),
        )

    def write(self, row: Row) -> None:
        """See Tracker."""
        self._run.log({tag(key): value for key, value in row.items() if key != "step"}, step=row["step"])

    def write_texts(self, step: int, rows: Sequence[Row]) -> None:
        """See Tracker."""
        texts = [self._library.Text(in_words(row), caption=row["sample"]) for row in rows]
        self._run.log({"answers": texts}, step=step)

    def close(self) -> None:
        """See Tracker."""
        self._library.finish()


class Guarded:
    """A tracker whose errors do not end a run: the first is a warning, and it is not called again."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]):
        """`say` is called with what went wrong."""
        self.tracker, self._say = tracker, say
        self._alive = True

    def call(self, method: str, *args: Any) -> None:
        """Hand on a call while all is well."""
        if not self._alive:
            return
        try:
            getattr(self.tracker, method)(*args)
        except Exception as error:  # whatever a foreign library raises, a network or a disk
            self._alive = False
            self._say(f"warning: {self.tracker.name} gets no further data of this run: {type(error).__name__}: {error}")
