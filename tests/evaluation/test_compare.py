"""Two runs on the same questions: what B gains, how sure that is, and where the two differ."""

from __future__ import annotations

import json
from pathlib import Path

import miniatures
import pytest
from runs import asked_of, read_json, write_run

from duetvl.cli import main
from duetvl.core.errors import ConfigError
from duetvl.evaluation.compare import compare_runs
from duetvl.evaluation.question import Question


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A is right on two of three questions, B on those and on every ninth besides, and wrong on one; C has half."""
    directory = tmp_path_factory.mktemp("runs")
    data = miniatures.ai2d(directory, 160)
    asked = asked_of("ai2d_test", data)

    def a(question: Question) -> str:
        return miniatures.truth_of(question) if question.index % 3 else "none"

    def b(question: Question) -> str:
        return (
            "none" if question.index == 1 else miniatures.truth_of(question) if question.index % 9 == 0 else a(question)
        )

    write_run(directory / "a", asked, data, a)
    write_run(directory / "b", asked, data, b)
    write_run(directory / "c", asked, data, lambda question: a(question) if question.index < 80 else None)
    for name in "abc":
        main(["eval", "--rescore", "-o", str(directory / name)])
    chart = miniatures.chartqa(directory)
    write_run(directory / "other", asked_of("chartqa_test", chart), chart, miniatures.truth_of)
    main(["eval", "--rescore", "-o", str(directory / "other")])
    return directory


def test_the_difference_and_the_questions(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare_runs(runs / "a", runs / "b")
    whole = comparison.whole
    assert (whole.better, whole.worse, whole.equal) == (18, 1, 141)
    assert whole.mean == pytest.approx(17 / 160) and 0 < whole.low < whole.mean < whole.high < 0.2
    assert whole.chance < 0.01 and not comparison.warnings and comparison.left_out == 0
    assert [a.index for a, _ in comparison.different] == [1, *range(0, 160, 9)]
    groups = comparison.groups["category"]
    assert sum(one.better for one in groups.values()) == 18 and set(groups) == {"shapes", "charts"}
    assert main(["eval", "--compare", str(runs / "a"), str(runs / "b"), "-o", str(runs / "ab")]) == 0
    out = capsys.readouterr().out
    assert "B is better: the interval is above 0" in out and "19 questions differ, 10 of them:" in out
    line = next(line for line in out.splitlines() if line.startswith("| all "))
    assert f"{100 * whole.mean:+.1f} | {100 * whole.low:+.1f} to {100 * whole.high:+.1f}" in line
    written = read_json(runs / "ab" / "comparison.json")
    assert written["mean"] == pytest.approx(100 * whole.mean) and len(written["different"]) == 19
    page = (runs / "ab" / "report.html").read_text()
    content = json.loads(page.split('id="data">')[1].split("</script>")[0])
    sides = content["questions"][0]["answers"]
    assert len(content["questions"]) == 160 and [side["verdict"] for side in sides] == ["unparsed", "right"]
    assert len(content["pictures"]) == 40


def test_the_other_way_round_and_with_itself(runs: Path) -> None:
    forth, back = compare_runs(runs / "a", runs / "b").whole, compare_runs(runs / "b", runs / "a").whole
    assert (back.mean, back.better, back.worse) == (-forth.mean, forth.worse, forth.better)
    same = compare_runs(runs / "a", runs / "a")
    assert (same.whole.mean, same.whole.low, same.whole.high, same.whole.chance) == (0, 0, 0, 1)
    assert not same.different


def test_only_what_both_have_answered(runs: Path) -> None:
    comparison = compare_runs(runs / "c", runs / "b")
    assert len(comparison.pairs) == 80 and comparison.left_out == 80


def test_what_makes_two_hard_to_compare(runs: Path, tmp_path: Path) -> None:
    data = miniatures.ai2d(tmp_path, 120)
    other = write_run(tmp_path / "d", asked_of("ai2d_test", data, profile="qwen2_vl"), data, miniatures.truth_of)
    with pytest.raises(ConfigError, match=r"score the run with duetvl eval --rescore"):
        compare_runs(runs / "a", other)
    main(["eval", "--rescore", "-o", str(other)])
    warnings = " ".join(compare_runs(runs / "a", other).warnings)
    assert "their data differ: md5" in warnings and "another profile: vlmevalkit and qwen2_vl" in warnings
    with pytest.raises(ConfigError, match=r"a is a run of ai2d_test, .*other of chartqa_test; they must"):
        compare_runs(runs / "a", runs / "other")
