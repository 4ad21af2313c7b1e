"""The main job on small real input: one recipe, two frameworks, one loss curve.

Draws pictures with questions, makes a tiny Qwen2.5-VL with random weights, fine-tunes it on PyTorch and on MindSpore,
and says how the two compare, what the models learnt, that each resumes the other's checkpoint, and what `duetvl eval`
scores the trained one.

    python scripts/demo/run.py [--steps 700] [--directory build/demo]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pictures
import tiny_model

import duetvl
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_random_model
from duetvl.training.watching.metrics import read_metrics
from duetvl.training.watching.plots import plot_runs

BACKENDS = ("torch", "mindspore")
RECIPE = Path(__file__).parent / "recipe.yaml"
COMPARED = 50  # steps over which two float32 runs are still the same run
CROSSED = 20  # steps that are trained from the other framework's checkpoint
NEEDED = {"colour": 0.9, "shape": 0.9, "count": 0.5, "position": 0.5}  # the last two: twice the chance of 1 in 4

Record = dict[str, Any]


def main() -> None:
    """Run the demo; the exit code says whether the two frameworks agree and the models learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--directory", type=Path, default=Path("build/demo"))
    chosen = parser.parse_args()
    started = time.monotonic()
    home = chosen.directory
    records = prepare(home)
    say(f"\n1. Fine-tuning for {chosen.steps} steps with {RECIPE.relative_to(Path.cwd())} on each framework")
    for name in BACKENDS:
        train(name, home, home / f"run-{name}", chosen.steps)
    problems = compare_curves(home, chosen.steps)
    problems += ask(home, records)
    problems += cross(home, chosen.steps)
    problems += benchmark(home, records)
    say(f"\nLoss plot: {home / 'loss.png'}; runs: {home}/run-torch, {home}/run-mindspore")
    say(f"Took {time.monotonic() - started:.0f} s.")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def prepare(home: Path) -> list[Record]:
    """Fresh pictures and a fresh model; returns the held-out records."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    _, held_out = pictures.write_data_set(home / "pictures", train=4000, held_out=100)
    config = ModelConfig.from_dict(tiny_model.tiny_config())
    write_random_model(config, home / "model", seed=0, settings=tiny_model.write_tokenizer)
    say(f"Drew 4000 pictures and made a model of {len(list((home / 'model').iterdir()))} files in {home}")
    return [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]


def train(name: str, home: Path, run: Path, steps: int, *extra: str) -> None:
    """`duetvl train` as a user calls it."""
    places = [
        f"model.path={home / 'model'}",
        f"data.train={home / 'pictures' / 'train.jsonl'}",
        f"train.output_dir={run}",
        f"train.steps={steps}",
        f"checkpoint.every={max(1, steps // 2)}",
    ]
    command = [sys.executable, "-m", "duetvl", "train", str(RECIPE), "--backend", name, "--device", "cpu", *extra]
    say(f"\n$ duetvl train {RECIPE.name} --backend {name} {' '.join(extra)}")
    start = time.monotonic()
    subprocess.run([*command, *places], check=True)
    say(f"{name}: {time.monotonic() - start:.0f} s")


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {row["step"]: row["loss"] for row in read_metrics(run) if row.get("loss") is not None}


def compare_curves(home: Path, steps: int) -> list[str]:
    """Print both loss curves side by side, and plot them; returns what is wrong."""
    first, second = (losses(home / f"run-{name}") for name in BACKENDS)
    say(f"\n2. Loss curves\n{'step':>6} {'torch':>10} {'mindspore':>10} {'relative difference':>20}")
    shown = {1, 2, 5, 10, 20, 30, 40, 50, *range(100, steps + 1, 100)}
    for step in sorted(shown & first.keys() & second.keys()):
        say(f"{step:6d} {first[step]:10.5f} {second[step]:10.5f} {difference(first[step], second[step]):20.1e}")
    compared = range(1, min(COMPARED, steps) + 1)
    largest = max(difference(first[step], second[step]) for step in compared)
    say(f"largest relative difference over the first {len(compared)} steps: {largest:.1e}")
    plot_runs([home / f"run-{name}" for name in BACKENDS], home / "loss.png")
    return [f"the loss curves differ by {largest:.1e}, more than 1e-3"] if largest > 1e-3 else []


def difference(a: float, b: float) -> float:
    """Relative to the first."""
    return abs(a - b) / abs(a)


def ask(home: Path, records: Sequence[Record]) -> list[str]:
    """Held-out accuracy before and after training, and some answers; returns what is wrong."""
    say("\n3. Held-out questions, answered right (chance: colour 1 in 6, the others 1 in 4)")
    say(f"{'':>22} " + " ".join(f"{task:>9}" for task in pictures.TASKS))
    problems: list[str] = []
    answers: list[str] = []
    directories = {"before": home / "model", "after": home / "run-torch" / "export"}
    for name in BACKENDS:
        directories["after"] = home / f"run-{name}" / "export"
        for when, directory in directories.items():
            answers = list(answer(name, directory, records, home / "pictures"))
            rates = accuracy(records, answers)
            say(f"{name:>14} {when:>7} " + " ".join(f"{rates[task]:9.0%}" for task in pictures.TASKS))
        problems += [f"{name}: {task} {rates[task]:.0%}" for task, least in NEEDED.items() if rates[task] < least]
    say("\n4. Some of MindSpore's answers")
    for record, text in list(zip(records, answers, strict=True))[:8]:
        say(f"{question(record):>28}  {text:14} (right: {expected(record)})")
    return problems


def answer(name: str, directory: Path, records: Sequence[Record], root: Path) -> Iterator[str]:
    """Greedy answers to the records' questions, fifty at a time."""
    model = duetvl.load_model(directory, backend=duetvl.load_backend(name, device="cpu"))
    for start in range(0, len(records), 50):
        prompts = [prompt(record, root) for record in records[start : start + 50]]
        yield from (found.text.strip() for found in model.generate_many(prompts, max_new_tokens=8))


