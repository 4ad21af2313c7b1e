"""What the benchmarks of training steps share: the model, the samples, a process for every contender, the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import Limits, Row, Seconds, Side

Step = Callable[[], float]


@dataclass(frozen=True)
class Ready:
    """A training step, which returns its loss, and the operations that it asks for, where those are counted."""

    step: Step
    flops: float = 0.0


Make = Callable[[Path, str, Sequence[dict]], Ready]  # (model directory, variant, samples)

LR = 1e-5
QUICK = 4  # samples
LENGTHS = (48, 96, 160, 240, 320, 400, 520, 640)  # text tokens of the eight samples
PICTURES = ((), ((280, 280),), ((448, 336),), (), ((224, 224), (336, 336)), ((560, 420),), (), ((420, 420),))
IMAGE, START, END = 32765, 32762, 32763


def model_config(quick: bool = False) -> dict:
    """Qwen2.5-VL of about 100 million parameters; `quick`: with two layers of each kind."""
    if quick:
        whole = model_config()
        vision = whole["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
        return whole | {"num_hidden_layers": 2, "vision_config": vision}
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


def samples(quick: bool = False) -> list[dict]:
    """Eight conversations of mixed lengths, five of them with pictures; a third of the text is trained.

    `quick`: the first four.
    """
    rng = np.random.default_rng(7)
    found = []
    for text, pictures in list(zip(LENGTHS, PICTURES, strict=True))[: QUICK if quick else None]:
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


def size_of(examples: Sequence[dict]) -> str:
    """How many there are, and how long."""
    lengths = [len(example["input_ids"]) for example in examples]
    return f"{len(lengths)} samples of {sum(lengths)} tokens, longest {max(lengths)}"


@dataclass(frozen=True)
class Contender:
    """One that takes part, by a function and a variant of it. `side`: ours, and on which framework; None: another's.

    `needs` are the packages without which it cannot run.
    """

    make: Make
    variant: str
    side: Side | None = None
    needs: tuple[str, ...] = ()

    @property
    def takes_part(self) -> bool:
        """Whether what it needs is installed."""
        return harness.installed(*self.needs)


def ours(make: Make) -> dict[str, Contender]:
    """duetvl on both frameworks."""
    return {f"duetvl {side}": Contender(make, side, side, (side,)) for side in harness.SIDES}


@dataclass(frozen=True)
class Contest:
    """Contenders by name; `name` says what a step is, `describe` what it works on."""

    file: str
    name: str
    contenders: Mapping[str, Contender]
    describe: Callable[[Sequence[dict]], str]

    def main(self, doc: str) -> None:
        """Run every contender in a process of its own and print, or write, the table."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--repeats", type=int, default=5)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--only", nargs="*", default=list(self.contenders), choices=self.contenders)
        parser.add_argument("--quick", action="store_true", help="a smaller model and half of the samples")
        parser.add_argument("--write", action="store_true")
        parser.add_argument("--inside", nargs=2, metavar=("DIRECTORY", "NAME"), help=argparse.SUPPRESS)
        options = parser.parse_args()
        if options.inside:
            directory, name = options.inside
            contender = self.contenders[name]
            ready = contender.make(Path(directory), contender.variant, samples(options.quick))
            print(json.dumps(measure(ready, options.repeats)))  # noqa: T201
            return
        taken = self.measure(options.only, options.repeats, options.threads, options.quick)
        report = self._table(taken, options)
        print(report)  # noqa: T201
        if options.write:
            harness.write_page(self.file, report)

    def rows(self, quick: bool, limits: Limits) -> Iterator[Row]:
        """A row for each framework of ours that is installed."""
        taking_part = [name for name, contender in self.contenders.items() if contender.takes_part]
        taken = self.measure(taking_part, 3, 1, quick)
        by_name = {name: Seconds(figures["cpu"], figures["wall"]) for name, figures in taken.items()}
        theirs, other = harness.fastest({n: s for n, s in by_name.items() if self.contenders[n].side is None})
        work = self._work(quick)
        for name, seconds in by_name.items():
            side = self.contenders[name].side
            if side is not None:
                limit = limits.of(flops=taken[name]["flops"])
                yield Row(self.name, side, work, seconds, theirs, other, limit, harness.command_of(self.file))

    def measure(self, names: Sequence[str], repeats: int, threads: int, quick: bool) -> dict[str, dict[str, float]]:
        """The figures of these contenders, each in a fresh process."""
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory), quick)
            flags = ["--repeats", repeats, *(["--quick"] if quick else [])]
            model = f"{directory}/model"
            return {name: harness.apart(self.file, *flags, "--inside", model, name, threads=threads) for name in names}

    def _work(self, quick: bool) -> str:
        config = model_config(quick)
        layers = f"{config['num_hidden_layers']} + {config['vision_config']['depth']} layers"
        return f"{self.describe(samples(quick))}; {layers} of width {config['hidden_size']}, float32"

    def _table(self, taken: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
        """The figures as markdown, with the machine and the command."""
        base = next(iter(taken.values()))
        lines = [
            "| | processor s per step | ratio | wall s | peak MB above the model | ratio | first loss | last loss |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, x in taken.items():
            lines.append(
                f"| {name} | {x['processor']:.2f} | {x['processor'] / base['processor']:.2f} | {x['seconds']:.2f} "
                f"| {x['peak'] / 1e6:.0f} | {x['peak'] / base['peak']:.2f} | {x['first_loss']:.5f} "
                f"| {x['last_loss']:.5f} |"
            )
        lines += [
            "",
            f"{self._work(options.quick)}; medians of {options.repeats} steps after two.",
            f"{harness.processor_name()}, {os.cpu_count()} cores, {options.threads} threads, "
            f"Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} at the end.",
            f"Command: `python benchmarks/{Path(self.file).name} --repeats {options.repeats} --threads "
            f"{options.threads}{' --quick' if options.quick else ''} --write`",
        ]
        return "\n".join(lines) + "\n"


def duetvl_sft(model: Any, examples: Sequence[dict]) -> Ready:
    """One step on packed samples, as duetvl's trainer takes it."""
    import duetvl
    from duetvl.core.optimizer import ParameterGroup
    from duetvl.models.qwen_vl.flops import training_flops

    backend = model.backend
    groups = [ParameterGroup([p for p in model.parameters.values() if p.trainable])]
    state = backend.optimizer.create(groups)
    packed = [duetvl.Sample(**sample) for sample in examples]

    def step() -> float:
        batch = model.pack(packed)
        loss, tape = model.forward_loss(batch)
        backend.autograd.backward(tape, [backend.ops.from_numpy(np.ones((), np.float32))])
        scale = 1.0 / batch.trained_tokens
        scale *= min(1.0, 1.0 / (backend.optimizer.grad_norm(groups[0].parameters) * scale + 1e-6))
        backend.optimizer.step(state, groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, grad_scale=scale)
        return float(backend.to_numpy(loss)) / batch.trained_tokens

    return Ready(step, training_flops(model.config, model.parameters, model.pack(packed)))


def transformers_sft(model: Any, style: str, examples: Sequence[dict]) -> Ready:
    """One step as users of transformers run it: one `padded` batch, or one sample at a time."""
    import torch

    model.train()
    optimizer = torch_adamw(model)
    total = sum(int((sample["labels"][1:] != -100).sum()) for sample in examples)
    batches = [examples] if style == "padded" else [[sample] for sample in examples]

    def step() -> float:
        loss_sum = 0.0
        for batch in batches:
            fed = {key: torch.from_numpy(value) for key, value in padded(batch).items()}
            loss = model(**fed, num_items_in_batch=torch.tensor(total), use_cache=False).loss
            loss.backward()
            loss_sum += loss.item()
        clipped_update(optimizer)
        return loss_sum

    return Ready(step)


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


def measure(ready: Ready, repeats: int) -> dict[str, float]:
    """Figures of `repeats` steps after two for warming up, in this process, and its peak memory above the start.

    `cpu` and `wall` are the least of a step, `processor` and `seconds` the medians.
    """
    before, losses = harness.status("VmRSS"), [ready.step(), ready.step()]
    taken = [harness.timed(lambda: losses.append(ready.step())) for _ in range(repeats)]
    best = harness.least(taken)
    return {
        "cpu": best.cpu,
        "wall": best.wall,
        "processor": statistics.median(each.cpu for each in taken),
        "seconds": statistics.median(each.wall for each in taken),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "flops": ready.flops,
    }


def write_model(directory: Path, quick: bool = False) -> None:
    """Random weights of the benchmark's model in the Hugging Face layout."""
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.loading import write_random_model

    write_random_model(ModelConfig.from_dict(model_config(quick)), directory / "model", seed=0)


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
