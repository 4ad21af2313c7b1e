"""Reports: the same figures everywhere, and nothing that a model says is a formula, a link or a script."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import miniatures
import pytest
from runs import asked_of, read_json, write_run

from duetvl.cli import main
from duetvl.evaluation.question import Question
from duetvl.evaluation.report import harmless, read_results
from duetvl.evaluation.scoring import Marked
from duetvl.evaluation.spreadsheet import cell_text, write_spreadsheet

HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror=window.hit=1> [x](javascript:alert(1)) \u202e\u2028 &lt;"
)


def hostile(question: Question) -> str | dict[str, Any]:
    """Right answers, wrong ones, and what a page or a spreadsheet might stumble over."""
    truth = miniatures.truth_of(question)
    if question.index % 8 == 1:
        return HOSTILE
    if question.index % 8 == 2:
        return {"text": '=HYPERLINK("http://x")', "finish_reason": "length"}
    return "ABCD"["ABCD".index(truth) - 1] if question.index % 8 == 3 else truth


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is scored from the command line, without any model."""
    directory = tmp_path_factory.mktemp("run")
    data = miniatures.ai2d(directory, 160)
    run = write_run(directory / "run", asked_of("ai2d_test", data), data, hostile, model="ckpt/Qwen2.5-VL-7B-Instruct")
    assert main(["eval", "--rescore", "-o", str(run)]) == 0
    return run


def test_one_score_everywhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = read_json(run / "scores.json")
    marked = read_results(run)
    right = sum(one.value or 0.0 for one in marked)
    assert scores["score"] == pytest.approx(100 * right / 160, abs=1e-3) and scores["unit"] == "percent"
    assert scores["low"] < scores["score"] < scores["high"]
    assert (scores["n"], scores["truncated"], scores["clusters"]) == (160, 20, 40)
    assert scores["unparsed"] == sum(one.verdict == "unparsed" for one in marked) >= 20
    assert scores["settings"]["md5"] and scores["run"]["duetvl"] and scores["profile"] == "vlmevalkit"
    with open(run / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["group"] for line in table] == ["", "shapes", "charts"]
    assert float(table[0]["score"]) == scores["score"] and int(table[0]["n"]) == 160
    assert float(table[2]["high"]) == scores["groups"]["category"]["charts"]["high"]
    capsys.readouterr()
    assert main(["eval", "--rescore", "-o", str(run)]) == 0
    out = capsys.readouterr().out
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")
    ]
    span = f"{scores['low']:.1f} to {scores['high']:.1f}"
    assert cells[1] == ["all", f"{scores['score']:.1f}", span, "160", str(scores["unparsed"]), "20", "0"]
    assert len({len(line) for line in out.splitlines() if line.startswith("|")}) == 1  # columns stand below each other
    assert "published: Qwen2.5-VL-7B 83.9 on test, here " in out
    assert scores["published"]["score"] == 83.9 and scores["published"]["ours"] == scores["score"]
    assert "VLMEvalKit" not in " ".join(scores["remarks"])


def test_where_splits_differ_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = miniatures.docvqa(tmp_path)
    asked = asked_of("docvqa_val", data, count=9)
    run = write_run(tmp_path / "run", asked, data, miniatures.truth_of, model="ckpt/Qwen2.5-VL-7B-Instruct")
    assert main(["eval", "--rescore", "-o", str(run)]) == 0
    out = capsys.readouterr().out
    assert "published: Qwen2.5-VL-7B 95.7 on test" in out and "published is the score of DocVQA's test" in out
    assert "note: these are the first 9 of 40 questions" in out
    data.write_text(data.read_text().replace("J. Smith", "J. Smyth"))
    assert main(["eval", "--rescore", "-o", str(run)]) == 0
    assert "note: the data have changed since they were asked: md5" in capsys.readouterr().out


def test_mindies_own_line(tmp_path: Path) -> None:
    data = miniatures.videobench(tmp_path / "data")
    asked = asked_of("videobench", data, profile="mindie")
    run = write_run(tmp_path / "run", asked, data, miniatures.truth_of)
    assert main(["eval", "--rescore", "-o", str(run)]) == 1  # two videos are missing
    lines = (run / "mindie.csv").read_text().splitlines()
    assert lines[0] == "Tasks,N-Shot,Total,Pass,Metric,Value"
    scores = read_json(run / "scores.json")
    first = lines[1].split(",")
    assert first[:3] == ["videobench", "0", str(scores["n"])] and float(first[5]) == scores["score"] / 100
    assert scores["unanswered"] == 2 and "2 questions without an answer" in " ".join(scores["remarks"])
    assert len(lines) == 2 + len(scores["groups"]["set"])


# -- answers.xlsx ----------------------------------------------------------------------------------------------------


