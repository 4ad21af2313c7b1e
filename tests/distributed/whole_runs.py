"""Runs of four ranks from recipe to checkpoint, as cases.py has them run: what one rank alone sees, all act on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duetvl.answers import SampleAnswers
from duetvl.core.backend import Backend
from duetvl.core.errors import DataError
from duetvl.core.ranks import Ranks
from duetvl.evaluating import TaskScores
from duetvl.evaluation.answers import read_answers
from duetvl.storage.checkpoint_format import Meta
from duetvl.storage.finding import find_checkpoint
from duetvl.training.agreement import same_data
from duetvl.training.checkpoints.saving import Saver
from duetvl.training.checkpoints.writing import Snapshot
from duetvl.training.memory import IMPORTED, RUNNING, Memory, memory_limits
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.room import memory_warning
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import read_metrics

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("training", "evaluation", "data"))
import miniatures  # after their directories are known
import tiny_run

Trains = Callable[..., Any]
HERE = "/proc/self/cwd"  # another directory for each rank, under one name


@contextmanager
def small_runs(be: Backend) -> Iterator[tuple[Path, Trains]]:
    """A directory that all ranks know, each of which works in one of its own, and a function that trains in it."""
    ranks, before = Ranks(be.collectives), os.getcwd()
    place = Path(ranks.first(lambda: tempfile.mkdtemp()))
    ranks.first(lambda: str(tiny_run.write_recipe(place)))
    own = place / f"of-rank-{ranks.index}"
    own.mkdir()
    os.chdir(own)

    def trains(name: str, *overrides: str, callbacks: Sequence[Callback] = ()) -> Any:
        lines = (f"train.output_dir={place / name}", "log.every=1000", "train.steps=3", *overrides)
        return train(place / "tiny.json", lines, backend=be, callbacks=callbacks)

    try:
        yield place, trains
        ranks.each(None)
    finally:
        os.chdir(before)
        if ranks.writes:
            shutil.rmtree(place)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


# -- data -------------------------------------------------------------------------------------------------------------


def check_other_data(be: Backend) -> None:
    """Files of one name that are not the same on one rank: another size, fewer records, nothing at all."""
    ranks = Ranks(be.collectives)
    with small_runs(be) as (place, _):
        data = make_recipe({"model": {"path": "-"}, "data": {"train": f"{HERE}/data.jsonl"}}).data
        text = (place / "data.jsonl").read_text()
        more = text + text.splitlines()[0] + "\n"
        joined = " ".join(text.rsplit("\n", 2)[:2]) + "\n"  # two lines are one: of one size
        others = ((more, r" and 13 records, where"), (joined, r" and 11 records, where"))
        for other, words in others:
            Path("data.jsonl").write_text(other if ranks.index == 2 else text)
            with pytest.raises(
                DataError, match=rf"^rank 2 \(.*\) has found .*{words} rank 0 \(.*and 12 records"
            ) as found:
                same_data(ranks, data)
            assert found.value.agreed
        if ranks.index == 3:
            Path("data.jsonl").unlink()
        with pytest.raises(DataError, match=r"^rank 3 \(.*\): /proc/self/cwd/data.jsonl: no such file") as found:
            same_data(ranks, data)
        assert found.value.agreed


def check_bad_record_of_one_rank(be: Backend) -> None:
    """Pictures that rank 1 alone cannot read: left out by all, or the end of the run for all, which is saved."""
    ranks = Ranks(be.collectives)
    with small_runs(be) as (place, trains):
        if ranks.index != 1:
            for picture in place.glob("*.png"):
                shutil.copy(picture, picture.name)
        over = (f"data.image_root={HERE}", "data.shuffle=false", "parallel.dp=4", "train.steps=4")
        result = trains("skip", *over, "data.on_bad_sample=skip", "data.val=null")
        assert ranks.each(result.step) == [4] * 4
        bad = [row.get("data_bad", 0) for row in read_metrics(place / "skip") if "loss" in row]
        assert 0 < sum(bad) < 4 * 4, bad

        # The first step has but texts, so that it is made.
        records = (place / "data.jsonl").read_text().splitlines(keepends=True)
        ordered = sorted(records, key=lambda line: bool(json.loads(line)["images"]))
        ranks.first(lambda: (place / "ordered.jsonl").write_text("".join(ordered)))
        for name, more in (("error", ("data.val=null",)), ("eval", ("train.eval_every=1", "data.max_samples=4"))):
            given = (f"data.train={place / 'ordered.jsonl'}", f"data.val={place / 'ordered.jsonl'}")
            with pytest.raises(DataError, match=r"ordered.jsonl:\d+: .*no such file") as found:
                trains(name, *over, *given, *more)
            assert found.value.agreed and found.value.silent == (ranks.index > 0)
            assert len(set(ranks.each(str(found.value)))) == 1
            assert find_checkpoint(place / name).step == 1, "what was done is saved"
            assert not (place / name / "failures").exists()


# -- wishes of one rank -----------------------------------------------------------------------------------------------


class AfterStep(Callback):
    """Does something on one rank after a step."""

    def __init__(self, rank: int, step: int, act: Callable[[Any], None]):
        self.rank, self.step, self.act = rank, step, act

    def on_step(self, run: Any, row: Any) -> None:
        if (run.ranks.index, run.step) == (self.rank, self.step):
            self.act(run)


def check_stops(be: Backend) -> None:
    """A callback's stop ends the run as if it were done; a signal gives up the evaluation that is due, and saves."""
    ranks = Ranks(be.collectives)
    with small_runs(be) as (place, trains):
        grid = ("parallel.dp=2", "parallel.tp=2", "train.steps=5")
        stopped = trains("stopped", *grid, callbacks=[AfterStep(3, 2, lambda run: run.stop("enough"))])
        assert ranks.each((stopped.step, stopped.stop_reason, stopped.stopped_by)) == [(2, "enough", None)] * 4
        assert [row["step"] for row in read_metrics(place / "stopped") if "eval_loss" in row] == [2]

        signalled = AfterStep(2, 1, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        ended = trains("ended", *grid, "train.eval_every=1", callbacks=[signalled])
        assert ranks.each((ended.step, ended.stopped_by)) == [(1, int(signal.SIGTERM))] * 4
        assert not [row for row in read_metrics(place / "ended") if "eval_loss" in row]
        assert find_checkpoint(place / "ended").step == 1
        again = trains("ended", *grid)
        assert again.step == 5 and len(losses(place / "ended")) == 5


# -- what one of them writes ------------------------------------------------------------------------------------------


def check_watching(be: Backend) -> None:
    """Answers, scores, trackers, checkpoints by the clock: written once, the same however the model is divided."""
    ranks = Ranks(be.collectives)
    with small_runs(be) as (place, trains):
        more = ("log.generate=2", "log.generate_tokens=4", "log.tensorboard=true", "checkpoint.minutes=1e-9")
        more += ("checkpoint.keep_last=null", "train.eval_every=2")
        data = ranks.first(lambda: str(miniatures.ai2d(place)))
        more += (f"eval.tasks={{ai2d_test: {data}}}", "eval.every=2", "eval.limit=3", "eval.max_new_tokens=2")
        more += ("eval.min_pixels=784", "eval.max_pixels=784")
        answers, scored = [], []
        layouts = {
            "grid": ("parallel.dp=2", "parallel.tp=2"),
            "copies": ("parallel.dp=auto",),
            "stages": ("parallel.pp=2", "parallel.cp=2"),
        }
        for name, degrees in layouts.items():
            assert trains(name, *degrees, *more, callbacks=[SampleAnswers(), TaskScores()]).step == 3
            kept = {step: read_answers(place / name / "evals" / "ai2d_test" / f"step-000000{step}") for step in (2, 3)}
            scored.append([row["text"] for step in kept for row in kept[step].values()])
            assert [row["step"] for row in read_metrics(place / name) if "eval_ai2d_test" in row] == [2, 3]
            answers.append((place / name / "samples.jsonl").read_text())
            assert len(answers[-1].splitlines()) == 2 * 2, "two samples after two evaluations"
            assert len(list((place / name).rglob("*tfevents*"))) == 1
            saved = sorted(path.name for path in (place / name / "checkpoints").glob("step-*"))
            assert saved == ["step-0000001", "step-0000002", "step-0000003"]
        assert answers[0] == answers[1] == answers[2]
        assert len(scored[0]) == 6 and scored[0] == scored[1] == scored[2]
        assert losses(place / "grid") == pytest.approx(losses(place / "copies"), rel=1e-5)
        peaks = ranks.each(be.device.peak_memory())
        logged = [row["peak_memory"] for row in read_metrics(place / "copies") if "loss" in row]
        assert logged == sorted(logged) and max(peaks) >= logged[-1] > 0


def check_odd_sizes(be: Backend) -> None:
    """Fewer samples than ranks, an empty validation set, frozen parts, adapters with an export."""
    ranks = Ranks(be.collectives)
    with small_runs(be) as (place, trains):
        few = ("parallel.dp=4", "train.global_batch=2", "data.max_samples=3", "data.val=null")
        assert trains("few", *few, "model.freeze=[vision]").step == 3
        lora = ("lora.rank=2", "checkpoint.export=true", "parallel.dp=2", "parallel.tp=2")
        assert trains("lora", *lora).step == 3
        ranks.each(None)  # the others do not wait for the export
        assert (place / "lora" / "export" / "adapter_model.safetensors").exists()


def check_memory_of_one_rank(be: Backend) -> None:
    """Less memory on one rank is said with its number, and that for a copy of a checkpoint as well."""
    ranks = Ranks(be.collectives)
    there = min(ranks.each(min(be.device.total_memory(), *memory_limits())))
    expected = Memory(0, 0, 0, 0, 0, peak=there - IMPORTED - RUNNING)
    assert memory_warning(expected, be.device, ranks) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if ranks.index == 2:
        resource.setrlimit(resource.RLIMIT_AS, (there - 1, hard))
    told = memory_warning(expected, be.device, ranks)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert told is not None and told.startswith("warning: rank 2 (") and "): about" in told
    everywhere = memory_warning(replace(expected, peak=2 * there), be.device, ranks)
    assert everywhere is not None and everywhere.startswith("warning: about")

    with small_runs(be) as (place, _):

        def take(*, copy: bool) -> Snapshot:
            if copy and ranks.index == 1:
                raise MemoryError
            return Snapshot(step=1, meta=Meta(), optimizer_steps={}, pieces=(), written_by={}, wanted={})

        warned, saved = list[str](), list[int]()
        with Saver(
            place / "run", ranks=ranks, on_saved=lambda path, step: saved.append(step), warn=warned.append,
            background=True,
        ) as saver:  # fmt: skip
            saver.save(take)
        assert saved == [1]
        assert warned == [
            "warning: there is no memory for a copy of the checkpoint on rank 1: training waits until it is written"
        ]
