"""Bad input through the command line: one line that says what and where, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from duetvl.cli import main


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A directory with a recipe that trains."""
    directory = tmp_path_factory.mktemp("good")
    tiny_run.write_recipe(directory)
    return directory


@pytest.fixture
def place(good, tmp_path, monkeypatch) -> Path:
    """A copy to spoil. Paths in the recipe become relative: the working directory is the copy."""
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)
    monkeypatch.delenv("DUETVL_DEBUG", raising=False)
    place = tmp_path / "place"
    shutil.copytree(good, place)
    recipe = place / "tiny.json"
    recipe.write_text(recipe.read_text().replace(f"{good}/", ""))
    monkeypatch.chdir(place)
    return place


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def refusal(capsys, *argv: str) -> str:
    """The one line on stderr of a command that changes nothing on disk."""
    before = contents(Path.cwd())
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert contents(Path.cwd()) == before
    return captured.err


# -- the model --------------------------------------------------------------------------------------------------------


def without_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "error: model: has no weights; expected model.safetensors, or shards with model.safetensors.index.json"


def truncated(model: Path) -> str:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "error: model/model.safetensors: is truncated: the tensor 'model.norm.weight' ends at byte"


def truncated_header(model: Path) -> str:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return "error: model/model.safetensors: is truncated: its header has"


def missing_shard(model: Path) -> str:
    files = shards(model)
    files[1].unlink()
    return f"error: model: 1 of 3 shards missing ({files[1].name}); download the rest"


def truncated_shard(model: Path) -> str:
    last = shards(model)[2]
    last.write_bytes(last.read_bytes()[:-1])
    return f"error: model/{last.name}: is truncated"


