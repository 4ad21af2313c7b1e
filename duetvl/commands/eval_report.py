"""The end of `duetvl eval`: answers on disk are scored, and written and shown as a report; two runs are compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duetvl.commands.session import Say
from duetvl.core.errors import ConfigError, DuetvlError
from duetvl.evaluation.answers import Asked, data_md5, read_answers, read_run
from duetvl.evaluation.compare import compare_runs, comparison_lines, write_comparison
from duetvl.evaluation.endpoint import open_endpoint
from duetvl.evaluation.judge import Judge
from duetvl.evaluation.page import PAGE, write_comparison_page, write_page
from duetvl.evaluation.profiles import find_profile
from duetvl.evaluation.question import Question
from duetvl.evaluation.report import Report, beside_published, markdown, notes, write_report
from duetvl.evaluation.scoring import mark, summarize
from duetvl.evaluation.spreadsheet import SHEET, available, write_spreadsheet
from duetvl.evaluation.tasks.registry import find_task


def report(args: argparse.Namespace, out: Say, say: Say) -> bool:
    """Score the answers of -o DIR, write the report and show it; whether any question has no answer."""
    directory: Path = args.output
    run = read_run(directory)
    asked, remarks = asked_again(args, run)
    rows = read_answers(directory)
    judge = Judge(open_endpoint(args.judge, args.judge_model, "--judge"), directory) if args.judge else None
    marked = list(mark(asked.task, asked.profile, asked, rows, judge))
    summary = summarize(marked, asked.task.groups)
    result = Report(
        run,
        marked,
        summary,
        published=beside_published(str(run["about"].get("model", "")), asked.task.name, summary),
        judge=None if judge is None else judge.summary(),
        remarks=[*remarks, *notes(marked)],
    )
    write_report(result, directory)
    write_page(result, directory, asked.questions.__getitem__)
    if available():
        write_spreadsheet(marked, directory / SHEET)
    else:
        say(f"{SHEET} is left out; it needs xlsxwriter: pip install duetvl[eval]")
    for line in markdown(result):
        out(line)
    whole = result.summary.whole
    failed = f"; {whole.unanswered} questions have no answer" if whole.unanswered else ""
    say(f"{directory / PAGE}: {whole.n} answers{failed}")
    return bool(whole.unanswered)


def compare(args: argparse.Namespace, out: Say, say: Say) -> int:
    """Compare the runs of --compare; with -o DIR the comparison is written there as well. The exit status."""
    first, second = args.compare
    comparison = compare_runs(first, second)
    for line in comparison_lines(comparison):
        out(line)
    if args.output is not None:
        write_comparison(comparison, args.output)
        runs = [read_run(directory) for directory in args.compare]
        write_comparison_page(comparison, runs, args.output, _pictures_of(runs[0], say))
        say(f"{args.output / PAGE}: the questions side by side")
    return 0


def _pictures_of(run: Mapping[str, Any], say: Say) -> Callable[[int], Question] | None:
    """The questions of a run with their pictures, where its data are still where they were."""
    about = run["about"]
    try:
        questions = find_task(about["task"]).questions(Path(about["data"]), find_profile(run["settings"]["profile"]))
    except DuetvlError as error:
        say(f"the page has no pictures: {error}")
        return None
    return questions.__getitem__


def asked_again(args: argparse.Namespace, run: Mapping[str, Any]) -> tuple[Asked, list[str]]:
    """The questions of a run, from its data, and what has changed about them since. ConfigError, DataError."""
    settings, about = run["settings"], run["about"]
    data = args.data or Path(about["data"])
    if args.task is not None and find_task(args.task).name != settings["task"]:
        raise ConfigError(f"--task {args.task}: the run in {args.output} is one of {settings['task']}")
    task, profile = find_task(args.task or about["task"]), find_profile(settings["profile"])
    questions = task.questions(data, profile)
    md5 = data_md5(data)
    remarks: list[str] = []
    if md5 != settings["md5"]:
        remarks.append(f"the data have changed since they were asked: md5 {settings['md5']}, now {md5}")
    if about["questions"] < len(questions):
        remarks.append(f"these are the first {about['questions']} of {len(questions)} questions")
    return Asked(task, profile, questions, min(about["questions"], len(questions))), remarks
