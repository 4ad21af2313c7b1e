"""Benchmarks as a run goes along: training may not import evaluation, so they meet here, as `answers.py` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from duetvl.convert.opening import open_model
from duetvl.core.batch import Sample
from duetvl.core.errors import DataError
from duetvl.core.ranks import Ranks
from duetvl.data.encode import Processor
from duetvl.evaluation.answers import Asked, RunAnswers, data_md5, open_run
from duetvl.evaluation.profiles import default_profile, find_profile
from duetvl.evaluation.report import Report, notes, span, write_report
from duetvl.evaluation.scoring import Marked, Row, Summary, Tally, mark, summarize
from duetvl.evaluation.tasks.registry import find_task
from duetvl.inference.answering import failure, sample_of
from duetvl.inference.defaults import read_defaults
from duetvl.inference.generate import generate
from duetvl.inference.request import Delta
from duetvl.storage.files import remove_directory
from duetvl.training.checkpoints.run_directory import EVALS
from duetvl.training.recipe.sections import EvalSection
from duetvl.training.watching.callbacks import Callback, Running
from duetvl.training.watching.callbacks import Row as MetricsRow
from duetvl.training.watching.metrics import read_metrics


class TaskScores(Callback):
    """The scores of `eval.tasks` every `eval.every` steps and after the last one, greedily.

    Each is in metrics.jsonl as `eval_TASK` with `eval_TASK_low`, `eval_TASK_high` and `eval_TASK_unparsed`, in percent
    but for the last, a number of answers; answers and scores are in `evals/TASK/step-N`, a directory as `duetvl eval`
    has it.
    """

    def on_start(self, run: Running) -> None:
        """Read the data: what is wrong with them is told before the first step. ConfigError, DataError."""
        given = run.recipe.eval
        source = open_model(run.recipe.model.path, base=run.recipe.model.base, weights=False)
        self.processor = Processor.from_directory(source.path, source.family)
        self.ends = read_defaults(source.path, self.processor).stop_ids
        family = source.config.model_type
        self.asked = {name: _asked(name, Path(data), given, family) for name, data in given.tasks.items()}
        self.md5 = {name: data_md5(Path(data)) for name, data in given.tasks.items()}
        ranks = Ranks(run.backend.collectives)
        self.scored = ranks.first(lambda: _scored(run, [asked.task.name for asked in self.asked.values()]))
        if run.step and self._is_due(run):  # a signal may have kept the last start from it
            self._evaluate(run)

    def on_step(self, run: Running, row: MetricsRow) -> None:
        """Ask them where it is time."""
        if self._is_due(run) or run.step == run.total:
            self._evaluate(run)

    def on_finish(self, run: Running) -> None:
        """Ask them of the last step, where the run ends before its time."""
        self._evaluate(run)

    def _is_due(self, run: Running) -> bool:
        return run.step % run.recipe.eval.every == 0

    def _evaluate(self, run: Running) -> None:
        """Those that have no score at this step yet."""
        for name, asked in self.asked.items():
            if (asked.task.name, run.step) in self.scored:
                continue
            try:
                rows = self._answers(run, asked)
            except _Stopping:
                run.say(f"the run is to stop: {name} is not asked at step {run.step} before it goes on")
                return
            self.scored.add((asked.task.name, run.step))
            marked = list(mark(asked.task, asked.profile, asked, rows))
            summary = summarize(marked, asked.task.groups)
            self._log(run, asked.task.name, summary.whole)
            if run.backend.collectives.rank == 0:
                try:
                    self._write(run, name, rows, marked, summary)
                except OSError as error:  # a full disk is no reason to end a run whose checkpoint may still fit
                    run.say(f"warning: the answers to {name} are not written: {error.strerror or error}")

    def _log(self, run: Running, name: str, whole: Tally) -> None:
        if whole.score is None:
            run.say(f"step {run.step}/{run.total}  {name}: no question has an answer")
            return
        beside = {field: getattr(whole, field) for field in ("low", "high", "unparsed")}
        run.log({f"eval_{name}": whole.score, **{f"eval_{name}_{field}": value for field, value in beside.items()}})
        run.say(f"step {run.step}/{run.total}  {name} {whole.score:.1f}% ({span(whole)}) of {whole.n} questions")

    def _answers(self, run: Running, asked: Asked) -> dict[int, Row]:
        """All ranks ask the same, in the same order: a model that is divided answers when all of them do."""
        rows: dict[int, Row] = {}
        prompts = self._prompts(asked, rows)
        while some := dict(islice(prompts, run.recipe.eval.at_once)):
            most = asked.profile.max_new_tokens
            tokens = generate(
                run.model, list(some.values()), max_new_tokens=most, stop=self.ends, on_delta=_unless_stopping(run)
            )
            for number, ids in zip(some, tokens, strict=True):
                reason = "stop" if ids and ids[-1] in self.ends else "length"
                text = self.processor.decode(ids)
                rows[number] = {"text": text, "finish_reason": reason, "completion_tokens": len(ids)}
        return rows

    def _prompts(self, asked: Asked, rows: dict[int, Row]) -> Iterator[tuple[int, Sample]]:
        """Index and prompt of each question; what is wrong with one is its row."""
        for question in asked:
            if question.problem:
                continue
            try:
                yield question.index, sample_of(self.processor, question.conversation, question.id)
            except DataError as error:
                rows[question.index] = failure(error)

    def _write(self, run: Running, name: str, rows: dict[int, Row], marked: list[Marked], summary: Summary) -> None:
        """The directory of these answers, such that `duetvl eval --compare` can take it."""
        asked = self.asked[name]
        directory = run.run_dir / EVALS / asked.task.name / f"step-{run.step:07}"
        settings: dict[str, Any] = {
            "task": asked.task.name, "profile": asked.profile.name, "md5": self.md5[name],
            "min_pixels": asked.profile.pixels.min_pixels, "max_pixels": asked.profile.pixels.max_pixels,
            "max_new_tokens": asked.profile.max_new_tokens, "backend": run.backend.name,
        }  # fmt: skip
        about = {
            "task": name, "data": Path(run.recipe.eval.tasks[name]).absolute(), "questions": asked.count,
            "model": f"{run.run_dir}@{run.step}",
        }  # fmt: skip
        if directory.exists():  # of steps that were done again from an earlier checkpoint
            remove_directory(directory)
        written = open_run(directory, settings, about)
        kept = RunAnswers(asked, directory)
        with kept.file.adding() as add:
            for number, row in rows.items():
                kept.add(add, number, row)
        kept.finish()
        write_report(Report(written, marked, summary, remarks=notes(marked)), directory)


def _scored(run: Running, names: list[str]) -> set[tuple[str, int]]:
    """The tasks and steps that metrics.jsonl has scores of."""
    rows = read_metrics(run.run_dir)
    return {(name, row["step"]) for row in rows for name in names if f"eval_{name}" in row}


def _asked(name: str, data: Path, given: EvalSection, family: str) -> Asked:
    """The questions of a benchmark, in the words and pixels of the recipe."""
    task = find_task(name)
    profile = default_profile(family) if given.profile is None else find_profile(given.profile)
    wishes = {key: value for key in ("min_pixels", "max_pixels") if (value := getattr(given, key)) is not None}
    pixels = profile.pixels._replace(**wishes)
    profile = replace(profile, pixels=pixels, max_new_tokens=given.max_new_tokens)
    questions = task.questions(data, profile)
    return Asked(task, profile, questions, min(given.limit or len(questions), len(questions)))


def _unless_stopping(run: Running) -> Any:
    def look(prompt: int, delta: Delta) -> None:
        if run.stopping:
            raise _Stopping

    return look


class _Stopping(Exception):
    """A signal has come, and what is left of the time is for saving."""
