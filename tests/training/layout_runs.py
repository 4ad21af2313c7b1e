"""Small runs that differ in their layout over ranks alone, and a program that makes some of them on one rank.

As a program: layout_runs.py PLACE BACKEND NAME ..., started by torchrun or msrun on every rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tiny_run
from PIL import Image, ImageDraw

LIMIT = 300.0  # seconds for all runs of one start
SIZES = {
    "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}  # fmt: skip
KINDS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"optim": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4, "clip": 1.0}},
    "lora": {
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["vision", "projector", "language"]},
        "optim": {"lr": 1e-3, "eps": 1e-4},
    },
    "dora": {
        "lora": {"rank": 4, "alpha": 8, "dora": True, "targets": ["vision", "projector", "language"]},
        "optim": {"lr": 1e-3, "eps": 1e-4},
    },
    "dpo": {"dpo": {"beta": 0.1}, "optim": {"lr": 2e-4, "eps": 1e-4}},
    "cached": {"dpo": {"beta": 0.1, "cache": "CACHE"}, "optim": {"lr": 2e-4, "eps": 1e-4}},
}
FAMILIES = {"2": "qwen2_vl", "2.5": "qwen2_5_vl"}


class Layout(NamedTuple):
    """A run's name is KIND:FAMILY:LAYOUT."""

    processes: int
    section: Mapping[str, Any]


LAYOUTS = {
    "one": Layout(1, {}),
    "tp2": Layout(2, {"tp": 2}),
    "tp2s": Layout(2, {"tp": 2, "sequence": True}),
    "dp2": Layout(2, {"dp": 2}),
    "tp3": Layout(3, {"tp": 3}),
    "tp3s": Layout(3, {"tp": 3, "sequence": True}),
    "dp3": Layout(3, {"dp": 3}),
    "tp4s": Layout(4, {"tp": 4, "sequence": True}),
    "dp2tp2": Layout(4, {"dp": 2, "tp": 2}),
    "dp2tp2s": Layout(4, {"dp": 2, "tp": 2, "sequence": True}),
    "dp4": Layout(4, {"dp": 4}),
    "pp2": Layout(2, {"pp": 2}),
    "pp4": Layout(4, {"pp": 4, "vision_layers": [2, 0, 0, 0], "language_layers": [0, 1, 1, 2]}),
    "pp2v2": Layout(2, {"pp": 2, "vision_layers": [[1, 1], [0, 0]], "language_layers": [[0, 1], [2, 1]]}),
    "pp2tp2": Layout(4, {"pp": 2, "tp": 2, "sequence": True}),
    "pp2dp2": Layout(4, {"pp": 2, "dp": 2}),
    "cp2": Layout(2, {"cp": 2}),
    "cp3": Layout(3, {"cp": 3}),
    "cp2r": Layout(2, {"cp": 2, "cp_algorithm": "ring"}),
    "cp4r": Layout(4, {"cp": 4, "cp_algorithm": "ring"}),
    "dp2cp2": Layout(4, {"dp": 2, "cp": 2}),
    "pp2cp2": Layout(4, {"pp": 2, "cp": 2, "cp_algorithm": "ring"}),
    "cp4h": Layout(4, {"cp": 4, "cp_algorithm": "hybrid", "ulysses": 2}),
    "cp2tp2s": Layout(4, {"cp": 2, "cp_algorithm": "ring", "tp": 2, "sequence": True}),
    "dp2z": Layout(2, {"dp": 2, "zero": 3}),
    "dp2tp2z": Layout(4, {"dp": 2, "tp": 2, "sequence": True, "zero": 3}),
    "dp2cp2z": Layout(4, {"dp": 2, "cp": 2, "cp_algorithm": "ring", "zero": 3}),
    "all": Layout(8, {"pp": 2, "cp": 2, "tp": 2, "sequence": True}),
}


