"""What a GPU gives: conformance, duetvl doctor, then the 7B shape trained, with LoRA, and decoding, recorded or not.

    scripts/gpu_check.sh                                        # one card, at most 8 minutes, no network
    python benchmarks/gpu.py --device cpu --tiny [--only sft]   # the same way through it, on a CPU

Every part runs in a process of its own with a time limit of its own; one that fails is a row of the page, and the
others go on. Weights are random and made on the device. Writes results/gpu.md (--output names another file) after
every part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MARK = "gpu-figures "
SHAPE_7B = {
    "model_type": "qwen2_5_vl", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16,
        "tokens_per_second": 2, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
    },
}  # fmt: skip
STEPS, WARM_UP = 4, 2


@dataclass(frozen=True)
class Size:
    """What the figures are taken of. A sample has one picture of `side` x `side` patches, and text."""

    samples: int
    tokens: int  # of a sample
    side: int
    new: int  # tokens of an answer
    batches: tuple[int, ...]


REAL = Size(samples=4, tokens=512, side=28, new=48, batches=(1, 16, 64))
TINY = Size(samples=2, tokens=60, side=8, new=8, batches=(1, 3))


@dataclass(frozen=True)
class Place:
    """Where and how large."""

    device: str
    tiny: bool

    @property
    def size(self) -> Size:
        """Of the figures."""
        return TINY if self.tiny else REAL


# -- parts that are commands of their own: (seconds, what they are, the command) ---------------------------------------


def conformance(place: Place) -> list[str]:
    """The contract of the seam on the device."""
    some = ["-k", "rms_norm and torch_npu"] if place.tiny else ["-k", "not mindspore"]
    return [sys.executable, "-m", "pytest", "--tb=line", "-x" if place.tiny else "--maxfail=40", "-p",
            "no:cacheprovider", *some, "tests/conformance/test_ops.py",
            *([] if place.tiny else ["tests/conformance/test_autograd.py", "tests/conformance/test_kv_cache.py",
                                     "tests/conformance/test_optimizer.py"])]  # fmt: skip


def transformers(place: Place) -> list[str]:
    """Tiny models of both families against transformers."""
    some = ["-k", "test_logits and torch_npu and text"] if place.tiny else ["-k", "not mindspore"]
    return [sys.executable, "-m", "pytest", "--tb=line", "--maxfail=40", "-p", "no:cacheprovider", *some,
            "tests/models/test_against_transformers.py"]  # fmt: skip


def doctor(place: Place) -> list[str]:
    """Every operation, two tiny models and the device's own speed."""
    return [sys.executable, "-m", "duetvl", "doctor", "--full", "--backend", "torch", "--device", place.device]


# -- parts that are measured here -------------------------------------------------------------------------------------


def make_model(place: Place, recipe: Any) -> tuple[Any, Any]:
    """A model of random weights on the device, and the plan of its adapters."""
    import torch

    from duetvl.core.backend import load_backend
    from duetvl.core.params import Parameter
    from duetvl.doctor.tiny import tiny_config
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.model import QwenVL
    from duetvl.models.qwen_vl.parameters import parameter_shapes
    from duetvl.training.lora import adapt, plan_adapters

    backend = load_backend("torch", place.device)
    config = tiny_config("qwen2_5_vl") if place.tiny else ModelConfig.from_dict(SHAPE_7B)
    torch.manual_seed(0)
    parameters = {}
    for path, shape in parameter_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=torch.device(place.device))
        tensor = tensor.normal_(0, 0.02) if len(shape) > 1 else tensor.fill_(0.0 if path.endswith("bias") else 1.0)
        parameters[path] = Parameter(path, tensor)
    model = QwenVL(config, backend, parameters)
    model.dtype = "bfloat16"
    plan = plan_adapters(recipe, config)
    adapt(model, recipe, plan)
    model.recompute = recipe.train.recompute
    return model, plan


