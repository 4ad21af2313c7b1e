"""Saving while a run goes on: in the background, on a full disk, when the program has to end."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bag_model
import numpy as np
import pytest
from bag_model import write_records
from numpy_backend import ALONE, numpy_backend, optimizer_state, parameters, save_snapshot

import duetvl
from duetvl.core.backend import load_backend
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.storage.checkpoint_format import Meta
from duetvl.storage.files import staged_directory
from duetvl.storage.finding import find_checkpoint, has_checkpoint, step_name
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.checkpoints import checkpoint as ck
from duetvl.training.checkpoints import writing
from duetvl.training.checkpoints.pieces import HostPiece
from duetvl.training.checkpoints.saving import SaveGivenUp, Saver
from duetvl.training.checkpoints.space import Space
from duetvl.training.recipe.sections import CheckpointSection
from duetvl.training.step import NonFiniteError
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import read_metrics


@pytest.fixture
def recipe(tmp_path):
    write_records(tmp_path / "train.jsonl", 30)
    return {
        "model": {"path": "-", "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "pack_tokens": 32},
        "train": {"steps": 12, "global_batch": 8, "output_dir": str(tmp_path / "run")},
        "optim": {"lr": 0.05},
        "checkpoint": {"every": 2, "keep_last": 3},
        "log": {"tensorboard": False, "plot": False},
    }


@pytest.fixture
def torch_be():
    return load_backend("torch_npu", "cpu")


def run(be, recipe, *overrides, **options):
    return train(recipe, overrides, backend=be, prepare=bag_model.prepare, **options)


def stored(run_dir: Path, step: int) -> dict[str, bytes]:
    ref = find_checkpoint(run_dir, step)
    files = [TensorFile(path) for path in sorted(ref.path.glob("*.safetensors"))]
    return {f"{file.path.name}:{name}": file.view(name).tobytes() for file in files for name in file.specs}


def leftovers(run_dir: Path) -> list[str]:
    return [str(path) for path in run_dir.rglob("*") if path.name.startswith(".")]


class At(Callback):
    """Something that happens after a step."""

    def __init__(self, **what):
        self.what = {int(name.removeprefix("step_")): action for name, action in what.items()}

    def on_step(self, run, row):
        if run.step in self.what:
            self.what[run.step]()


# -- in the background ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_background_writes_what_the_foreground_writes(be, recipe, tmp_path, dtype):
    """The weights change while they are written: each checkpoint is that of its own step."""
    for name, background in (("front", "false"), ("back", "true")):
        place = f"train.output_dir={tmp_path}/{name}"
        options = (place, "checkpoint.every=3", "checkpoint.keep_last=null", f"model.dtype={dtype}")
        run(be, recipe, *options, f"checkpoint.background={background}")
    for step in (3, 6, 9, 12):
        front, back = stored(tmp_path / "front", step), stored(tmp_path / "back", step)
        assert front.keys() == back.keys()
        if be.capabilities.bitwise_repeatable:
            assert front == back
    assert stored(tmp_path / "back", 3) != stored(tmp_path / "back", 6)


def test_a_snapshot_is_not_changed_by_what_comes_after(tmp_path):
    params = parameters(1)
    state = optimizer_state(params, 4)
    options = {"parameters": params.values(), "optimizer_state": state, "meta": Meta(), "backend": numpy_backend()}
    taken = ck.take_snapshot(step=4, copy=True, **options)
    for x in [p.tensor for p in params.values()] + [x for slot in state.slots().values() for x in slot.values()]:
        x += 1
    state.step.update(dict.fromkeys(state.step, 5))
    save_snapshot(tmp_path, taken)
    fresh = parameters(2)
    ref = find_checkpoint(tmp_path)
    ck.load_checkpoint(ref, parameters=fresh.values(), optimizer_state=None, backend=numpy_backend())
    for path, p in parameters(1).items():
        assert np.array_equal(fresh[path].tensor, p.tensor)
    assert set(ref.manifest.optimizer_steps.values()) == {4}


def test_one_save_is_under_way_at_most_and_all_are_told(tmp_path):
    said = []
    saver = Saver(
        tmp_path, ranks=ALONE, on_saved=lambda path, step: said.append(step), warn=said.append, background=True
    )
    params = parameters(1)

    def take(step):
        return lambda copy: ck.take_snapshot(
            step=step,
            parameters=params.values(),
            optimizer_state=None,
            meta=Meta(),
            backend=numpy_backend(),
            copy=copy,
        )

    with saver:
        for step in (1, 2, 3):
            saver.save(take(step))
            assert said == list(range(1, step))
        saver.save_last(take(4))
        assert said == [1, 2, 3, 4]
        saver.save(take(5))
    assert said == [1, 2, 3, 4, 5]


def test_a_program_that_ends_at_once_leaves_nothing_half_written(tmp_path):
    """The second piece is not fetched any more once the program is ending."""
    params = parameters(1)

    def take(copy):
        return ck.take_snapshot(
            step=7, parameters=params.values(), optimizer_state=None, meta=Meta(), backend=numpy_backend(), copy=copy
        )

    saver = Saver(tmp_path, ranks=ALONE, on_saved=lambda *_: None, warn=print, background=True)
    saver._given_up.set()
    with saver:
        saver.save(take)
        with pytest.raises(SaveGivenUp):
            saver.wait()
    assert leftovers(tmp_path) == []
    assert not has_checkpoint(tmp_path)


# -- no space ---------------------------------------------------------------------------------------------------------


class NoSpace(Callback):
    """After the steps `first` to `last - 1` no file may grow beyond `count` bytes: a write fails as on a full disk."""

    def __init__(self, first, last, count):
        self.first, self.last, self.count = first, last, count

    def on_step(self, run, row):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if run.step in (self.first, self.last):
            run.saver.wait()  # what is under way belongs to the steps before
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.count if run.step == self.first else hard, hard))

    def on_end(self, run, error):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # before pytest writes its report into a file


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_is_told_and_the_run_goes_on(torch_be, recipe, tmp_path, capsys, background):
    """Steps 4 and 6 are not saved; not even a row of metrics can be written then, and none is lost."""
    seen = []

    class Look(Callback):
        def on_step(self, run, row):
            if run.step == 7:
                seen.append(find_checkpoint(run.run_dir).step)

    calls = [NoSpace(3, 7, 100), Look()]
    result = run(torch_be, recipe, f"checkpoint.background={background}", callbacks=calls)
    out = capsys.readouterr().out
    for step in (4, 6):
        assert f"warning: {tmp_path}/run/checkpoints: the checkpoint of step {step} could not be written" in out
    assert out.count("metrics.jsonl cannot be written: File too large; its rows are kept for later") == 1
    assert seen == [2]
    assert result.step == 12
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "latest",
        "step-0000008",
        "step-0000010",
        "step-0000012",
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 13))
    assert leftovers(tmp_path / "run") == []


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(torch_be, recipe, tmp_path):
    with pytest.raises(CheckpointError, match="the checkpoint of step 12 could not be written"):
        run(torch_be, recipe, callbacks=[NoSpace(11, 99, 1000)])
    assert leftovers(tmp_path / "run") == []
    assert find_checkpoint(tmp_path / "run").step == 10


FULL_DISK = """
import sys
import bag_model
from duetvl.core.backend import load_backend
from duetvl.core.boxes import Box
from duetvl.training.train import train
recipe, run = sys.argv[1:]
train(recipe, [f"train.output_dir={run}"], backend=load_backend("torch_npu", "cpu"), prepare=bag_model.prepare)
"""


def on_a_disk_of(size, recipe, tmp_path):
    """Train on a small file system of our own; then its hidden files are listed, and its checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size={size} none {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, mounted], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "program.py").write_text(FULL_DISK)
    place = {
        "PYTHONPATH": os.pathsep.join(map(str, (Path(bag_model.__file__).parent, Path(duetvl.__file__).parents[1])))
    }
    command = f"{sys.executable} {tmp_path}/program.py {tmp_path}/recipe.json {disk}/run"
    look = f"find {disk}/run/ -name '.*'; ls {disk}/run/checkpoints"
    script = f"{mounted} && {{ {command}; echo status $?; {look}; }}"
    done = subprocess.run([*mount, script], env={**os.environ, **place}, capture_output=True, text=True)
    return done, disk


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_really_full(recipe, tmp_path, background):
    """A file system of 128 kB of our own, which a few checkpoints of some 20 kB fill."""
    values = recipe | {"checkpoint": {"every": 1, "keep_last": None, "background": background}}
    values["log"] = {"tensorboard": True, "plot": True}
    done, _ = on_a_disk_of("128k", values, tmp_path)
    assert "could not be written: No space left on device; earlier ones are untouched" in done.stdout, done.stderr
    told, _, after = done.stdout.partition("status 1\n")
    assert "step 12/12" in told  # it went on to its end, where the last checkpoint is an error
    assert "CheckpointError" in done.stderr
    kept = after.split()
    assert kept[0] == "latest"
    assert len(kept) > 2
    assert all(name.startswith("step-") for name in kept[1:])


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_with_room_for_two(recipe, tmp_path, background):
    """With `keep_last: 2` the older one goes before the third is written, rather than the work after the second."""
    values = recipe | {"checkpoint": {"every": 1, "keep_last": 2, "background": background}}
    done, _ = on_a_disk_of("72k", values, tmp_path)
    assert "could not be written" not in done.stdout + done.stderr
    assert done.stdout.split("status 0\n")[1].split() == ["latest", "step-0000011", "step-0000012"]