def cells(file: Path) -> dict[str, tuple[str, str]]:
    """Kind and text of every cell of the one sheet."""
    name = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with zipfile.ZipFile(file) as archive:
        assert not [part for part in archive.namelist() if "externalLink" in part or "_rels/sheet" in part]
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    assert not sheet.findall(".//m:f", name) and not sheet.findall(".//m:hyperlink", name)
    return {cell.get("r", ""): (cell.get("t", "n"), "".join(cell.itertext())) for cell in sheet.findall(".//m:c", name)}


def test_no_cell_is_a_formula(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xlsxwriter")
    found = cells(run / "answers.xlsx")
    assert found["A1"][1] == "index" and found["F1"][1] == "answer"
    assert found["F4"] == ("inlineStr", '=HYPERLINK("http://x")') and found["C4"][1] == "unparsed"
    assert found["F3"][1] == HOSTILE
    assert found["A161"] == ("n", "159")
    texts = [
        "=1+1",
        "+1",
        "-1",
        "@x",
        "http://x.example",
        "mailto:a@b.c",
        "a\x00\x07b\ud800",
        "x" * 40_000,
        "😀" * 20_000,
    ]
    marked = [Marked(number, f"q{number}", "p", ("t",), answer=text, value=0.0) for number, text in enumerate(texts)]
    write_spreadsheet(marked, tmp_path / "x.xlsx")
    found = cells(tmp_path / "x.xlsx")
    shown = [found[f"F{number + 2}"] for number in range(len(texts))]
    assert all(kind == "inlineStr" for kind, _ in shown)
    assert [text for _, text in shown[:6]] == texts[:6]
    assert shown[6][1] == "a\ufffd\ufffdb\ufffd"
    for _, text in shown[7:]:
        assert text.endswith(" [cut off]") and len(text.encode("utf-16-le")) // 2 <= 32_767
    assert cell_text("_x0041_") == "_x0041_"


def test_no_cell_of_a_table_is_a_formula() -> None:
    assert [harmless(text) for text in ("=1", "+1", "-1", "@a", "a=1", "")] == ["'=1", "'+1", "'-1", "'@a", "a=1", ""]


# -- report.html -----------------------------------------------------------------------------------------------------


def content(page: Path) -> Any:
    """The data in a page: nothing of them can end the script that they stand in."""
    html = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<script", html)) == 2 and len(re.findall(r"</script>", html)) == 2
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_the_page_holds_every_question(run: Path) -> None:
    page = content(run / "report.html")
    assert len(page["questions"]) == 160 and len(page["pictures"]) == 40 and page["left_out"] == 0
    assert page["questions"][1]["answers"][0]["text"] == HOSTILE
    assert [question["picture"] for question in page["questions"][:4]] == 4 * [page["questions"][0]["picture"]]
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in page["pictures"])
    assert "http" not in (run / "report.html").read_text().replace("http-equiv", "").split('id="data">')[0]


def test_a_page_stays_small(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is no room for all pictures, those of wrong answers come first."""
    from duetvl.evaluation import page

    monkeypatch.setattr(page, "_ROOM", 5000)
    assert main(["eval", "--rescore", "-o", str(run)]) == 0
    small = content(run / "report.html")
    monkeypatch.undo()
    assert 1 <= len(small["pictures"]) < 40 and small["left_out"] > 0
    assert sum(map(len, small["pictures"])) < 10_000
    seen = [one["answers"][0]["verdict"] for one in small["questions"] if one["picture"] is not None]
    assert "unparsed" in seen
    assert main(["eval", "--rescore", "-o", str(run)]) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where it is installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path("/usr/bin/chromium").exists():
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_the_page_in_a_browser(run: Path, browser: Any) -> None:
    """Hostile answers are text, nothing is asked of any other place, and questions are found."""
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    errors: list[str] = []
    asked: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"file://{run}/report.html")
    assert tab.inner_text("#title") == "ai2d_test, profile vlmevalkit"
    assert f"{read_json(run / 'scores.json')['score']:.1f}%" in tab.inner_text("#scores")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    marked = read_results(run)
    for verdict in ("right", "wrong", "unparsed"):
        tab.click(f"[data-kind={verdict}]")
        expected = sum(one.verdict == verdict for one in marked)
        assert tab.inner_text("#count") == f"{expected} of 160 questions"
    assert "<img src=x onerror=window.hit=1>" in tab.inner_text("#list")
    tab.select_option("select", "charts")
    both = sum(one.verdict == "unparsed" and one.groups["category"] == "charts" for one in marked)
    assert tab.inner_text("#count").startswith(f"{both} of ")
    tab.fill("input", "HYPERLINK")
    assert tab.locator("article").count() == sum(
        "HYPER" in (m.answer or "") and m.groups["category"] == "charts" for m in marked
    )
    tab.reload()  # what is shown stays
    assert tab.input_value("input") == "HYPERLINK" and tab.input_value("select") == "charts"
    assert tab.evaluate("window.hit") is None and not errors
    assert all(url.startswith(("file:", "data:")) for url in asked)
    tab.close()
