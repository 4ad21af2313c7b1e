"""What is told of a run: answers, traces, costs, trackers; and checkpoints made into model directories."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from test_metrics import row

import duetvl
from duetvl.answers import SampleAnswers, prompt_of
from duetvl.cli import main
from duetvl.core.batch import Sample
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.cost_model.devices import peak_flops
from duetvl.models.qwen_vl.loading import load_model
from duetvl.storage.finding import find_checkpoint
from duetvl.training.checkpoints.export import export_run
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.train import train
from duetvl.training.watching import forecast, trackers
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import MetricsLog, read_metrics, read_rows
from duetvl.training.watching.trackers import Guarded, TensorBoard, run_id


@pytest.fixture
def recipe(tmp_path) -> Path:
    return tiny_run.write_recipe(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps on torch, with a checkpoint after each second."""
    directory = tmp_path_factory.mktemp("finished")
    be = duetvl.load_backend("torch_npu", "cpu")
    options = ["checkpoint.every=2", "checkpoint.export=true", "data.val=null"]
    return duetvl.train(tiny_run.write_recipe(directory), options, backend=be).run_dir


# -- answers ----------------------------------------------------------------------------------------------------------


def events(directory: Path) -> dict[str, list]:
    """Tag -> values of all event files, in the order of time."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: dict[str, list] = {}
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                text = value.tensor.string_val[0].decode() if value.tensor.string_val else value.simple_value
                found.setdefault(value.tag, []).append((event.step, text))
            data = data[16 + length :]
    return found


def test_validation_samples_are_answered_as_the_model_then_answers(be, recipe):
    options = ["log.generate=2", "log.generate_tokens=5", "train.eval_every=2", "log.tensorboard=true"]
    result = duetvl.train(recipe, [*options, "checkpoint.export=true"], backend=be)
    rows = read_rows(result.run_dir / "samples.jsonl")
    assert [(r["step"], r["sample"]) for r in rows] == [(s, f"data.jsonl:{n}") for s in (2, 4) for n in (1, 2)]
    assert [r["expected"] for r in rows[2:]] == ["hello\n", "green\n"]
    assert "say hello" in rows[2]["prompt"]
    assert "hello" not in rows[2]["prompt"].replace("say hello", "")

    model = duetvl.load_model(result.run_dir / "export", backend=be)
    messages = [{"role": "user", "content": "say hello"}]
    assert model.generate(messages, max_new_tokens=5).text == rows[2]["answer"]
    told = events(result.run_dir / "tensorboard")
    texts = told["answers/data.jsonl:1/text_summary"]
    assert [step for step, _ in texts] == [2, 4]
    assert texts[1][1].startswith(rows[2]["answer"])


def test_a_signal_ends_the_answers(recipe, capsys):
    class Signal(Callback):
        def on_eval(self, run, row):
            os.kill(os.getpid(), signal.SIGTERM)

    be = duetvl.load_backend("torch_npu", "cpu")
    options = ["log.generate=1", "train.eval_every=2"]
    result = train(recipe, options, backend=be, callbacks=[Signal(), SampleAnswers()])
    assert (result.step, result.stopped_by) == (2, signal.SIGTERM)
    assert "validation samples are not answered" in capsys.readouterr().out
    assert result.checkpoint.name == "step-0000002"
    assert not (result.run_dir / "samples.jsonl").exists()


def test_answers_after_the_checkpoint_are_forgotten_on_resuming(recipe):
    be = duetvl.load_backend("torch_npu", "cpu")
    options = ["log.generate=1", "log.generate_tokens=2", "train.eval_every=1", "checkpoint.every=2"]
    duetvl.train(recipe, options, backend=be)
    result = duetvl.train(recipe, options, backend=be, resume="@2")
    assert [r["step"] for r in read_rows(result.run_dir / "samples.jsonl")] == [1, 2, 3, 4]


def test_a_prompt_ends_before_the_last_answer():
    labels = np.array([-100, 5, 6, -100, -100, 7, 8])
    assert len(prompt_of(Sample(np.arange(7), labels))) == 5
    assert len(prompt_of(Sample(np.arange(7), None))) == 7
    assert len(prompt_of(Sample(np.arange(3), np.array([4, 5, 6])))) == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.val=null", "log.generate 2 needs data.val"),
        ("data.train_on_prompt=true", "cannot tell where an answer begins"),
        ("log.profile=[3, 2]", r"log.profile: found \[3, 2\], allowed: \[first, last\]"),
    ],
)
def test_what_cannot_be_shown_is_refused(recipe, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_recipe(recipe, ["log.generate=2", override])


# -- costs ------------------------------------------------------------------------------------------------------------


def test_utilisation_is_shown_where_the_peak_is_known_or_stated(be, recipe):
    rows = read_metrics(duetvl.train(recipe, ["train.steps=2", "data.val=null"], backend=be).run_dir)
    assert "mfu" not in rows[0]
    assert all(0 <= r["data_wait"] < 1 and r["tokens_per_s"] * r["step_s"] == pytest.approx(r["tokens"]) for r in rows)
    assert [r["total_tokens"] for r in rows] == np.cumsum([r["tokens"] for r in rows]).tolist()
    options = ["train.steps=3", "data.val=null", "log.peak_tflops=0.001"]
    stated = read_metrics(duetvl.train(recipe, options, backend=be).run_dir)
    assert stated[-1]["mfu"] > 0
    assert stated[-1]["total_tokens"] == sum(r["tokens"] for r in stated)  # goes on where the checkpoint was


def test_what_a_step_was_expected_to_take_is_said_once(be, recipe, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "_LEAST", 0.0)  # of so small a model nothing would be said
    options = ["train.steps=14", "checkpoint.every=null", "data.val=null", "train.eval_every=null", "eval.tasks={}"]
    rows = read_metrics(duetvl.train(recipe, options, backend=be).run_dir)
    said = re.findall(r"^a step was expected .*$", capsys.readouterr().out, re.MULTILINE)
    seen = r"\(median of steps 3 to 10, data apart\)"
    numbers = re.fullmatch(
        rf"a step was expected to take (\S+) s and takes (\S+) s, (\S+) times as long {seen}", said[0]
    )
    took = np.median([row["step_s"] * (1 - row["data_wait"]) for row in rows[2:10]])
    assert len(said) == 1 and float(numbers[2]) == pytest.approx(took, rel=0.01)
    assert float(numbers[3]) == pytest.approx(float(numbers[2]) / float(numbers[1]), rel=0.02)


@pytest.mark.parametrize(
    ("product", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 66.9e12),
        ("NVIDIA A100-SXM4-80GB", "float16", 312e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312e12),
        ("Ascend910B3", "bfloat16", 294.912e12),
        ("Ascend910_9392", "float16", 353.8944e12),
        ("Ascend910B3", "float32", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("", "float32", None),
    ],
)
def test_peaks_by_the_name_that_a_driver_gives(product, dtype, expected):
    assert peak_flops(product, dtype) == pytest.approx(expected)


def test_a_trace_of_the_steps_asked_for(be, recipe, capsys):
    run = duetvl.train(recipe, ["log.profile=[2, 3]", "data.val=null"], backend=be).run_dir
    assert "the trace of steps [2, 3] is in" in capsys.readouterr().out
    assert any(file.stat().st_size > 1000 for file in (run / "profile").rglob("*.json"))


def test_a_trace_whose_last_step_is_never_reached_is_closed(recipe):
    be = duetvl.load_backend("torch_npu", "cpu")
    options = ["log.profile=[2, 99]", "train.steps=2", "data.val=null"]
    run = duetvl.train(recipe, options, backend=be).run_dir
    (file,) = (run / "profile").rglob("*.json")
    assert json.loads(file.read_text())["traceEvents"]


# -- trackers ---------------------------------------------------------------------------------------------------------


class Notebook:
    """A tracker of our own."""

    name = "notebook"

    def __init__(self, broken_at=None):
        self.rows, self.texts, self.closed, self.broken_at = [], [], 0, broken_at

    def write(self, row):
        if row["step"] == self.broken_at:
            raise ConnectionError("no network")
        self.rows.append(dict(row))

    def write_texts(self, step, rows):
        self.texts.append((step, list(rows)))

    def close(self):
        self.closed += 1


def test_a_tracker_gets_finite_numbers_alone(tmp_path):
    book = Notebook()
    log = MetricsLog(tmp_path, trackers=[book])
    log.write(row(1) | {"loss": float("nan"), "note": "text"})
    log.write_answers(1, [{"sample": "a", "prompt": "p", "answer": "b", "expected": "c"}])
    log.close()
    assert book.rows == [{key: value for key, value in row(1).items() if key != "loss"}]
    assert book.texts == [(1, [{"sample": "a", "prompt": "p", "answer": "b", "expected": "c"}])]
    assert book.closed == 1


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(tmp_path):
    said = []
    books = [Notebook(broken_at=2), Notebook()]
    log = MetricsLog(tmp_path, trackers=books, say=said.append)
    for step in (1, 2, 3):
        log.write(row(step))
    log.close()
    assert said == ["warning: notebook gets no further data of this run: ConnectionError: no network"]
    assert [len(book.rows) for book in books] == [1, 3]
    assert len(read_metrics(tmp_path)) == 3


def test_curves_of_tensorboard_go_on_in_a_file_of_their_own(tmp_path):
    for after, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path, after)
        for step in steps:
            board.write({"step": step, "loss": 1 / step, "eval_loss": 2.0})
        board.close()
    told = events(tmp_path)
    assert [step for step, _ in told["train/loss"]] == [1, 2, 3, 3, 4]
    assert told["eval/loss"][0] == (1, 2.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_does_not_stop_tensorboard_from_being_told(tmp_path):
    """tensorboardX's own thread would die of this and the run then wait for it."""
    said, before = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    guarded = Guarded(TensorBoard(tmp_path), said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        for step in range(1, 40):
            guarded.call("write", {"step": step, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == ["warning: TensorBoard gets no further data of this run: OSError: [Errno 27] File too large"]


def test_a_run_keeps_its_id_with_a_tracker(tmp_path):
    first = run_id(tmp_path, "wandb")
    assert len(first) == 21
    assert run_id(tmp_path, "swanlab") != first
    assert run_id(tmp_path, "wandb") == first
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trackers\.json: cannot be read as JSON"):
        run_id(tmp_path, "wandb")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_missing_library_is_said_before_anything_is_loaded(recipe, name, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda library: None)
    with pytest.raises(
        ConfigError, match=rf"log.{name}: mine needs the library {name}, .*pip install 'duetvl\[{name}\]'"
    ):
        duetvl.train(recipe, [f"log.{name}=mine", "model.path=nowhere"])


@pytest.mark.parametrize(("name", "mode"), [("wandb", "WANDB_MODE"), ("swanlab", "SWANLAB_MODE")])
def test_a_real_library_takes_a_run_and_its_continuation(recipe, monkeypatch, capsys, name, mode):
    pytest.importorskip(name)
    monkeypatch.setenv(mode, "offline")
    be = duetvl.load_backend("torch_npu", "cpu")
    options = [f"log.{name}=mine", "log.generate=1", "log.generate_tokens=2", "optim.schedule=constant"]
    duetvl.train(recipe, [*options, "train.steps=2"], backend=be)
    run = duetvl.train(recipe, options, backend=be).run_dir
    assert list(json.loads((run / "trackers.json").read_text())) == [name]
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == [1, 2, 3, 4]
    assert "gets no further data" not in capsys.readouterr().out


def test_a_library_that_cannot_start_a_run_is_one_line(recipe, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    be = duetvl.load_backend("torch_npu", "cpu")
    with pytest.raises(ConfigError, match=r"log.wandb: wandb could not start a run: .*set WANDB_MODE=offline"):
        duetvl.train(recipe, ["log.wandb=no/such#name"], backend=be)


# -- checkpoints for others -------------------------------------------------------------------------------------------


def test_any_checkpoint_is_exported_without_a_framework(finished, tmp_path, capsys):
    script = "import sys; from duetvl.cli import main; code = main(sys.argv[1:]);"
    script += "assert not {'torch', 'mindspore'} & set(sys.modules), 'a framework was loaded'; sys.exit(code)"
    command = [sys.executable, "-c", script, "export", f"{finished}@2", "-o", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"exported step 2 of {finished} to {tmp_path / 'two'}" in done.stdout
    assert main(["export", str(finished), "-o", str(tmp_path / "last")]) == 0
    same = {file.name: file.read_bytes() for file in (tmp_path / "last").iterdir()}
    assert same == {file.name: file.read_bytes() for file in (finished / "export").iterdir()}
    be = duetvl.load_backend("torch_npu", "cpu")
    two, last = (load_model(tmp_path / name, backend=be) for name in ("two", "last"))
    assert (be.to_numpy(two.parameters["model.norm.weight"].tensor) != 0).all()
    assert (two.parameters["model.norm.weight"].tensor != last.parameters["model.norm.weight"].tensor).any()


def test_an_export_never_overwrites_and_names_what_is_missing(finished, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    assert main(["export", str(finished), "-o", str(tmp_path / "there")]) == 2
    assert "there: exists already" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["mine.txt"]
    assert main(["export", f"{finished}@3", "-o", str(tmp_path / "new")]) == 2
    assert "has no checkpoint of step 3; there are 2, 4" in capsys.readouterr().err
    assert main(["export", "nowhere", "-o", str(tmp_path / "new")]) == 2
    assert "nowhere/checkpoints: has no checkpoint" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_an_export_takes_no_other_models_tokenizer(recipe, tmp_path, capsys):
    """The recipe's path may be relative, and lead to another model where the export is made, or to none."""
    run = duetvl.train(recipe, ["data.val=null"], backend=duetvl.load_backend("torch_npu", "cpu")).run_dir
    file = Path(find_checkpoint(run).meta.recipe["model"]["path"]) / "config.json"
    for content, found in (
        (json.dumps({**json.loads(file.read_text()), "vocab_size": 4096}), "is another model"),
        ("{}", "cannot be read ("),
    ):
        file.write_text(content)
        assert main(["export", str(run), "-o", str(tmp_path / found[:6])]) == 0
        said = capsys.readouterr().out
        assert f"warning: the run's model {str(file.parent)!r} {found}" in said
        assert "copy its tokenizer and settings yourself" in said
        assert sorted(one.name for one in (tmp_path / found[:6]).iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_checkpoint_is_not_exported_in_silence(recipe, tmp_path, capsys):
    be = duetvl.load_backend("torch_npu", "cpu")
    run = duetvl.train(recipe, ["checkpoint.every=2", "data.val=null"], backend=be).run_dir
    file = next((run / "checkpoints/step-0000004").glob("weights*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["export", str(run), "-o", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "step-0000004: is damaged: weights-00000-of-00001.safetensors does not match its checksum" in error
    assert f"give {run}@2 for the undamaged one of step 2" in error
    assert not (tmp_path / "new").exists()
    assert main(["export", f"{run}@2", "-o", str(tmp_path / "new")]) == 0
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        export_run(f"{run}@4", tmp_path / "four")
    assert not (tmp_path / "four").exists()


# -- plots ------------------------------------------------------------------------------------------------------------


def test_any_number_is_drawn_by_its_name(finished, tmp_path, capsys):
    target = tmp_path / "norms.png"
    assert (
        main(["plot", str(finished), str(finished), "--key", "grad_norm", "--key", "data_wait", "-o", str(target)]) == 0
    )
    assert target.stat().st_size > 10_000
    assert main(["plot", str(finished), "--key", "grad_nrm", "-o", str(tmp_path / "no.png")]) == 2
    assert "no run has a value 'grad_nrm' in its metrics; did you mean 'grad_norm'?" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_a_callback_of_the_api_sees_the_run(recipe):
    class Look(Callback):
        def on_start(self, run):
            self.seen = (run.step, run.total, run.recipe.train.steps, len(run.validation_samples(3)))
            self.names = set(run.model.parameters)

    look = Look()
    duetvl.train(recipe, backend=duetvl.load_backend("torch_npu", "cpu"), callbacks=[look])
    assert look.seen == (0, 4, 4, 3)
    assert "model.norm.weight" in look.names
    assert issubclass(duetvl.Callback, Callback)