@pytest.mark.parametrize(("keep_last", "meanwhile"), [(None, (2, 4, 6)), (3, (2, 6)), (2, (2,)), (1, (2,))])
def test_the_latest_is_never_removed_to_make_room(tmp_path, monkeypatch, keep_last, meanwhile):
    """Here it is the oldest: the run has gone back to it."""
    monkeypatch.setattr(writing, "free_space", lambda _: 0)
    folder, seen = tmp_path / "checkpoints", []
    for moment, step in enumerate((2, 4, 6)):
        (folder / step_name(step)).mkdir(parents=True)
        (folder / step_name(step) / "manifest.json").touch()
        os.utime(folder / step_name(step) / "manifest.json", (moment, moment))
    (folder / "latest").write_text("step-0000002\n")

    def fetch():
        seen.extend(sorted(path.name for path in folder.glob("step-*")))
        return np.zeros(3, np.float32)

    piece = HostPiece("weights", "w", (3,), Box.whole((3,)), "float32", fetch)
    save_snapshot(tmp_path, writing.Snapshot(3, Meta(), {}, (piece,), {}, {"weights": {"w": (3,)}}), keep_last)
    assert seen == [step_name(step) for step in meanwhile]
    assert find_checkpoint(tmp_path).step == 3


def test_a_checkpoint_that_cannot_be_removed_yet_is_no_failed_save(torch_be, recipe, tmp_path, capsys, monkeypatch):
    """On NFS a file that is read, as by an export, leaves a `.nfs...` in its directory until it is closed."""
    unlink = os.unlink

    def busy(path, *, dir_fd=None):
        if dir_fd is not None:  # a file in a directory that is removed
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path)

    monkeypatch.setattr(os, "unlink", busy)
    assert run(torch_be, recipe, "checkpoint.keep_last=1").step == 12
    monkeypatch.undo()
    assert "could not be written" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-0000012"]
    assert len(leftovers(tmp_path / "run")) == 5
    assert run(torch_be, recipe, "train.steps=13").step == 13
    assert leftovers(tmp_path / "run") == []


