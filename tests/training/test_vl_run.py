"""Fine-tuning a tiny Qwen2.5-VL on text, pictures and videos: both backends along one curve, and after a kill.

Differences measured on x86 CPU: over 50 steps the curves of torch and MindSpore are at most 7e-6 apart, relatively,
and 4e-7 at the first step. On torch a run that was killed ends in the bits of one that was not. MindSpore's exp is
not repeatable to the last bit, so there the restored state is compared in bits and the rest of the run within 1e-4.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny_run
from PIL import Image, ImageDraw

from duetvl.core.backend import Backend, load_backend
from duetvl.models.qwen_vl.loading import load_model
from duetvl.storage.finding import find_checkpoint
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.checkpoints.checkpoint import load_checkpoint
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.step import Trainer
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

FIRST = 2e-6  # relative difference of the first losses, which see the same weights; the issue asks for 1e-5
ALONG = 1e-4  # at every later step; the issue asks for 1e-3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The tiny model with 24 records: text, a picture, two pictures, a video, a picture and a video."""
    directory = tmp_path_factory.mktemp("vl")
    file = tiny_run.write_recipe(directory)
    with open(directory / "data.jsonl", "a", encoding="utf-8") as lines:
        for number in range(12):
            lines.write(json.dumps(record(directory, number)) + "\n")
    values = json.loads(file.read_text())
    values["data"] |= {"pack_tokens": 380}
    values["train"] |= {"steps": 20, "global_batch": 4}
    values["optim"] = {"lr": 5e-3, "warmup": 0.1, "weight_decay": 0.05}
    values["checkpoint"] = {"every": 10, "keep_last": None}
    file.write_text(json.dumps(values))
    return file


def record(directory: Path, number: int) -> dict:
    """A disc that grows from frame to frame, and stills of it."""
    frames = []
    for size in range(4):
        picture = Image.new("RGB", (56 + 28 * (number % 3), 84), (30 * size, 90, 20 * number))
        ImageDraw.Draw(picture).ellipse((5, 5, 15 + 10 * size, 15 + 10 * size), fill="white")
        frames.append(f"disc{number}-{size}.png")
        picture.save(directory / frames[-1])
    images, videos = [(frames[:2], []), ([], [frames]), (frames[1:2], [frames[:3]])][number % 3]
    question = "<image>" * len(images) + "<video>" * len(videos) + "how large?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ["small", "big"][number % 2]}]
    return {"messages": messages, "images": images, "videos": videos}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def apart(one: list[float], other: list[float]) -> np.ndarray:
    """Relative difference of each step."""
    assert len(one) == len(other)
    return np.abs(np.array(one) / np.array(other) - 1)


def backends() -> list[Backend]:
    for framework in ("torch", "mindspore"):
        pytest.importorskip(framework)
    return [load_backend(name, device="cpu") for name in ("torch_npu", "mindspore")]


def test_both_backends_follow_one_curve(recipe, tmp_path):
    curves = []
    for be in backends():
        options = ["train.steps=50", "checkpoint.every=null", "data.val=null", f"train.output_dir={tmp_path}/{be.name}"]
        curves.append(losses(train(recipe, options, backend=be).run_dir))
    difference = apart(*curves)
    assert len(difference) == 50
    assert curves[0][-1] < 0.5 * curves[0][0]  # it learns: the curve is not flat
    assert difference[0] <= FIRST
    assert difference.max() <= ALONG


# -- a kill -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
import numpy as np
from duetvl.core.backend import load_backend
from duetvl.training.watching.callbacks import Callback
from duetvl.training.train import train
from test_vl_run import state_of

name, recipe, run, kept = sys.argv[1:]

class Watch(Callback):
    def on_save(self, run, path):
        np.savez(kept, **state_of(run.trainer))

    def on_step(self, run, row):
        if run.step == 13:
            os.kill(os.getpid(), 9)

train(recipe, [f"train.output_dir={run}"], backend=load_backend(name, device="cpu"), callbacks=[Watch()])
"""


def state_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Weights, moments and counts, as they are in memory."""

    def array(tensor):
        return np.array(trainer.backend.to_numpy(tensor))

    found = {f"weight/{path}": array(p.tensor) for path, p in trainer.model.parameters.items()}
    for kind, tensors in trainer.state.slots().items():
        found |= {f"{kind}/{path}": array(tensor) for path, tensor in tensors.items()}
    return found | {f"step/{path}": np.array(count) for path, count in trainer.state.step.items()}


class Killed(NamedTuple):
    """A run that was killed in its 14th step of 20, and what was in memory when it saved the 10th."""

    be: Backend
    run: Path
    state: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def killed(be, recipe, tmp_path_factory) -> Killed:
    directory = tmp_path_factory.mktemp("killed")
    run, kept = directory / "run", directory / "state.npz"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if "torch" in sys.modules:  # sums over other numbers of threads round otherwise
        place["OMP_NUM_THREADS"] = str(sys.modules["torch"].get_num_threads())
    arguments = [be.name, str(recipe), str(run), str(kept)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=place, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(losses(run)) == 13
    with np.load(kept) as stored:
        return Killed(be, run, dict(stored))


@pytest.fixture(scope="module")
def straight(be, recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    return train(recipe, [f"train.output_dir={run}"], backend=be).run_dir


def stored_tensors(run: Path) -> dict[str, bytes]:
    files = [TensorFile(path) for path in sorted(find_checkpoint(run).path.glob("*.safetensors"))]
    return {f"{number}/{name}": file.view(name).tobytes() for number, file in enumerate(files) for name in file.specs}


def test_the_restored_state_is_what_was_in_memory(killed, recipe):
    """Bit for bit, on both backends."""
    model = load_model(load_recipe(recipe).model.path, backend=killed.be)
    trainer = Trainer(model, TokenLoss(killed.be.ops), killed.be, load_recipe(recipe).optim)
    ref = find_checkpoint(killed.run)
    assert ref.step == 10
    options = {"parameters": model.parameters.values(), "optimizer_state": trainer.state, "backend": killed.be}
    load_checkpoint(ref, **options)
    found = state_of(trainer)
    assert found.keys() == killed.state.keys()
    assert {key.partition("/")[0] for key in found} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    for key, expected in killed.state.items():
        assert found[key].tobytes() == expected.tobytes(), key
    assert {count.item() for key, count in found.items() if key.startswith("step/")} == {10}


def test_twenty_are_ten_and_a_kill_and_ten(killed, straight, recipe):
    train(recipe, [f"train.output_dir={killed.run}"], backend=killed.be)
    assert [row["step"] for row in read_metrics(killed.run) if "loss" in row] == list(range(1, 21))
    if killed.be.capabilities.bitwise_repeatable:
        assert losses(killed.run) == losses(straight)
        assert stored_tensors(killed.run) == stored_tensors(straight)
        assert read_metrics(killed.run)[-1]["eval_loss"] == read_metrics(straight)[-1]["eval_loss"]
    else:
        assert apart(losses(killed.run), losses(straight)).max() <= 1e-4


def test_the_other_backend_goes_on(killed, straight, recipe, tmp_path):
    other = next(be for be in backends() if be.name != killed.be.name)
    options = [f"train.output_dir={tmp_path}/on"]
    train(recipe, options, backend=other, resume=f"{killed.run}@10")
    assert losses(tmp_path / "on")[:10] == losses(killed.run)[:10]
    assert apart(losses(tmp_path / "on"), losses(straight)).max() <= ALONG
