"""DPO from a recipe and a file of pairs: full and LoRA, both backends along one curve, resumed and across backends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from duetvl.core.backend import load_backend
from duetvl.core.errors import CheckpointError, ConfigError, DataError
from duetvl.models.qwen_vl.loading import load_model, save_model
from duetvl.training.check import check
from duetvl.training.preference.dpo import LOGGED
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import read_metrics

FIRST, ALONG = 1e-5, 1e-3  # relative difference between backends of the first loss, and of later ones


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The tiny model and twelve pairs: with a picture, with two, with none."""
    directory = tmp_path_factory.mktemp("dpo")
    file = tiny_run.write_recipe(directory)
    records = [pair(directory, number) for number in range(12)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values = json.loads(file.read_text())
    values["data"] |= {
        "train": str(directory / "pairs.jsonl"),
        "val": str(directory / "pairs.jsonl"),
        "pack_tokens": 400,
    }
    values["train"] |= {"steps": 8, "global_batch": 4}
    values["optim"] = {"lr": 3e-3}
    values["dpo"] = {"beta": 0.5}
    file.write_text(json.dumps(values))
    return file


def pair(directory: Path, number: int) -> dict:
    """A question about pictures of one colour; right and wrong answers."""
    names = list(tiny_run.COLOURS)
    images = []
    for count in range(number % 3):
        images.append(f"pair{number}-{count}.png")
        colour = tiny_run.COLOURS[names[(number + count) % 3]]
        Image.new("RGB", (28 + 28 * (number % 2), 56), colour).save(directory / images[-1])
    question = "<image>" * len(images) + f"{number}: which colour?"
    return {
        "messages": [{"role": "user", "content": question}],
        "chosen": {"role": "assistant", "content": names[number % 3]},
        "rejected": {"role": "assistant", "content": "no idea " * (1 + number % 2)},
        "images": images,
    }


def rows(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row.get("loss") is not None]


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(run)])


KINDS = {"full": [], "lora": ["lora.rank=4", "lora.targets=[language,vision]", "optim.lr=3e-2"]}
kinds = pytest.mark.parametrize("kind", list(KINDS))


@pytest.mark.parametrize("name", ["rewards/margins", "eval_rewards/margins"])
def test_names_that_the_objective_has_written_are_not_a_callback_s(recipe, tmp_path, name):
    class Logs(Callback):
        def on_eval(self, run, row):
            run.log({name: 1.0})

    given = [f"train.output_dir={tmp_path}/run", "train.steps=1"]
    with pytest.raises(ConfigError, match=f"a callback logs '{name}', which the trainer itself writes"):
        train(recipe, given, backend=load_backend("torch_npu", "cpu"), callbacks=[Logs()])


@kinds
def test_a_run_learns_the_preference(recipe, be, tmp_path, kind, capsys):
    result = train(recipe, [f"train.output_dir={tmp_path}/run", *KINDS[kind]], backend=be)
    logged = rows(result.run_dir)
    assert len(logged) == 8
    first, last = logged[0], logged[-1]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert all(set(LOGGED) <= row.keys() for row in logged)
    assert last["loss"] < 0.6 * first["loss"]
    assert last["rewards/margins"] > 0.5 and last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], rel=1e-4)
    evaluated = [row for row in read_metrics(result.run_dir) if "eval_loss" in row][-1]
    assert evaluated["eval_loss"] == result.eval_loss < 0.6 * np.log(2)
    assert evaluated["eval_rewards/accuracies"] == 1.0
    shown = capsys.readouterr().out
    assert "  accuracy 100%  margin " in shown
    assert f"eval_loss {result.eval_loss:.4f}  over 12 pairs\n" in shown


@kinds
def test_both_backends_follow_one_curve_and_resume_each_other(recipe, tmp_path, kind):
    """Eight steps on one, four on one and four on the other: the reference is the same after each resume."""
    for framework in ("torch", "mindspore"):
        pytest.importorskip(framework)
    options = ["data.val=null", "checkpoint.every=4", "checkpoint.keep_last=null", *KINDS[kind]]
    curves = {}
    for name in ("torch_npu", "mindspore"):
        run = tmp_path / name
        train(recipe, [*options, f"train.output_dir={run}"], backend=load_backend(name, device="cpu"))
        curves[name] = losses(run)
    apart = np.abs(curves["torch_npu"] / curves["mindspore"] - 1)
    assert apart[0] <= FIRST and apart.max() <= ALONG
    for name, other in (("torch_npu", "mindspore"), ("mindspore", "torch_npu")):
        run = tmp_path / f"{name} to {other}"
        backend = load_backend(other, device="cpu")
        train(recipe, [*options, f"train.output_dir={run}"], backend=backend, resume=f"{tmp_path / name}@4")
        found = losses(run)
        assert (found[:4] == curves[name][:4]).all()
        assert np.abs(found / curves[name] - 1).max() <= ALONG