def shards(model: Path) -> list[Path]:
    """Cut the weights into three files with an index."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    files = [model / f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    places = {name: files[3 * i // len(weights)] for i, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in weights if places[name] == file}, file)
    index = {"weight_map": {name: file.name for name, file in places.items()}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def another_family(model: Path) -> str:
    return reconfigured(model, {"model_type": "llama"}, "model_type is 'llama'; duetvl implements 'qwen2_vl'")


def another_size(model: Path) -> str:
    changed = {"intermediate_size": 56}
    reconfigured(model, changed, "")
    return "error: model: the weights are not those of its config (56 tensors expected, 56 found): 6 of another shape"


def reconfigured(model: Path, changes: dict, expected: str) -> str:
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return f"error: model/config.json: {expected}"


def no_json(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": ')
    return "error: model/config.json: cannot be read as JSON"


def no_directory(model: Path) -> str:
    shutil.rmtree(model)
    return "error: model: no such directory; give a local model directory"


def no_tokenizer(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    return "error: model: has no tokenizer"


SPOIL: list[Callable[[Path], str]] = [
    without_weights, truncated, truncated_header, missing_shard, truncated_shard, another_family, another_size,
    no_json, no_directory, no_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize(("backend", "framework"), [("torch_npu", "torch"), ("mindspore", "mindspore")])
def test_a_model_that_cannot_be_read(place, capsys, spoil, backend, framework):
    pytest.importorskip(framework)
    expected = spoil(place / "model")
    assert expected in refusal(capsys, "train", "tiny.json", "--backend", backend, "--device", "cpu")


@pytest.mark.parametrize("spoil", [spoil for spoil in SPOIL if spoil is not without_weights])  # which check allows
def test_check_sees_the_same(place, capsys, spoil):
    expected = spoil(place / "model")
    assert expected in check_refusal(capsys)


def check_refusal(capsys) -> str:
    """`duetvl check` may say what is good before it finds what is not."""
    before = contents(Path.cwd())
    assert main(["check", "tiny.json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert contents(Path.cwd()) == before
    return captured.err


def test_weights_of_the_other_family(place, tiny, capsys):
    shutil.copyfile(tiny.directory("qwen2-tied") / "model.safetensors", place / "model" / "model.safetensors")
    message = refusal(capsys, "train", "tiny.json")
    assert "error: model: the weights are not those of its config" in message
    assert "absent (visual.blocks.0.norm" in message or "not part of the model" in message
    assert len(message) < 1000


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.rl=3e-5", "error: optim has no field 'rl'; did you mean 'lr'? (betas, "),
        ("optm.lr=3e-5", "'optm'; did you mean 'optim'?"),
        ("train.steps=many", "train.steps"),
        ("parallel.tp=2", "tp 2 needs 2 processes, and 1 was started; start 2"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("train.output_dir=tiny.json", "train.output_dir tiny.json: "),
    ],
)
def test_a_recipe_that_makes_no_sense(place, capsys, override, expected):
    assert expected in refusal(capsys, "train", "tiny.json", override)


def test_an_unknown_key_in_the_file(place, capsys):
    recipe = json.loads((place / "tiny.json").read_text())
    recipe["model"]["pth"] = recipe["model"].pop("path")
    (place / "tiny.json").write_text(json.dumps(recipe))
    message = refusal(capsys, "train", "tiny.json")
    assert message.startswith("error: model has no field 'pth'; did you mean 'path'?")


def test_a_recipe_that_is_no_file(place, capsys):
    os.mkfifo(place / "pipe")
    for name, expected in (
        ("pipe", "error: pipe: is a pipe or a device; write the recipe to a file first\n"),
        ("/dev/zero", "error: /dev/zero: is a pipe or a device; write the recipe to a file first\n"),
        ("model", "error: model: is a directory; give the file of a recipe\n"),
    ):
        for command in (["train"], ["check"], ["data", "preview"]):
            assert main([*command, name]) == 2
            assert capsys.readouterr() == ("", expected)
    with open(place / "large.yaml", "wb") as sparse:
        sparse.truncate(10**9)
    assert refusal_of_one(capsys, "train", "large.yaml") == (
        "error: large.yaml: has 1000000000 bytes, a recipe at most 1048576\n"
    )


def refusal_of_one(capsys, *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


# -- where results go -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(good, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(good / "tiny.json"), "train.steps=1", f"train.output_dir={run}"]) == 0
    return run


@pytest.mark.parametrize("command", ["data preview tiny.json", "plot RUN", "import-mindspeed a.json b.json c.sh"])
def test_an_output_that_cannot_be_made(place, trained, capsys, command):
    argv = command.replace("RUN", str(trained)).split()
    assert "error: -o gone/x: there is no directory gone; create it" in refusal(capsys, *argv, "-o", "gone/x")
    assert "error: -o model: is a directory; give the name of a file" in refusal(capsys, *argv, "-o", "model")
    assert "error: -o tiny.json: exists already" in refusal(capsys, *argv, "-o", "tiny.json").replace(
        "error: tiny.json", "error: -o tiny.json"
    )


@pytest.mark.parametrize("command", ["data preview tiny.json -n 6", "plot RUN"])
def test_a_picture_may_replace_a_picture(place, trained, capsys, command):
    argv = [*command.replace("RUN", str(trained)).split(), "-o", "x.png"]
    assert main(argv) == 0 == main(argv)
    assert (place / "x.png").read_bytes()[:4] == b"\x89PNG"


# -- the streams ------------------------------------------------------------------------------------------------------


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m duetvl {command}"], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_closed_streams(place):
    for closed in (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        done = shell(f"check tiny.json {closed}")
        assert (done.returncode, done.stderr) == (0, "")
    done = shell("train none.yaml >&-")
    assert (done.returncode, done.stderr) == (2, "error: none.yaml: no such file\n")
    # What is opened next would get the number of the closed stream, and what is printed to it.
    done = shell("train tiny.json train.steps=1 <&- >&- 2>&-")
    assert done.returncode == 0
    rows = (place / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 1]


def test_a_stream_that_is_full_or_has_no_reader(place):
    done = shell("check tiny.json > /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
    done = shell("train tiny.json train.steps=1 > /dev/full")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell("check tiny.json | head -1")
    assert done.stdout.startswith("backend: ") and done.stderr == ""


def test_a_stream_that_cannot_show_a_character(place):
    shutil.copytree("model", "模型")
    done = shell("check tiny.json model.path=模型", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model: \\u6a21\\u578b, " in done.stdout
    done = shell("check tiny.json model.path=型", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert done.returncode == 2 and done.stderr.startswith("error: \\u578b: no such directory")


# -- the data ---------------------------------------------------------------------------------------------------------


def write_records(place: Path, *records: dict) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (place / "data.jsonl").write_text(text)


def conversation(question: str, images: list[str] | None = None, videos: list | None = None) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages, "images": images or [], "videos": videos or []}


HELLO = conversation("hello")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (conversation("<image>and<image>?", ["green1.png"]), "data.jsonl:2: "),
        (conversation("no marker", ["green1.png"]), "data.jsonl:2: "),
        (conversation("<image>what?"), "data.jsonl:2: "),
        (conversation("<video>what?", ["green1.png"]), "data.jsonl:2: "),
        (conversation("<video>what?", videos=[["green1.png", "gone.png"]]), "data.jsonl:2: gone.png"),
        (conversation("<image>what?", ["gone.png"]), "data.jsonl:2: gone.png"),
        (conversation("<image>what?", ["tiny.json"]), "data.jsonl:2: tiny.json: is not an image"),
        (conversation("<image>what?", ["half.png"]), "data.jsonl:2: half.png: "),
        (conversation("<image>what?", ["model"]), "data.jsonl:2: model: "),
        ({"images": []}, "data.jsonl:2: the record has no known layout"),
        ({**HELLO, "messages": HELLO["messages"][::-1]}, "data.jsonl:2: "),
    ],
)
def test_a_record_that_cannot_be_used(place, capsys, record, expected):
    png = (place / "green1.png").read_bytes()
    (place / "half.png").write_bytes(png[: len(png) // 2])
    write_records(place, HELLO, record, HELLO, HELLO)
    assert expected in refusal(capsys, "train", "tiny.json", "data.shuffle=false")


def test_data_of_which_nothing_is_trained(place, capsys):
    unheard = [*HELLO["messages"][:1], {**HELLO["messages"][1], "loss": False}]
    (place / "val.jsonl").write_text(json.dumps({"messages": unheard}) + "\n")
    expected = "no token of its samples is trained; each needs an answer, neither masked nor cut off"
    for field in ("data.val", "data.train"):
        assert main(["check", "tiny.json", f"{field}=val.jsonl"]) == 2
        assert capsys.readouterr().err == f"error: {field}: {expected}\n"
    assert main(["train", "tiny.json", "data.val=val.jsonl", "train.steps=2", "train.eval_every=1"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "eval_loss" in line] == [
        f"warning: step {step} has no eval_loss: no token of the validation data is trained" for step in (1, 2)
    ]
    assert "eval" not in (place / "runs" / "tiny" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "data.jsonl: "),
        ('{"messages": [\n', "data.jsonl:1: "),
        ("[1, 2]\n", "data.jsonl:"),
        ("\x00\xff", "data.jsonl"),
    ],
)
def test_a_file_without_records(place, capsys, text, expected):
    (place / "data.jsonl").write_bytes(text.encode("latin-1"))
    assert expected in refusal(capsys, "train", "tiny.json", "data.val=null")


def test_a_bad_picture_in_a_later_step(place, capsys):
    """The run has begun by then: what it has saved stays whole, and it is resumed once the picture is there."""
    write_records(place, *[HELLO] * 6, conversation("<image>what?", ["late.png"]), HELLO)
    (place / "late.png").write_text("not an image")
    argv = ["train", "tiny.json", "data.shuffle=false", "data.val=null", "train.steps=4", "train.global_batch=2"]
    assert main([*argv, "checkpoint.every=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.jsonl:7: late.png: is not an image: it is text\n"
    run = place / "runs" / "tiny"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-0000002", "step-0000003"]
    assert not [path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".saving"))]
    shutil.copyfile(place / "green1.png", place / "late.png")
    assert main([*argv, "checkpoint.every=1"]) == 0
    assert "step 4/4" in capsys.readouterr().out


def test_the_real_command(place):
    """The same through a process of its own: nothing but the line on stderr, from any of the libraries."""
    (place / "green1.png").write_text("not an image")
    before = contents(place)
    argv = [sys.executable, "-m", "duetvl", "train", "tiny.json", "data.shuffle=false"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: data.jsonl:2: green1.png: is not an image: it is text\n"
    assert contents(place) == before