def test_a_checkpoint_that_was_moved_behind_a_link_is_left_where_it_is(torch_be, recipe, tmp_path, capsys):
    run(torch_be, recipe, "train.steps=2")
    place = tmp_path / "run/checkpoints/step-0000002"
    shutil.move(place, tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert run(torch_be, recipe, "checkpoint.keep_last=1").step == 12
    assert "could not be written" not in capsys.readouterr().out
    assert find_checkpoint(tmp_path / "moved").step == 2
    assert not place.is_symlink()


# -- signals ----------------------------------------------------------------------------------------------------------


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_second_signal_ends_at_once_and_tidily(torch_be, recipe, tmp_path, background):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def both():
        signalled(signal.SIGTERM)()
        signalled(signal.SIGTERM)()

    with pytest.raises(SystemExit) as caught:
        run(torch_be, recipe, f"checkpoint.background={background}", callbacks=[At(step_5=both)])
    assert caught.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert leftovers(tmp_path / "run") == []
    assert find_checkpoint(tmp_path / "run").step in (2, 4)


def test_a_step_that_takes_too_long_is_given_up_and_made_again(be, recipe, tmp_path, capsys):
    """A signal comes in the middle of step 6; half the grace is over before its next micro-batch."""

    def prepare(given, backend):
        job = bag_model.prepare(given, backend)
        plain = job.model.forward

        def forward(batch, last, *, key=()):
            if key[1:] == (5, 0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.002)
            return plain(batch, last, key=key)

        job.model.forward = forward
        return job

    options = {"backend": be, "prepare": prepare}
    result = train(recipe, ["checkpoint.grace=0.002", "checkpoint.every=null"], **options)
    assert (result.step, result.stopped_by) == (5, signal.SIGTERM)
    assert "step 6 is abandoned to save in time; it will be repeated" in capsys.readouterr().out
    assert run(be, recipe, "checkpoint.every=null").step == 12
    run(be, recipe, f"train.output_dir={tmp_path}/whole")
    ends = [stored(place, 12) for place in (tmp_path / "run", tmp_path / "whole")]
    assert not be.capabilities.bitwise_repeatable or ends[0] == ends[1]


# -- callbacks --------------------------------------------------------------------------------------------------------


class Record(Callback):
    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append(("start", run.step))

    def on_step(self, run, row):
        self.events.append(("step", row["step"]))

    def on_eval(self, run, row):
        self.events.append(("eval", row["step"]))

    def on_save(self, run, path):
        self.events.append(("save", path.name))

    def on_end(self, run, error):
        self.events.append(("end", type(error).__name__))


def test_callbacks_hear_of_everything_in_order(torch_be, recipe, tmp_path):
    write_records(tmp_path / "val.jsonl", 5, seed=1)
    seen = Record()
    run(torch_be, recipe, "train.steps=3", f"data.val={tmp_path}/val.jsonl", "train.eval_every=2", callbacks=[seen])
    assert seen.events == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("save", "step-0000002"),
        ("step", 3),
        ("eval", 3),
        ("save", "step-0000003"),
        ("end", "NoneType"),
    ]