def write_inputs(place: Path) -> None:
    """A model of each family; records of text, pictures and videos, as conversations and as pairs."""
    for family in FAMILIES.values():
        tiny_run.write_model(place / family, std=0.1, family=family, **SIZES)
    plain, pairs = [], []
    for number in range(22):
        images, videos = media(place, number)
        question = "<image>" * len(images) + "<video>" * len(videos) + "which? " + "x" * (number % 7)
        asked = {"role": "user", "content": question}
        good, bad = ({"role": "assistant", "content": text} for text in (f"shade {number}", "none of them"))
        held = {"images": images, "videos": videos}
        plain.append({"messages": [asked, good], **held})
        pairs.append({"messages": [asked], "chosen": good, "rejected": bad, **held})
    for name, records in (("plain", plain), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def media(place: Path, number: int) -> tuple[list[str], list[list[str]]]:
    """Nothing, a picture, pictures of different sizes, a video, or both."""
    names = [f"{number}-{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        picture = Image.new("RGB", (28 + 28 * (number % 4), 56), (37 * number % 256, 91 * i % 256, 90))
        ImageDraw.Draw(picture).ellipse((3, 3, 9 + 9 * i, 9 + 9 * i), fill="white")
        picture.save(place / name)
    kinds: list[tuple[list[str], list[list[str]]]] = [
        ([], []), (names[:1], []), ([], [names]), (names[:3], []), (names[1:2], [names[:2]]),
    ]  # fmt: skip
    return kinds[number % len(kinds)]


def recipe_of(place: Path, backend: str, name: str) -> dict[str, Any]:
    """The recipe of a run, whose directory is PLACE/BACKEND/NAME."""
    kind, family, layout = name.split(":")
    records = "pairs" if kind in ("dpo", "cached") else "plain"
    recipe: dict[str, Any] = {
        "model": {"path": str(place / FAMILIES[family]), "freeze": []},
        "data": {"train": str(place / f"{records}.jsonl"), "val": str(place / f"{records}.jsonl"), "pack_tokens": 300},
        "train": {"output_dir": str(run_dir(place, backend, name)), "global_batch": 5, "steps": 5},
        "checkpoint": {"every": 1, "keep_last": None, "keep_best": "eval_loss"},
        "parallel": dict(LAYOUTS[layout].section),
        "log": {"tensorboard": False, "plot": False},
        **KINDS[kind],
    }
    recipe["train"] |= {"eval_first": True, "eval_every": 3, "patience": 3}
    if LAYOUTS[layout].section.get("zero") == 3:
        recipe["train"]["recompute"] = "full"
    if kind == "cached":
        recipe["dpo"] = {**recipe["dpo"], "cache": str(place / backend / f"cache-{family}-{layout}")}
    return recipe


def run_dir(place: Path, backend: str, name: str) -> Path:
    return place / backend / name.replace(":", "-")


def start(place: Path, backend: str, names: Sequence[str]) -> str:
    """Make runs of one number of processes in one start of them; what went wrong, or nothing."""
    (processes,) = {LAYOUTS[name.split(":")[2]].processes for name in names}
    tools, logs = Path(sys.executable).parent, place / f"logs-{backend}-{processes}"
    logs.mkdir()
    if backend == "mindspore":
        count = [f"--worker_num={processes}", f"--local_worker_num={processes}", f"--master_port={free_port()}"]
        launcher = [str(tools / "msrun"), *count, "--join=True", f"--log_dir={logs}"]
    else:
        launcher = [str(tools / "torchrun"), f"--nproc-per-node={processes}", f"--master-port={free_port()}"]
    command = [*launcher, __file__, str(place), backend, *names]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "DUETVL_PEER_TIMEOUT": "60"}
    try:
        done = subprocess.run(command, env=environment, cwd=logs, timeout=LIMIT, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        return f"not done after {LIMIT} s: {(error.stdout or b'')[-2000:]!r}"
    errors = [file.read_text() for file in sorted(logs.glob("*.error"))]
    return "\n".join(errors) or (done.stdout[-2000:] + done.stderr[-2000:] if done.returncode else "")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(place: Path, backend: str, names: Sequence[str]) -> None:
    """Every run in its turn; an error ends the process, and its text lies in the working directory."""
    from duetvl.core.backend import load_backend
    from duetvl.training.train import train

    be = load_backend(backend, device="cpu")
    try:
        for name in names:
            train(recipe_of(place, backend, name), backend=be)
    except BaseException:
        Path(f"{os.getpid()}.error").write_text(f"{name}, rank {be.collectives.rank}\n{traceback.format_exc()}")
        os._exit(1)
    be.collectives.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
