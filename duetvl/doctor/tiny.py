"""A tiny model of each family, trained for three steps and asked for tokens; on two devices it has to do the same."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Sample
from duetvl.data.loading.loader import Step
from duetvl.doctor.check import Check
from duetvl.inference.engine import Engine
from duetvl.inference.request import Request
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import load_model, write_random_model
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.step import Trainer

STEPS, NEW_TOKENS, LR = 3, 8, 1e-3
START, END, IMAGE = 500, 501, 502
GRID = (1, 8, 12)
_TEXT = {  # heads of 64 and 80, which the fused kernels take
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "initializer_range": 0.1,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": 503,
}  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "qwen2_vl": {
        "vision_config": {"depth": 2, "embed_dim": 160, "hidden_size": 128, "mlp_ratio": 2, "num_heads": 2}
    },
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 2, "hidden_size": 160, "intermediate_size": 224, "out_hidden_size": 128, "num_heads": 2,
            "tokens_per_second": 2, "fullatt_block_indexes": [1],
        }
    },
}  # fmt: skip
LOSS_ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # a share of the loss, and of the gradient's norm
LOGPROB_ALLOWED = {"float32": 1e-3, "bfloat16": 0.15, "float16": 2e-2}


def run_tiny(backend: Backend, dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each family and dtype the losses and gradient norms of the steps, and tokens with log-probabilities."""
    with tempfile.TemporaryDirectory() as directory:
        for family in CONFIGS:
            path = Path(directory, family)
            write_random_model(tiny_config(family), path)
            for dtype in dtypes:
                training, answers = _trained(backend, path, dtype), _answers(backend, path, dtype)
                yield {"family": family, "dtype": dtype, "training": training, "answers": answers}


def tiny_config(family: str) -> ModelConfig:
    """Two layers and two blocks, with heads of the sizes that real models have."""
    return ModelConfig.from_dict({"model_type": family, **_TEXT, **CONFIGS[family]})


def samples() -> list[Sample]:
    """Two with a picture and one without, of which the second half is trained."""
    rng = np.random.default_rng(4)
    picture = [START, *[IMAGE] * (GRID[1] * GRID[2] // 4), END]
    made = []
    for number, text in enumerate((30, 61, 17)):
        head = picture if number % 2 == 0 else []
        ids = np.concatenate([np.array(head, np.int64), rng.integers(0, 480, text)])
        labels = np.where(np.arange(len(ids)) < len(ids) - text // 2, IGNORE, ids)
        pixels = rng.standard_normal((GRID[1] * GRID[2], 1176)).astype(np.float32) if head else None
        made.append(Sample(ids, labels, pixels, np.array([GRID] if head else [], np.int64).reshape(-1, 3)))
    return made


def _trained(backend: Backend, path: Path, dtype: str) -> list[list[float]]:
    recipe = make_recipe({"model": {"path": str(path), "dtype": dtype}, "data": {"train": "-"}})
    model: QwenVL = load_model(path, backend=backend, dtype=dtype)
    trainer = Trainer(model, TokenLoss(backend.ops), backend, recipe.optim)
    rows = []
    for number in range(STEPS):
        result = trainer.step(Step((model.pack(samples()),), ("-",), {}), LR, number)
        assert result is not None, "something is trained in every sample"
        rows.append([result.loss, result.grad_norm])
    return rows


def _answers(backend: Backend, path: Path, dtype: str) -> list[list[list[Any]]]:
    """Of each prompt its tokens: number, log-probability, and how far the second likeliest lies behind."""
    model: QwenVL = load_model(path, backend=backend, dtype=dtype)
    engine = Engine(model, cache_tokens=2048, max_sequences=4, steady=False)
    answers: dict[str, list[list[Any]]] = {}
    for sample in samples():
        request = Request(sample, max_new_tokens=NEW_TOKENS, stop_ids=frozenset(), logprobs=2)
        answers[engine.submit(request)] = []
    while engine.busy:
        for delta in engine.step():
            if delta.completion is not None and delta.completion.error is not None:
                raise delta.completion.error
            for one in delta.logprobs:
                answers[delta.id].append([one.token, one.logprob, one.top[0][1] - one.top[1][1]])
    return list(answers.values())


# -- comparing --------------------------------------------------------------------------------------------------------


def compare_tiny(ours: dict[str, Any], reference: dict[str, Any]) -> Iterator[Check]:
    """Two runs of one family and dtype."""
    name, dtype = f"{ours['family']} {ours['dtype']}", ours["dtype"]
    losses, expected = np.array(ours["training"]), np.array(reference["training"])
    worst = float(np.abs(losses / expected - 1).max())
    detail = f"losses {', '.join(f'{loss:.4f}' for loss, _ in ours['training'])}"
    allowed = LOSS_ALLOWED[dtype]
    yield Check("training", f"{name}, {STEPS} steps", bool(worst <= allowed), worst, allowed, detail=detail)
    allowed = LOGPROB_ALLOWED[dtype]
    pairs = list(zip(ours["answers"], reference["answers"], strict=True))
    gaps, equal = zip(*(_gap(a, b, allowed) for a, b in pairs), strict=True)
    detail = f"{sum(equal)} of {NEW_TOKENS * len(pairs)} tokens before a near tie"
    yield Check("generation", f"{name}, {len(pairs)} prompts", max(gaps) <= allowed, max(gaps), allowed, detail=detail)


def _gap(ours: list[list[Any]], expected: list[list[Any]], allowed: float) -> tuple[float, int]:
    """The largest difference of a log-probability, and equal tokens, up to where they differ by a near tie.

    Where they differ and the reference did not nearly choose between two, the difference is how far it was from that.
    """
    worst = 0.0
    for number, ((token, logprob, _), (other, reference, margin)) in enumerate(zip(ours, expected, strict=True)):
        if token != other:
            return (worst if margin <= 2 * allowed else max(worst, margin)), number
        worst = max(worst, abs(logprob - reference))
        if not np.isfinite(logprob):
            return float("inf"), number
    return worst, len(ours)
