"""What users run, small: training of each kind on mixed packed data, answers, an evaluation; and what must be alike."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run
from conformance.tolerances import TOLERANCES
from evaluation import miniatures
from PIL import Image

from duetvl.cli import main
from duetvl.core.backend import Backend
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

STEPS = 5
TOKENS = 32
STD = 0.2  # of the weights: smaller ones make attention a mean, whoever may attend to whom
DPO = ["dpo.beta=0.1", "data.pack_tokens=400", "optim.lr=2e-4"]
# Where a block is computed again torch asks torch_npu for its autocast, which starts the device that stubs do not have.
RECOMPUTE = "none" if os.environ.get("DUETVL_REAL_TORCH_NPU") else "full"
KINDS = {
    "sft": [f"train.recompute={RECOMPUTE}"],
    "lora": ["lora.rank=4", "lora.dropout=0.1", "lora.targets=[language,vision]", "optim.lr=4e-3"],
    "dpo": DPO,
    "dpo of adapters": [*DPO, "lora.rank=4", "lora.targets=[language,vision,projector]", "optim.lr=4e-3"],
}

NEAR = 0.06  # of log-probabilities by float16, of logits of about 10; measured: at most 0.02, half of them 0.003


@dataclass(frozen=True)
class Here:
    """Models, records and pairs in a directory."""

    directory: Path
    benchmark: Path

    @classmethod
    def written(cls, directory: Path) -> Here:
        """Records of text, of pictures of several sizes, and of videos; pairs with none to two pictures."""
        tiny_run.write_data(directory)
        records, videos = _records(directory), [_video(directory, number) for number in range(4)]
        mixed = [*records, *videos]
        pairs = [_pair(record, number) for number, record in enumerate(mixed)]
        for name, data in (("data", mixed), ("pairs", pairs)):
            _write(directory / f"{name}.jsonl", data)
            _write(directory / f"{name}_val.jsonl", data[::5])
        for family in tiny_run.FAMILIES:
            tiny_run.write_model(directory / family, STD, family)
            wide = {"type": "mrope", "mrope_section": [8, 12, 12]}
            sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": wide}
            tiny_run.write_model(directory / f"{family}_heads_of_64", STD, family, **sizes)
        # A question of more than a block of the cache, and one that begins with it and finds that block.
        long = [{"messages": [{"role": "user", "content": "say hello " * 15 + end}]} for end in ("", "and bye")]
        questions = [long[0], records[0], *records[4:6], *videos[:2], long[1]]
        _write(directory / "questions.jsonl", [{**q, "messages": q["messages"][:1]} for q in questions])
        return cls(directory, miniatures.ai2d(directory))

    def curve(self, backend: Backend, kind: str, family: str, dtype: str, output: Path, *more: str) -> np.ndarray:
        """(STEPS + 1, 2): loss and gradient norm of each step, and the loss of the evaluation twice."""
        data = "pairs" if "dpo" in kind else "data"
        recipe = {
            "model": {"path": str(self.directory / family), "dtype": dtype, "freeze": []},
            "data": {
                "train": str(self.directory / f"{data}.jsonl"),
                "val": str(self.directory / f"{data}_val.jsonl"),
                "pack_tokens": 300,
            },
            "train": {"output_dir": str(output), "global_batch": 4, "steps": STEPS},
            "optim": {"lr": 1e-3, "eps": 1e-5},
            "checkpoint": {"every": None, "export": False},
            "log": {"tensorboard": False, "plot": False},
        }
        rows = read_metrics(train(recipe, [*KINDS[kind], *more], backend=backend).run_dir)
        steps = [[row["loss"], row["grad_norm"]] for row in rows if "loss" in row]
        evaluated = [[row["eval_loss"]] * 2 for row in rows if "eval_loss" in row]
        return np.array([*steps, *evaluated], np.float64)  # a norm that overflows is logged as None: nan

    def answers(self, backend: str, family: str, output: Path) -> list[dict[str, Any]]:
        """`duetvl infer`: TOKENS to each of seven questions, of text, with pictures, with videos, four at once."""
        self.run("infer", backend, family, "-o", str(output), "--input", str(self.directory / "questions.jsonl"),
                 "--max-new-tokens", str(TOKENS), "--ignore-eos", "--logprobs", "1",
                 "--max-sequences", "4")  # fmt: skip
        return [json.loads(line) for line in output.read_text().splitlines()]

    def evaluated(self, backend: str, family: str, output: Path) -> list[str]:
        """`duetvl eval` on the first eight questions of a small AI2D: the answers."""
        self.run("eval", backend, family, "-o", str(output), "--task", "ai2d_test", "--data", str(self.benchmark),
                 "--limit", "8", "--max-new-tokens", "4")  # fmt: skip
        rows = (output / "answers.jsonl").read_text().splitlines()
        return [json.loads(row)["text"] for row in rows]

    def run(self, command: str, backend: str, family: str, *words: str) -> None:
        """A command on the model with heads of 64, the smallest that the paged kernels take, in float16."""
        model = str(self.directory / f"{family}_heads_of_64")
        given = [command, model, "--backend", backend, "--device", "cpu", "--dtype", "float16"]
        assert main([*given, "--cache-tokens", "4096", *words]) == 0


def assert_alike(curve: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Of as many steps, each number as near as the table says of attention: 8e-6 in float32, 9 roundings in halves.

    Measured: 4e-7 in float32, 1.2e-2 in bfloat16, 1.3e-3 in float16.
    """
    assert curve.shape == expected.shape == (STEPS + 1, 2)
    np.testing.assert_allclose(curve, expected, rtol=TOLERANCES["attention"].of(dtype))


def assert_same_tokens(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same log-probabilities up to the first token that is another, which must be as likely, within `NEAR`."""
    assert len(answers) == len(expected) == 7
    same = 0
    for answer, other in zip(answers, expected, strict=True):
        assert len(answer["logprobs"]) == len(other["logprobs"]) == TOKENS
        for ours, theirs in zip(answer["logprobs"], other["logprobs"], strict=True):
            assert abs(ours["logprob"] - theirs["logprob"]) <= NEAR
            if ours["id"] != theirs["id"]:
                break
            same += 1
    assert same > 0.8 * TOKENS * len(answers)


def _records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "data.jsonl").read_text().splitlines()]


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _video(directory: Path, number: int) -> dict[str, Any]:
    """Frames that grow lighter; every other record has a picture too."""
    frames = []
    for light in range(4):
        frames.append(f"frame{number}-{light}.png")
        Image.new("RGB", (56 + 28 * (number % 2), 56), (60 * light, 90, 50 * number)).save(directory / frames[-1])
    images = frames[:1] if number % 2 else []
    question = "<image>" * len(images) + "<video>how light?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "lighter"}]
    return {"messages": messages, "images": images, "videos": [frames]}


def _pair(record: dict[str, Any], number: int) -> dict[str, Any]:
    question, right = record["messages"]
    wrong = {"role": "assistant", "content": "no idea " * (1 + number % 2)}
    return {**record, "messages": [question], "chosen": right, "rejected": wrong}