def make_samples(place: Place, config: Any, count: int, seed: int = 0) -> list[Any]:
    """Each a picture and text, of which the second half is trained."""
    from duetvl.core.batch import IGNORE, Sample

    rng, size = np.random.default_rng(seed), place.size
    start, end, image = (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id)
    merged = size.side**2 // 4
    samples = []
    for _ in range(count):
        text = rng.integers(0, 480, size.tokens - merged - 2)
        ids = np.concatenate([[start], np.full(merged, image), [end], text])
        labels = np.where(np.arange(size.tokens) < size.tokens // 2, IGNORE, ids)
        pixels = rng.standard_normal((size.side**2, 1176), dtype=np.float32)
        samples.append(Sample(ids, labels, pixels, np.array([[1, size.side, size.side]])))
    return samples


def train(place: Place, sections: Mapping[str, Any]) -> dict[str, str]:
    """Tokens a second, the share of the matrix products' limit, and the peak beside the estimate."""
    from duetvl.data.loading.loader import Step
    from duetvl.models.qwen_vl.flops import training_flops
    from duetvl.models.qwen_vl.memory import Load
    from duetvl.training.memory import estimate
    from duetvl.training.objective import TokenLoss
    from duetvl.training.recipe.reading import make_recipe
    from duetvl.training.step import Trainer

    size = place.size
    recipe = make_recipe(
        {"model": {"path": "-", "dtype": "bfloat16", "freeze": []}, "data": {"train": "-"}, **sections}
    )
    limit = matmul_limit(place)
    model, plan = make_model(place, recipe)
    backend = model.backend
    batch = model.pack(make_samples(place, model.config, size.samples))
    trainer = Trainer(model, TokenLoss(backend.ops), backend, recipe.optim)
    times, losses = [], []

    def step(number: int) -> None:
        losses.append(trainer.step(Step((batch,), ("-",), {}), 1e-5, number).loss)

    for number in range(WARM_UP + STEPS):
        backend.device.synchronize()
        start = time.perf_counter()
        step(number)
        backend.device.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARM_UP:])
    flops = training_flops(model.config, model.parameters, batch) / seconds
    load = Load(batch.tokens, batch.trained_tokens, size.side**2 * size.samples)
    expected = estimate(model.config, recipe, load, 1, plan.adapters if plan else None).peak
    measured = backend.device.peak_memory()
    waits = waits_of(place, lambda: step(WARM_UP + STEPS))
    return {
        "a step": f"{seconds * 1e3:.0f} ms, {batch.tokens} tokens, losses {losses[0]:.3f} to {losses[-1]:.3f}",
        "tokens a second": f"{batch.tokens / seconds:.0f}",
        "useful operations": f"{flops / 1e12:.3g} TFLOP/s, {flops / limit:.0%} of the matrix products' limit measured "
        f"beside it ({limit / 1e12:.3g})",
        "peak memory": f"{measured / 2**30:.2f} GiB{' (of the whole process)' if place.device == 'cpu' else ''}, "
        f"estimated {expected / 2**30:.2f} ({expected / measured - 1:+.0%})",
        "waits for the device in a step": waits,
    }


def waits_of(place: Place, step: Callable[[], None]) -> str:
    """How often the host waits for the device, and where, as torch warns of it."""
    import torch

    if place.device != "cuda":
        return "not counted on a CPU"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message))
    return f"{sum(places.values())} ({', '.join(f'{where} {count}' for where, count in places.most_common(8))})"


def sft(place: Place) -> dict[str, str]:
    """All parameters. The moments are held in bfloat16: in float32 the state would not fit on one card."""
    return train(place, {"train": {"recompute": "full"}, "optim": {"state_dtype": "bfloat16"}})


def lora(place: Place) -> dict[str, str]:
    """Adapters of the language model, as recipes/qwen2_5_vl_7b_sft_lora.yaml has them; nothing is recomputed."""
    return train(place, {"lora": {"rank": 8}})