@kinds
def test_a_resumed_run_ends_in_the_bits_of_one_in_a_piece(recipe, tmp_path, kind):
    """On torch; a reference taken from the checkpoint would show at once, as its gap is none."""
    pytest.importorskip("torch")
    backend = load_backend("torch_npu", device="cpu")
    options = ["data.val=null", "checkpoint.every=4", "checkpoint.keep_last=null", *KINDS[kind]]
    whole = train(recipe, [*options, f"train.output_dir={tmp_path}/whole"], backend=backend)
    again = train(
        recipe, [*options, f"train.output_dir={tmp_path}/again"], backend=backend, resume=f"{whole.run_dir}@4"
    )
    assert (losses(again.run_dir) == losses(whole.run_dir)).all()


def test_a_cached_reference_gives_the_same_run(recipe, be, tmp_path, capsys):
    """One pair in a micro-batch here as there, so on torch to the bit; then again, and resumed, without the reference:
    nothing is computed a second time."""
    options = ["data.pack=false", "data.val=null", "checkpoint.every=4", "checkpoint.keep_last=null"]
    plain = train(recipe, [*options, f"train.output_dir={tmp_path}/plain"], backend=be)
    cached = [*options, f"dpo.cache={tmp_path}/cache"]
    first = train(recipe, [*cached, f"train.output_dir={tmp_path}/first"], backend=be)
    assert "reference: pair 12/12" in capsys.readouterr().out
    (file,) = (tmp_path / "cache").glob("*.logps")
    assert file.stat().st_size == 28 * 13
    resumed = train(recipe, [*cached, f"train.output_dir={tmp_path}/resumed"], backend=be, resume=f"{first.run_dir}@4")
    assert "reference: pair" not in capsys.readouterr().out
    assert file.stat().st_size == 28 * 13
    for found in (first, resumed):
        if be.capabilities.bitwise_repeatable:
            assert (losses(found.run_dir) == losses(plain.run_dir)).all()
        else:
            np.testing.assert_allclose(losses(found.run_dir), losses(plain.run_dir), rtol=1e-3)


KILLED = """
import os, sys
from itertools import chain
from duetvl.core.backend import load_backend
from duetvl.training.feed import Feed
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback

recipe, run, cache = sys.argv[1:]
everything = Feed.everything

def cut_short(self):
    for number, batch in enumerate(chain.from_iterable(everything(self))):
        if number == 5:
            os.kill(os.getpid(), 9)
        yield (batch,)

Feed.everything = cut_short
options = ["train.global_batch=1", "data.val=null", f"train.output_dir={run}", f"dpo.cache={cache}"]
train(recipe, options, backend=load_backend("torch_npu", device="cpu"))
"""


def test_a_killed_pass_over_the_pairs_goes_on(recipe, tmp_path):
    pytest.importorskip("torch")
    arguments = [str(recipe), str(tmp_path / "killed"), str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".lock"]  # which goes with the next start
    (file,) = (tmp_path / "cache").iterdir()
    kept = file.read_bytes()
    assert len(kept) == 28 * 6
    backend = load_backend("torch_npu", device="cpu")
    options = ["data.pack=false", "data.val=null"]
    found = train(
        recipe, [*options, f"dpo.cache={tmp_path}/cache", f"train.output_dir={tmp_path}/killed"], backend=backend
    )
    assert file.read_bytes()[: len(kept)] == kept and file.stat().st_size == 28 * 13
    plain = train(recipe, [*options, f"train.output_dir={tmp_path}/plain"], backend=backend)
    assert np.abs(losses(found.run_dir) / losses(plain.run_dir) - 1).max() < 1e-6