def prompt(record: Record, root: Path) -> list[Record]:
    """The user's turn, its picture named by a path that can be opened from here."""
    image, text = record["messages"][0]["content"]
    return [{"role": "user", "content": [{"type": "image", "image": str(root / image["image"])}, text]}]


def question(record: Record) -> str:
    """The text of the user's turn."""
    return record["messages"][0]["content"][1]["text"]


def expected(record: Record) -> str:
    """The right answer."""
    return record["messages"][1]["content"][0]["text"]


def accuracy(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """Share of exact answers by task."""
    right: dict[str, list[bool]] = {task: [] for task in pictures.TASKS}
    for record, text in zip(records, answers, strict=True):
        right[record["task"]].append(text == expected(record))
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


def cross(home: Path, steps: int) -> list[str]:
    """Resume each framework's middle checkpoint on the other; returns what is wrong."""
    half = max(1, steps // 2)
    say(f"\n5. Each framework resumes the other's checkpoint of step {half}")
    problems = []
    for source, other in (BACKENDS, BACKENDS[::-1]):
        run = home / f"run-{source}-then-{other}"
        stop = f"{home / f'run-{source}'}@{half}"
        train(other, home, run, half + CROSSED, "--resume", stop, "checkpoint.export=false", "log.every=10")
        own, crossed = losses(home / f"run-{source}"), losses(run)
        gap = difference(own[half + 1], crossed[half + 1])
        say(f"first loss after step {half}: {own[half + 1]:.6f} where {source} continues, "
            f"{crossed[half + 1]:.6f} on {other}: relative difference {gap:.1e}")  # fmt: skip
        if gap > 1e-4:
            problems.append(f"{other} resumes {source}'s checkpoint with a loss that differs by {gap:.1e}")
    return problems


def benchmark(home: Path, records: Sequence[Record]) -> list[str]:
    """The held-out questions as a benchmark of their own, scored by `duetvl eval`; returns what is wrong."""
    say("\n6. The held-out questions as a benchmark")
    lines = [
        {
            "image": str((home / "pictures" / record["messages"][0]["content"][0]["image"]).absolute()),
            "question": question(record),
            "answer": expected(record),
            "task": record["task"],
        }
        for record in records
    ]
    data, task, target = home / "held_out.jsonl", home / "held_out.yaml", home / "eval"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task.write_text('name: held_out\ncolumns: {image: image}\nprompt: "{question}"\ngroups: [task]\n', encoding="utf-8")
    words = ["--task", task, "--data", data, "-o", target, "--min-pixels", "784", "--max-pixels", "78400"]
    say("$ duetvl eval run-torch/export --task held_out.yaml --data held_out.jsonl")
    command = [sys.executable, "-m", "duetvl", "eval", home / "run-torch" / "export", "--device", "cpu", *words]
    subprocess.run([*map(str, command), "--backend", "torch", "--max-new-tokens", "8"], check=True)
    scores = json.loads((target / "scores.json").read_text(encoding="utf-8"))
    least = 100 * sum(NEEDED.values()) / len(NEEDED)
    return [] if scores["low"] >= least else [f"duetvl eval scores at least {scores['low']} %, not {least:.0f}"]


if __name__ == "__main__":
    main()
