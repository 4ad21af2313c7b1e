"""The documents agree with each other and with the code: links, commands, recipes, examples."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_run

from duetvl.commands.parser import make_parser
from duetvl.core.errors import ConfigError
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.yaml_values import parse_yaml

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCUMENTS = [
    *READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
SEPARATORS = {"&&", "||", ";", "|", "&"}

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def heading_levels(path: Path) -> list[int]:
    prose = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = READMES
    assert heading_levels(english) == heading_levels(chinese)
    assert blocks(english) == blocks(chinese)
    assert links(english)[1:] == links(chinese)[1:]  # the first leads to the other language


def links(path: Path) -> list[str]:
    return LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8")))


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    local = (link.partition("#")[0] for link in links(path) if "://" not in link)
    missing = [link for link in local if link and not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_page_is_linked_from_the_readme(readme: Path) -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme) if "://" not in link}
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert [page.relative_to(ROOT).as_posix() for page in pages if page not in linked] == []


CONTENTS = re.compile(r"^(Contents: |目录\uff1a)(.*)$", re.MULTILINE)


@every_document
def test_a_long_page_has_a_table_of_contents(path: Path) -> None:
    """A page of docs/ with more than 300 lines names its sections, and a table that is there names all of them."""
    text = path.read_text(encoding="utf-8")
    contents = CONTENTS.search(text)
    if path.is_relative_to(ROOT / "docs"):
        assert contents is not None or len(text.splitlines()) <= 300
    if contents is not None:
        named = re.findall(r"\[([^]]*)\]\(#", contents[2])
        assert named == [
            title.replace("`", "") for title in re.findall(r"^## (.*)$", BLOCK.sub("", text), re.MULTILINE)
        ]


def anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


@every_document
def test_links_into_a_page_lead_to_a_heading(path: Path) -> None:
    lost = []
    for link in links(path):
        file, _, place = link.partition("#")
        page = path.parent / file if file else path
        if place and "://" not in link and page.suffix == ".md":
            prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
            headings = {anchor(title) for title in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}
            lost += [link] if place not in headings else []
    assert lost == []


# -- the house ------------------------------------------------------------------------------------------------------


def tree(text: str) -> dict[Path, set[str]]:
    """A drawn tree: the names below each directory whose content is drawn."""
    found: dict[Path, set[str]] = {}
    above: list[tuple[int, Path]] = [(-1, ROOT)]
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while above[-1][0] >= indent:
            above.pop()
        words = re.match(r"\s*((?:\S+(?:\.py|/) ?)*)", line)
        names = words[1].split() if words else []
        found.setdefault(above[-1][1], set()).update(name.rstrip("/") for name in names)
        if names and names[0].endswith("/"):
            above.append((indent, above[-1][1] / names[0]))
    return found


def test_the_house_is_drawn_as_it_stands() -> None:
    """Whatever is drawn is there, and of a directory that is drawn everything is."""
    text = next(text for _, text in blocks(ROOT / "docs" / "architecture.md") if text.startswith("duetvl/"))
    for folder, names in tree(text).items():
        there = {entry.name for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
        there -= {"__init__.py", "__main__.py", "__pycache__"}
        if folder != ROOT:
            assert names == there, folder
        assert all((folder / name).exists() for name in names), folder


# -- commands --------------------------------------------------------------------------------------------------------


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each simple command in the shell blocks."""
    for language, text in blocks(path):
        if language not in ("bash", "sh", "console"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
                if word in SEPARATORS:
                    if words:
                        yield words
                    words = []
                elif words or not re.fullmatch(r"\w+=.*", word):  # NAME=value before a command
                    words.append(word)


def complaints(words: list[str]) -> list[str]:
    """What is wrong with `duetvl ...` or `bash script ...`; nothing about other programs."""
    if words[0] == "bash":
        return [] if (ROOT / words[1]).is_file() else [f"{words[1]}: no such script"]
    if words[0] != "duetvl":
        return []
    if "--" in words:  # what `duetvl launch` runs
        at = words.index("--")
        return complaints(words[:at]) + complaints(["duetvl", *words[at + 1 :]])
    parser = make_parser()
    for word in (word for word in words[1:] if not word.startswith("-")):
        inner = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if inner is None:
            break
        if word not in inner.choices:
            return [f"{parser.prog} has no command {word}"]
        parser = inner.choices[word]
    known = {option for action in parser._actions for option in action.option_strings}
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    return [f"{words[1]} has no option {option}" for option in given if option not in known]


@every_document
def test_commands_and_options_exist(path: Path) -> None:
    assert [(shlex.join(words), wrong) for words in commands(path) if (wrong := complaints(words))] == []


@pytest.mark.parametrize(
    "line",
    [
        "duetvl trian run.yaml",
        "duetvl launch --nproc 2 -- trian run.yaml",
        "duetvl train run.yaml --bakend ms",
        "duetvl data convert llava --anotations x",
        "duetvl data convert lava",
        "bash scripts/no.sh",
    ],
)
def test_the_check_sees(line: str) -> None:
    assert complaints(shlex.split(line))


OVERRIDE = re.compile(r"(?<![\w./-])([a-z]+\.[a-z_]+)=[^\s`]*")


def wrong_overrides(text: str) -> list[str]:
    """`section.key=value` in commands and in the text that name no field, or give it what it does not take."""
    wrong = []
    for found in OVERRIDE.finditer(text):
        override = found[0].rstrip(".,;:)")
        if not override.endswith("=") and override != "section.key=value":  # `train.output_dir=...`
            try:
                data = {"train": "-"} if override.startswith("data.val_rate=") else {"train": "-", "val": "-"}
                make_recipe({"model": {"path": "-"}, "data": data}, [override])
            except ConfigError as error:
                wrong.append(f"{override}: {error}")
    return wrong


@every_document
def test_overrides_name_fields(path: Path) -> None:
    assert wrong_overrides(path.read_text(encoding="utf-8")) == []


def test_the_check_of_overrides_sees() -> None:
    assert wrong_overrides("duetvl train run.yaml optim.lr=3e-5 lora.rank=8, `train.loss=sample`.") == []
    for wrong in ("optim.rl=3e-5", "`optm.lr=1`", "optim.lr=fast", "(lora.rank=0)", "train.loss=samples."):
        assert len(wrong_overrides(f"see {wrong} there")) == 1


PLACE = re.compile(r"`((?:tests|docs|duetvl|scripts|launch|benchmarks|recipes)/[\w./-]*)`")


@every_document
def test_files_that_are_named_exist(path: Path) -> None:
    named = PLACE.findall(path.read_text(encoding="utf-8"))
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


# -- examples --------------------------------------------------------------------------------------------------------


@every_document
def test_recipes_are_valid(path: Path) -> None:
    for language, text in blocks(path):
        if language == "yaml" and not text.startswith("name:"):  # else a task of evaluation: test_readme.py asks it
            make_recipe(parse_yaml(text, path.name))


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_python_examples_run(tmp_path: Path, backend: str) -> None:
    """Blocks after `<!-- runs -->`, with a tiny model in the demo's place; on MindSpore with the name replaced."""
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    tiny_run.write_model(tmp_path / "build" / "demo" / "model")
    programs = re.findall(r"^<!-- runs -->\n```python\n(.*?)^```$", READMES[0].read_text(), re.MULTILINE | re.DOTALL)
    assert programs
    for program in programs:
        text = program.replace('load_backend("torch"', f'load_backend("{backend}"')
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "(3, " in done.stdout
