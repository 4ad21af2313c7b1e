"""Bad input through the command line: one line that says what and where, status 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from duetvl.cli import main

sys.path.insert(0, str(Path(__file__).parent / "training"))
import tiny_run


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


@pytest.mark.parametrize("spoil", SPOIL)
def test_check_sees_the_same(place, capsys, spoil):
    expected = spoil(place / "model")
    assert expected in check_refusal(capsys)


def check_refusal(capsys) -> str:
    """`duetvl check` may say what is good before it meets what is not."""
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
        ("parallel.tp=2", "tp 2 needs 2 processes; this release trains on one process"),
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
        ({"images": []}, "data.jsonl:2: the record is of no known layout"),
        ({**HELLO, "messages": HELLO["messages"][::-1]}, "data.jsonl:2: "),
    ],
)
def test_a_record_that_cannot_be_used(place, capsys, record, expected):
    png = (place / "green1.png").read_bytes()
    (place / "half.png").write_bytes(png[: len(png) // 2])
    write_records(place, HELLO, record, HELLO, HELLO)
    assert expected in refusal(capsys, "train", "tiny.json", "data.shuffle=false")


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
    """The run has begun by then: what it has saved stays whole, and it goes on once the picture is there."""
    write_records(place, *[HELLO] * 6, conversation("<image>what?", ["late.png"]), HELLO)
    (place / "late.png").write_text("not an image")
    argv = ["train", "tiny.json", "data.shuffle=false", "data.val=null", "train.steps=4", "train.global_batch=2"]
    assert main([*argv, "checkpoint.every=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.jsonl:7: late.png: is not an image\n"
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
    assert done.stderr == "error: data.jsonl:2: green1.png: is not an image\n"
    assert contents(place) == before