def test_a_callback_may_stop_a_run_which_then_ends_as_at_its_last_step(torch_be, recipe, tmp_path, capsys):
    class Enough(Callback):
        def on_step(self, run, row):
            run.log({"twice": 2 * row["loss"]})
            if run.step == 5:
                run.stop("good enough")

    result = run(torch_be, recipe, "checkpoint.export=true", callbacks=[Enough()])
    assert (result.step, result.stop_reason, result.stopped_by) == (5, "good enough", None)
    assert "stopped at step 5 of 12: good enough" in capsys.readouterr().out
    assert result.checkpoint.name == "step-0000005"
    assert (tmp_path / "run/export").is_dir()
    rows = read_metrics(tmp_path / "run")
    assert [row["twice"] for row in rows if "twice" in row] == [2 * row["loss"] for row in rows if "loss" in row]


def test_an_error_of_a_callback_ends_the_run_tidily(torch_be, recipe, tmp_path, capsys):
    class Broken(Callback):
        def on_step(self, run, row):
            if run.step == 5:
                raise RuntimeError("my own mistake")

    seen = Record()
    with pytest.raises(RuntimeError, match="my own mistake"):
        run(torch_be, recipe, "checkpoint.background=true", callbacks=[seen, Broken()])
    assert seen.events[-1] == ("end", "RuntimeError")
    assert [event for event in seen.events if event[0] == "save"][-2:] == [
        ("save", "step-0000004"),
        ("save", "step-0000005"),
    ]
    assert leftovers(tmp_path / "run") == []
    assert run(torch_be, recipe).step == 12
    assert "step-0000005 (step 5)" in capsys.readouterr().out