def decode(place: Place) -> dict[str, str]:
    """Passes in which every sequence decodes one token, recorded as CUDA graphs and launched kernel by kernel."""
    from duetvl.inference.engine import Engine
    from duetvl.training.recipe.reading import make_recipe

    recipe = make_recipe({"model": {"path": "-", "dtype": "bfloat16"}, "data": {"train": "-"}})
    bandwidth = bandwidth_limit(place)
    model, _ = make_model(place, recipe)
    size = place.size
    read = sum(
        2 * np.prod(p.shape) for path, p in model.parameters.items() if path.startswith(("model.layers", "lm_head"))
    )
    figures = {}
    for count, record in itertools.product(size.batches, (True, False)):
        room = count * (size.tokens + size.new + 256)
        engine = Engine(model, cache_tokens=room, max_sequences=count, reuse=False, record=record)
        seconds = decode_pass(engine, make_samples(place, model.config, count, seed=count), size.new)
        text = model.config.text
        held = count * (size.tokens + size.new // 2)
        cache = 4 * text.num_layers * text.num_kv_heads * text.head_dim * held
        share = (read + cache) / seconds / bandwidth
        figures[f"batch {count}{'' if record else ', not recorded'}"] = (
            f"{count / seconds:.0f} tokens a second, {seconds * 1e3:.2f} ms a pass, {share:.0%} of the bandwidth "
            f"measured beside it ({bandwidth / 1e12:.3g} TB/s)"
        )
    return figures


def decode_pass(engine: Any, samples: list[Any], new: int) -> float:
    """Median seconds of the passes that give each of the sequences a token, after six, of which one is recorded."""
    from duetvl.inference.request import Request

    for sample in samples:
        engine.submit(Request(replace(sample, labels=None), max_new_tokens=new, stop_ids=frozenset()))
    times = []
    while engine.busy:
        start = time.perf_counter()
        deltas = engine.step()
        seconds = time.perf_counter() - start
        errors = [d.completion.error for d in deltas if d.completion is not None and d.completion.error is not None]
        if errors:
            raise errors[0]
        if sum(len(delta.token_ids) for delta in deltas) == len(samples):
            times.append(seconds)
    return statistics.median(times[min(6, len(times) - 1) :])


def compiled(place: Place) -> dict[str, str]:
    """Rotation and gate with their gradients, of all layers of a step: as they are, and compiled."""
    import torch

    from duetvl.backends.torch_npu.autograd import TorchAutograd
    from duetvl.backends.torch_npu.kernels_cuda import CudaOps
    from duetvl.core.backend import load_backend
    from duetvl.doctor.speed import seconds_of

    backend, size, shape = load_backend("torch", place.device), place.size, SHAPE_7B
    both = {kind: CudaOps(TorchAutograd(), torch.device(place.device)) for kind in ("eager", "compiled")}
    both["compiled"].compile("aot_eager" if place.tiny else "inductor")
    rows, layers = size.samples * size.tokens, shape["num_hidden_layers"]
    scale = 32 if place.tiny else 1
    heads, head, width = shape["num_attention_heads"], 128, shape["intermediate_size"] // scale

    def tensor(*lengths: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(lengths, device=place.device).to(dtype).requires_grad_(dtype == torch.bfloat16)

    tables = [tensor(rows, head // 2, dtype=torch.float32) for _ in range(2)]
    cases = {
        "rotation": (lambda ops, x: ops.rope(x, *tables), [tensor(rows, heads, head)]),
        "gate": (lambda ops, *x: ops.swiglu(*x), [tensor(rows, width), tensor(rows, width)]),
    }
    figures = {}
    for name, (run, inputs) in cases.items():
        milliseconds, results = {}, {}
        for kind, ops in both.items():
            out = run(ops, *inputs)
            d = torch.ones_like(out)
            results[kind] = [out, *torch.autograd.grad(out, inputs, d)]
            step = lambda: torch.autograd.grad(run(ops, *inputs), inputs, d)  # noqa: B023, E731
            milliseconds[kind] = layers * 1e3 * seconds_of(backend, step, 0.05 if place.tiny else 0.3)
        gap = max(float((a - b).detach().float().abs().max()) for a, b in zip(*results.values(), strict=True))
        figures[name] = (
            f"{rows} tokens, {layers} layers, forward and gradient: {milliseconds['eager']:.2f} ms, compiled "
            f"{milliseconds['compiled']:.2f} ms; largest difference {gap:.1e}"
        )
    return figures


def matmul_limit(place: Place) -> float:
    """Operations a second of large bfloat16 products."""
    from duetvl.core.backend import load_backend
    from duetvl.doctor.speed import seconds_of

    backend = load_backend("torch", place.device)
    side = 256 if place.tiny else 8192
    a, b = (backend.ops.cast(backend.ops.zeros((side, side)) + value, "bfloat16") for value in (1.0, 0.5))
    return 2 * side**3 / seconds_of(backend, lambda: backend.ops.matmul(a, b), 0.1 if place.tiny else 0.5)


def bandwidth_limit(place: Place) -> float:
    """Bytes a second, read and written, of an addition."""
    from duetvl.core.backend import load_backend
    from duetvl.doctor.speed import seconds_of

    backend = load_backend("torch", place.device)
    x = backend.ops.zeros((2**20 if place.tiny else 2**29,))
    return 8 * x.shape[0] / seconds_of(backend, lambda: x + 1.0, 0.1 if place.tiny else 0.5)


# -- running them, and the page ---------------------------------------------------------------------------------------

COMMANDS: Mapping[str, tuple[int, Callable[[Place], list[str]]]] = {
    "conformance": (95, conformance), "transformers": (50, transformers), "doctor": (70, doctor),
}  # fmt: skip
MEASURED: Mapping[str, tuple[int, Callable[[Place], dict[str, str]]]] = {
    "sft": (90, sft), "lora": (60, lora), "decode": (80, decode), "compiled": (35, compiled),
}  # fmt: skip
PARTS = {**COMMANDS, **MEASURED}


def run_part(name: str, place: Place) -> dict[str, str]:
    """Rows of one part; what went wrong is a row."""
    limit = PARTS[name][0]
    if name in COMMANDS:
        command = COMMANDS[name][1](place)
    else:
        command = [sys.executable, __file__, "--device", place.device, "--inside", name]
        command += ["--tiny"] if place.tiny else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "DUETVL_TEST_DEVICE": place.device, "PYTHONPATH": path}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no end within its {limit} s"}
    took = {"took": f"{time.perf_counter() - start:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return {**json.loads(line.removeprefix(MARK)), **took}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        bad = [line.strip() for line in lines if line.startswith("FAILED") or " FAILED " in line][:12]
        found = {f"failed {number}": line for number, line in enumerate(bad, 1)}
        return {"failed": f"status {done.returncode}: {''.join(lines[-1:])}", **found, **took}
    figures = {
        " ".join(line.split()[1:-2]): " ".join(line.split()[-2:]) for line in lines if line.startswith("  speed")
    }
    return {"passed": "".join(lines[-1:]), **figures, **took}


def page(results: Mapping[str, Mapping[str, str]], place: Place) -> str:
    """Everything as markdown."""
    lines = ["# A GPU: checks and figures", "", machine(place), ""]
    if not place.tiny:
        lines += [
            f"Shape of Qwen2.5-VL-7B, random weights, bfloat16; training on {REAL.samples} samples of {REAL.tokens} "
            f"tokens in one pack, each with a picture of {REAL.side} x {REAL.side} patches.", "",
        ]  # fmt: skip
    lines += ["| part | | |", "|---|---|---|"]
    lines += [f"| {part} | {key} | {_cell(value)} |" for part, rows in results.items() for key, value in rows.items()]
    command = f"python benchmarks/gpu.py --device {place.device}{' --tiny' if place.tiny else ''}"
    return "\n".join([*lines, "", f"Command: `{command}`"]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:300]


def machine(place: Place) -> str:
    """What this ran on."""
    import torch

    name = torch.cuda.get_device_name() if place.device == "cuda" and torch.cuda.is_available() else place.device
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."


def main() -> int:
    """Run the parts; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.md")
    parser.add_argument("--inside", choices=MEASURED, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    place = Place(chosen.device, chosen.tiny)
    if chosen.inside:
        print(f"\n{MARK}{json.dumps(MEASURED[chosen.inside][1](place))}")  # noqa: T201
        return 0
    results: dict[str, dict[str, str]] = {}
    for name in chosen.only:
        results[name] = run_part(name, place)
        for key, value in results[name].items():
            print(f"{name}: {key}: {value}", flush=True)  # noqa: T201
        chosen.output.write_text(page(results, place), encoding="utf-8")
    return 1 if any("failed" in rows for rows in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
