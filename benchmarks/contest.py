"""What the benchmarks of training steps share: the model, the samples, a process for every contender, the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], float]
Make = Callable[[Path, str], Step]  # (model directory, variant) -> one training step, which returns its loss

LR = 1e-5
LENGTHS = (48, 96, 160, 240, 320, 400, 520, 640)  # text tokens of the eight samples
PICTURES = ((), ((280, 280),), ((448, 336),), (), ((224, 224), (336, 336)), ((560, 420),), (), ((420, 420),))
IMAGE, START, END = 32765, 32762, 32763


def model_config() -> dict:
    """Qwen2.5-VL of about 100 million parameters."""
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "hidden_size": 640,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "image_token_id": IMAGE,
        "video_token_id": 32766,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "vision_config": {
            "depth": 8,
            "hidden_size": 320,
            "intermediate_size": 864,
            "num_heads": 4,
            "out_hidden_size": 640,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


def samples() -> list[dict]:
    """Eight conversations of mixed lengths, half of them with pictures; a third of the text is trained."""
    rng = np.random.default_rng(7)
    found = []
    for text, pictures in zip(LENGTHS, PICTURES, strict=True):
        grids = [(1, height // 14, width // 14) for height, width in pictures]
        head: list[int] = []
        for _, rows, columns in grids:
            head += [START] + [IMAGE] * (rows * columns // 4) + [END]
        words = rng.integers(10, 32000, text)
        ids = np.concatenate([np.array(head, np.int64), words])
        labels = ids.copy()
        labels[: len(head) + text - text // 3] = -100
        patches = sum(rows * columns for _, rows, columns in grids)
        found.append(
            {
                "input_ids": ids,
                "labels": labels,
                "pixel_values": rng.standard_normal((patches, 1176)).astype(np.float32) if grids else None,
                "image_grid_thw": np.array(grids, np.int64).reshape(-1, 3),
            }
        )
    return found


@dataclass(frozen=True)
class Contest:
    """Contenders by name, each made by a function and a variant of it; `note` says what a step works on."""

    file: str
    contenders: Mapping[str, tuple[Make, str]]
    note: str

    def main(self, doc: str) -> None:
        """Run every contender in a process of its own and print, or write, the table."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--repeats", type=int, default=5)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--only", nargs="*", default=list(self.contenders))
        parser.add_argument("--write", action="store_true")
        parser.add_argument("--inside", nargs=2, metavar=("DIRECTORY", "NAME"), help=argparse.SUPPRESS)
        chosen = parser.parse_args()
        if chosen.inside:
            directory, name = chosen.inside
            make, variant = self.contenders[name]
            print(json.dumps(measure(make(Path(directory), variant), chosen.repeats)))  # noqa: T201
            return
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory))
            found = {name: self._apart(directory + "/model", name, chosen) for name in chosen.only}
        report = self._table(found, chosen)
        print(report)  # noqa: T201
        if chosen.write:
            results = Path(self.file).parent / "results"
            results.mkdir(exist_ok=True)
            (results / f"{Path(self.file).stem}.md").write_text(report, encoding="utf-8")

    def _apart(self, directory: str, name: str, chosen: argparse.Namespace) -> dict[str, float]:
        """One contender in a fresh process with the chosen number of threads."""
        command = [sys.executable, self.file, "--repeats", str(chosen.repeats), "--inside", directory, name]
        limits = {"OMP_NUM_THREADS": str(chosen.threads), "MKL_NUM_THREADS": str(chosen.threads), "GLOG_v": "4"}
        done = subprocess.run(command, env={**os.environ, **limits}, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def _table(self, found: dict[str, dict[str, float]], chosen: argparse.Namespace) -> str:
        """The figures as markdown, with the machine and the command."""
        base = next(iter(found.values()))
        lines = [
            "| | s per step | ratio | peak MB above the loaded model | ratio | first loss | last loss |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, x in found.items():
            lines.append(
                f"| {name} | {x['seconds']:.2f} | {x['seconds'] / base['seconds']:.2f} | {x['peak'] / 1e6:.0f} "
                f"| {x['peak'] / base['peak']:.2f} | {x['first_loss']:.5f} | {x['last_loss']:.5f} |"
            )
        python = platform.python_version()
        lines += [
            "",
            f"{self.note}; float32; median of {chosen.repeats} steps after two.",
            f"{platform.machine()}, {os.cpu_count()} cores, {chosen.threads} threads, Python {python}.",
            f"Command: `python benchmarks/{Path(self.file).name} --repeats {chosen.repeats} --threads "
            f"{chosen.threads} --write`",
        ]
        return "\n".join(lines) + "\n"


def duetvl_sft(model: Any) -> Step:
    """One step on packed samples, as duetvl's trainer takes it."""
    import duetvl
    from duetvl.core.optimizer import ParameterGroup

    backend = model.backend
    groups = [ParameterGroup([p for p in model.parameters.values() if p.trainable])]
    state = backend.optimizer.create(groups)
    given = [duetvl.Sample(**sample) for sample in samples()]

    def step() -> float:
        batch = model.pack(given)
        loss, tape = model.forward_loss(batch)
        backend.autograd.backward(tape, [backend.ops.from_numpy(np.ones((), np.float32))])
        scale = 1.0 / batch.trained_tokens
        scale *= min(1.0, 1.0 / (backend.optimizer.grad_norm(groups[0].parameters) * scale + 1e-6))
        backend.optimizer.step(state, groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, grad_scale=scale)
        return float(backend.to_numpy(loss)) / batch.trained_tokens

    return step


def transformers_sft(model: Any, style: str) -> Step:
    """One step as users of transformers run it: one `padded` batch, or one sample at a time."""
    import torch

    model.train()
    optimizer = torch_adamw(model)
    given = samples()
    total = sum(int((sample["labels"][1:] != -100).sum()) for sample in given)
    batches = [given] if style == "padded" else [[sample] for sample in given]

    def step() -> float:
        loss_sum = 0.0
        for batch in batches:
            fed = {key: torch.from_numpy(value) for key, value in padded(batch).items()}
            loss = model(**fed, num_items_in_batch=torch.tensor(total), use_cache=False).loss
            loss.backward()
            loss_sum += loss.item()
        clipped_update(optimizer)
        return loss_sum

    return step


def torch_adamw(model: Any) -> Any:
    """torch's fused AdamW of what is trained."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)


def clipped_update(optimizer: Any) -> None:
    """Clip the gradients to a norm of 1, update, and drop them."""
    import torch

    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(step: Step, repeats: int) -> dict[str, float]:
    """Times of `repeats` steps after two for warming up, in this process, and its peak memory above the start."""
    ready = resident()
    losses = [step(), step()]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(times), "peak": peak - ready, "first_loss": losses[0], "last_loss": losses[-1]}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_model(directory: Path) -> None:
    """Random weights of the benchmark's model in the Hugging Face layout."""
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.loading import write_random_model

    write_random_model(ModelConfig.from_dict(model_config()), directory / "model", seed=0)


def padded(batch: list[dict]) -> dict[str, np.ndarray]:
    """Samples as transformers takes them: padded on the right to the longest."""
    longest = max(len(sample["input_ids"]) for sample in batch)
    shape = (len(batch), longest)
    ids, labels, mask = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
    for row, sample in enumerate(batch):
        length = len(sample["input_ids"])
        ids[row, :length], labels[row, :length], mask[row, :length] = sample["input_ids"], sample["labels"], 1
    fed = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    pixels = [sample["pixel_values"] for sample in batch if sample["pixel_values"] is not None]
    if pixels:
        fed["pixel_values"] = np.concatenate(pixels)
        fed["image_grid_thw"] = np.concatenate([sample["image_grid_thw"] for sample in batch])
    return fed