# -- every way out ----------------------------------------------------------------------------------------------------

NEVER = ("checkpoint.every=null", "checkpoint.minutes=null")


def raising(error):
    def raise_it():
        raise error

    return raise_it


@pytest.mark.parametrize("error", [RuntimeError("mine"), SystemExit(3), KeyboardInterrupt(), OSError("no network")])
def test_what_is_done_is_saved_however_a_run_ends(be, recipe, tmp_path, error):
    with pytest.raises(type(error)):
        run(be, recipe, *NEVER, callbacks=[At(step_5=raising(error))])
    assert find_checkpoint(tmp_path / "run").step == 5
    run(be, recipe, *NEVER)
    run(be, recipe, *NEVER, f"train.output_dir={tmp_path}/whole")
    ends = [stored(place, 12) for place in (tmp_path / "run", tmp_path / "whole")]
    assert not be.capabilities.bitwise_repeatable or ends[0] == ends[1]


def test_a_loss_that_is_not_finite_saves_the_steps_before_it(torch_be, recipe, tmp_path):
    def prepare(given, backend):
        job = bag_model.prepare(given, backend)
        plain = job.model.forward

        def forward(batch, last, *, key=()):
            (loss, *logged), tape = plain(batch, last, key=key)
            return (loss * float("nan") if key[1] == 5 else loss, *logged), tape

        job.model.forward = forward
        return job

    with pytest.raises(NonFiniteError, match="step 6: the loss is not finite"):
        train(recipe, NEVER, backend=torch_be, prepare=prepare)
    assert find_checkpoint(tmp_path / "run").step == 5


def test_weights_that_are_not_finite_are_not_saved(torch_be, recipe, tmp_path, capsys):
    """The newest checkpoint stays one that can be gone on from."""

    class Break(Callback):
        def on_step(self, run, row):
            if run.step == 5:
                run.model.parameters["norm.weight"].tensor.fill_(float("inf"))

    with pytest.raises(NonFiniteError):
        run(torch_be, recipe, callbacks=[Break()])
    assert "step 5 is not saved: its weights are not finite" in capsys.readouterr().out
    assert find_checkpoint(tmp_path / "run").step == 4


def test_half_an_update_is_not_saved(torch_be, recipe, tmp_path, capsys, monkeypatch):
    plain = torch_be.optimizer.step

    def step(state, groups, **options):
        plain(state, [replace(groups[0], parameters=groups[0].parameters[:1])], **options)
        if state.step["embed.weight"] == 6:
            raise MemoryError
        plain(state, [replace(groups[0], parameters=groups[0].parameters[1:]), *groups[1:]], **options)

    monkeypatch.setattr(torch_be.optimizer, "step", step)
    with pytest.raises(MemoryError):
        run(torch_be, recipe)
    assert "step 5 is not saved: " in capsys.readouterr().out
    assert find_checkpoint(tmp_path / "run").step == 4