def test_a_cache_follows_its_data(recipe, tmp_path):
    """A picture that is changed behind its back is named, and the next start computes what is missing; packed, with
    LoRA, evaluated, encoded by processes."""
    pytest.importorskip("torch")
    for name in ("pairs.jsonl", *(path.name for path in recipe.parent.glob("pair*.png"))):
        shutil.copy(recipe.parent / name, tmp_path)
    data = [f"data.train={tmp_path}/pairs.jsonl", f"data.val={tmp_path}/pairs.jsonl", "data.workers=1"]
    options = [*data, *KINDS["lora"], f"dpo.cache={tmp_path}/cache", "train.steps=3"]
    backend = load_backend("torch_npu", device="cpu")
    plain = train(
        recipe, [*data, *KINDS["lora"], "train.steps=3", f"train.output_dir={tmp_path}/plain"], backend=backend
    )
    found = train(recipe, [*options, f"train.output_dir={tmp_path}/one"], backend=backend)
    np.testing.assert_allclose(losses(found.run_dir), losses(plain.run_dir), rtol=1e-3)
    assert found.eval_loss == pytest.approx(plain.eval_loss, rel=1e-3)
    for picture in tmp_path.glob("pair*-0.png"):
        Image.new("RGB", Image.open(picture).size, (90, 90, 90)).save(picture)
    with pytest.raises(DataError, match=r"sample pairs\.jsonl:\d+: its log-probabilities are not in .*start again"):
        train(recipe, [*options, f"train.output_dir={tmp_path}/two"], backend=backend)
    (file,) = (tmp_path / "cache").glob("*.logps")
    before = file.stat().st_size
    train(recipe, [*options, f"train.output_dir={tmp_path}/two"], backend=backend)
    assert file.stat().st_size == before + 28 * 8  # the eight pairs that have a picture


def test_records_without_a_rejected_answer_are_named(recipe, be, tmp_path):
    data = tmp_path / "mixed.jsonl"
    good = json.dumps(pair(tmp_path, 0))
    plain = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    data.write_text(f"{good}\n{plain}\n")
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: has no rejected answer, which dpo needs"):
        train(recipe, [f"data.train={data}", "data.val=null", f"train.output_dir={tmp_path}/run"], backend=be)
    assert not (tmp_path / "run").exists()


def test_pairs_without_the_section_are_named(recipe, be, tmp_path):
    values = json.loads(recipe.read_text())
    del values["dpo"]
    options = ["data.val=null", f"train.output_dir={tmp_path}/run"]
    with pytest.raises(DataError, match=r"pairs\.jsonl:\d+: is a preference record .*no section dpo"):
        train(values, options, backend=be)


def test_a_reference_that_has_changed_is_noticed(recipe, tmp_path):
    """Wherever it lies: its weights are what counts."""
    be = load_backend("torch_npu", "cpu")
    own = [f"train.output_dir={tmp_path}/run"]
    model = Path(json.loads(recipe.read_text())["model"]["path"])
    train(recipe, [*own, "train.steps=2"], backend=be)
    shutil.copytree(model, tmp_path / "copy")
    assert train(recipe, [*own, "train.steps=3", f"dpo.reference={tmp_path}/copy"], backend=be).step == 3
    other = load_model(model, backend=be)
    norm = other.parameters["model.norm.weight"]
    be.ops.assign(norm.tensor, be.ops.from_numpy(np.full(norm.shape, 2, np.float32)))
    save_model(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="its policy was compared with other weights than those of"):
        train(recipe, [*own, "train.steps=4", f"dpo.reference={tmp_path}/other"], backend=be)


def test_check_says_what_the_reference_is(recipe, tiny, tmp_path):
    def line(*overrides):
        (found,) = [text for text in check(recipe, overrides) if text.startswith("dpo: ")]
        return found

    assert line() == "dpo: loss sigmoid, beta 0.5; reference: a second copy of model.path"
    assert line("dpo.loss=ipo", "lora.rank=4").endswith("loss ipo, beta 0.5; reference: the model without its adapter")
    assert line("dpo.cache=kept").endswith("reference: model.path, run once and kept in kept")
    with pytest.raises(ConfigError, match=r"qwen2-tied has other ids for pictures and videos and another clock"):
        line(f"dpo.reference={tiny.directory('qwen2-tied')}")
    with pytest.raises(CheckpointError, match=r"nowhere"):
        line(f"dpo.reference={tmp_path}/nowhere")