def test_a_way_out_removes_no_older_checkpoint(torch_be, recipe, tmp_path):
    with pytest.raises(RuntimeError):
        run(torch_be, recipe, "checkpoint.keep_last=1", callbacks=[At(step_5=raising(RuntimeError()))])
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert names == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_other_signals_that_would_end_the_program_save_first(torch_be, recipe, number):
    before = signal.getsignal(number)
    result = run(torch_be, recipe, *NEVER, callbacks=[At(step_5=signalled(number))])
    assert (result.step, result.stopped_by, result.checkpoint.name) == (5, number, "step-0000005")
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so(torch_be, recipe):
    """As after nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(torch_be, recipe, callbacks=[At(step_5=signalled(signal.SIGHUP))]).step == 12
    finally:
        signal.signal(signal.SIGHUP, before)


class Broken(Callback):
    """Everything that comes after an error fails as well."""

    def on_save(self, run, path):
        if run.step >= 5:
            raise ValueError("on_save too")

    def on_end(self, run, error):
        raise ValueError("on_end too")


@pytest.mark.parametrize("background", ["false", "true"])
def test_no_second_error_hides_the_first(torch_be, recipe, tmp_path, capsys, background):
    seen = Record()
    calls = [Broken(), At(step_5=raising(RuntimeError("the first"))), seen]
    with pytest.raises(RuntimeError, match="the first"):
        run(torch_be, recipe, f"checkpoint.background={background}", "checkpoint.every=4", callbacks=calls)
    out = capsys.readouterr().out
    assert "could not be saved: ValueError: on_save too" in out or "background: ValueError: on_save too" in out
    assert "warning: on_end of Broken: ValueError: on_end too" in out
    assert seen.events[-1] == ("end", "RuntimeError")
    assert find_checkpoint(tmp_path / "run").step == 5


def test_an_error_of_on_end_is_one_where_there_is_no_other(torch_be, recipe, tmp_path):
    class Ends(Callback):
        def on_end(self, run, error):
            raise ValueError("on_end")

    with pytest.raises(ValueError, match="on_end"):
        run(torch_be, recipe, callbacks=[Ends()])
    assert find_checkpoint(tmp_path / "run").step == 12


def test_a_run_saves_now_and_then_without_being_asked(torch_be, recipe, tmp_path):
    assert (CheckpointSection().every, CheckpointSection().minutes) == (500, 30)
    run(torch_be, recipe, "checkpoint.every=null", "checkpoint.minutes=1e-9", "checkpoint.keep_last=null")
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 12


def test_a_callback_that_logs_the_trainers_own_names_is_refused_and_nothing_is_lost(torch_be, recipe, tmp_path):
    class Mine(Callback):
        def on_step(self, run, row):
            if run.step == 5:
                run.log({"loss": "low"})

    with pytest.raises(ConfigError, match="a callback logs 'loss', which the trainer itself writes"):
        run(torch_be, recipe, callbacks=[Mine()])
    assert find_checkpoint(tmp_path / "run").step == 5
    assert run(torch_be, recipe).loss == read_metrics(tmp_path / "run")[-1]["loss"]


# -- complete or not --------------------------------------------------------------------------------------------------


def exporting(what=lambda: None):
    def prepare(given, backend):
        job = bag_model.prepare(given, backend)

        def export(ref, target):
            what()
            with staged_directory(target, overwrite=True) as staging:
                (staging / "loss").write_text(f"{time.time_ns()}")
                kind = given.checkpoint.export == "mindspeed_mm"
                (staging / ("latest_checkpointed_iteration.txt" if kind else "config.json")).touch()

        return replace(job, export=export)

    return prepare


def test_a_signal_during_the_export_does_not_make_a_complete_run_a_stopped_one(torch_be, recipe, tmp_path):
    prepare = exporting(signalled(signal.SIGTERM))
    result = train(recipe, ["checkpoint.export=true"], backend=torch_be, prepare=prepare)
    assert (result.step, result.stopped_by) == (12, None)
    assert (tmp_path / "run/export/loss").exists()


@pytest.mark.parametrize(
    ("override", "stopped_by"), [("log.every=1", None), ("checkpoint.export=true", signal.SIGTERM)]
)
def test_a_signal_in_the_last_step(torch_be, recipe, tmp_path, override, stopped_by):
    """It stops what is left to do, if anything is; the next start does that."""
    calls = [At(step_12=signalled(signal.SIGTERM))]
    result = train(recipe, [override], backend=torch_be, prepare=exporting(), callbacks=calls)
    assert (result.step, result.stopped_by) == (12, stopped_by)
    assert not (tmp_path / "run/export").exists()
    assert train(recipe, [override], backend=torch_be, prepare=exporting()).stopped_by is None
    assert (tmp_path / "run/export").exists() == bool(stopped_by)


def test_an_export_is_that_of_the_last_checkpoint(torch_be, recipe, tmp_path):
    """A run is made longer and stopped before it exports again: the old export must not pass for the new one."""
    options = {"backend": torch_be, "prepare": exporting()}
    train(recipe, ["train.steps=6", "checkpoint.export=true"], **options)
    before = (tmp_path / "run/export/loss").read_text()
    calls = [At(step_12=signalled(signal.SIGTERM))]
    assert train(recipe, ["checkpoint.export=true"], **options, callbacks=calls).stopped_by == signal.SIGTERM
    assert (tmp_path / "run/export/loss").read_text() == before
    for override, again in (("checkpoint.export=true", True), ("checkpoint.export=true", False)):
        assert train(recipe, [override], **options).stopped_by is None
        after = (tmp_path / "run/export/loss").read_text()
        assert (after != before) == again
        before = after
    train(recipe, ["checkpoint.export=mindspeed_mm"], **options)
    assert (tmp_path / "run/export/loss").read_text() != before, "another kind is asked for"


# -- room -------------------------------------------------------------------------------------------------------------


def test_what_a_run_needs_of_the_disk():
    def needed(steps, there=0, **section):
        return Space(10, 3).needed(CheckpointSection(**section), steps, there)

    assert needed(400) == 10 + 3
    assert needed(1200) == 3 * 10 + 3  # two are kept while the third is written
    assert needed(5000) == 3 * 10 + 3
    assert needed(5000, keep_last=None) == 10 * 10 + 3
    assert needed(5000, there=2) == 10 + 3
    assert needed(5000, there=7) == 10 + 3
    assert needed(7, every=None) == 10 + 3


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path):
    section = CheckpointSection()
    assert Space(10).warning(tmp_path / "a/b", section, 100) is None
    free = shutil.disk_usage(tmp_path).free
    warned = Space(free // 2).warning(tmp_path, section, 2000)
    assert warned.startswith(f"warning: train.output_dir {tmp_path}: a checkpoint takes ")
    with pytest.raises(ConfigError, match=r"a checkpoint takes .* GB, its disk has .* GB free; make room"):
        Space(2 * free + 10**12).warning(tmp_path, section, 2000, refuse=True)


def test_a_run_does_not_begin_where_it_cannot_save(recipe, tmp_path):
    """A file system of 12 kB, and a checkpoint of some 20."""
    done, disk = on_a_disk_of("12k", recipe, tmp_path)
    assert f"ConfigError: train.output_dir {disk}/run: a checkpoint takes " in done.stderr
    assert "step 1/12" not in done.stdout
    assert "status 1" in done.stdout


def test_a_run_warns_where_not_all_has_room(recipe, tmp_path):
    done, disk = on_a_disk_of("64k", recipe | {"checkpoint": {"every": 1, "keep_last": 9}}, tmp_path)
    assert f"warning: train.output_dir {disk}/run: a checkpoint takes " in done.stdout, done.stderr
    assert "step 12/12" in done.stdout
