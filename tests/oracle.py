"""Tiny random models of both families as transformers makes them, samples for them, and what transformers finds.

Not a test: imported by the tests that compare duetvl with transformers (4.57.6 when these were written).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.batch import IGNORE, Pair, Sample
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.names import canonical_name

VOCABULARY = 96
TEXT = 80  # tokens below are text
END, START, STOP, IMAGE, VIDEO = 85, 86, 87, 88, 89
PATCH_ROW = 3 * 2 * 14 * 14

# Numbers that no published model has, where a number is easily assumed rather than read.
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 3e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
_REAL_TEXT = {
    **_TEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
_QWEN2 = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}
_QWEN2_5 = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 44,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 3,
}
_REAL_VISION = {**_QWEN2_5, "depth": 2, "hidden_size": 160, "tokens_per_second": 2}


@dataclass(frozen=True)
class Tiny:
    """A configuration; the five below are all that the comparisons need."""

    family: str
    tied: bool
    vision: dict[str, Any] = field(hash=False)
    text: dict[str, Any] = field(hash=False)


MODELS = {
    "qwen2-tied": Tiny("qwen2", True, _QWEN2, _TEXT),
    "qwen2-untied": Tiny("qwen2", False, _QWEN2, _TEXT),
    "qwen2.5-tied": Tiny("qwen2_5", True, _QWEN2_5, _TEXT),
    "qwen2.5-untied": Tiny("qwen2_5", False, _QWEN2_5, _TEXT),
    # Heads of 80 and 128 numbers with the mrope sections of every published model.
    "qwen2.5-real-heads": Tiny("qwen2_5", True, _REAL_VISION, _REAL_TEXT),
}


def make(name: str) -> Any:
    """The model of this name in transformers, with weights that make logits of order 1 and no bias or norm trivial."""
    import torch
    import transformers as hf

    tiny = MODELS[name]
    prefix = {"qwen2": "Qwen2VL", "qwen2_5": "Qwen2_5_VL"}[tiny.family]
    out = {"qwen2": "hidden_size", "qwen2_5": "out_hidden_size"}[tiny.family]
    config = getattr(hf, f"{prefix}Config")(
        text_config={**tiny.text, "tie_word_embeddings": tiny.tied},
        vision_config={**tiny.vision, out: tiny.text["hidden_size"]},
        tie_word_embeddings=tiny.tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
    )
    torch.manual_seed(len(name))
    model = getattr(hf, f"{prefix}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.1 + path.endswith(".weight"))  # a norm's scale, or a bias
            else:
                weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
        model.model.visual.patch_embed.proj.weight.mul_(0.02)  # so small that the first norms' epsilon counts
    return model


def load(directory: Path) -> Any:
    """A saved model, by transformers' own loader."""
    import torch
    import transformers as hf

    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[load_config(directory).model_type]
    return getattr(hf, f"{prefix}ForConditionalGeneration").from_pretrained(directory, dtype=torch.float32).eval()


# -- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A picture of this grid."""

    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Video:
    """A video of this grid, and the seconds of a temporal patch."""

    grid: tuple[int, int, int]
    seconds: float = 1.0


def sample(*parts: int | Image | Video, seed: int = 0, name: str = "") -> Sample:
    """Random text tokens (a number of them), pictures and videos in this order; the text from the second token on
    is trained, but for every third token."""
    rng = np.random.default_rng([seed, 7])
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, TEXT, part).tolist()
            continue
        frames, height, width = part.grid
        ids += [START, *[IMAGE if isinstance(part, Image) else VIDEO] * (frames * height * width // 4), STOP]
    ids[1] = 0  # a label like any other
    tokens = np.array(ids)
    labels = np.where((tokens < TEXT) & (np.arange(len(tokens)) % 3 > 0), tokens, IGNORE)
    images, videos = ([p for p in parts if isinstance(p, kind)] for kind in (Image, Video))
    return Sample(
        input_ids=tokens,
        labels=labels,
        pixel_values=_rows(images, rng),
        image_grid_thw=_grids(images),
        pixel_values_videos=_rows(videos, rng),
        video_grid_thw=_grids(videos),
        second_per_grid_ts=np.array([video.seconds for video in videos]) if videos else None,
        id=name,
    )


def _grids(media: Sequence[Image | Video]) -> np.ndarray:
    return np.array([part.grid for part in media], np.int64).reshape(-1, 3)


def _rows(media: Sequence[Image | Video], rng: np.random.Generator) -> np.ndarray | None:
    patches = int(np.prod(_grids(media), axis=1).sum())
    return rng.standard_normal((patches, PATCH_ROW), dtype=np.float32) if media else None


# A window is 8 x 8 patches (4 x 4 merged). Grids: exactly one window and exactly two, less than one, more than one
# in both directions with a rest; one frame and several.
SAMPLES = {
    "text": sample(13, seed=1, name="text"),
    "image": sample(3, Image((1, 16, 8)), 6, seed=2, name="image"),
    "three images": sample(
        2, Image((1, 4, 6)), 3, Image((1, 18, 20)), Image((1, 10, 6)), 5, seed=3, name="three images"
    ),
    "video": sample(4, Video((3, 10, 12), seconds=0.75), 5, seed=4, name="video"),
    "image and video": sample(
        2, Video((2, 8, 8), seconds=0.5), 3, Image((1, 6, 10)), 2, Video((1, 4, 4)), 4, seed=5, name="image and video"
    ),
}


def pair(*prompt: int | Image | Video, answers: tuple[int, int] = (5, 9), seed: int = 0, name: str = "") -> Pair:
    """A prompt of these parts, none of it trained, and two random answers of so many tokens, all of them trained."""
    base = sample(*prompt, seed=seed, name=name)
    rng = np.random.default_rng([seed, 11])
    chosen, rejected = (_answered(base, rng.integers(0, TEXT, count)) for count in answers)
    return Pair(chosen, replace(rejected, pixel_values=None, pixel_values_videos=None))


def _answered(base: Sample, answer: np.ndarray) -> Sample:
    labels = np.concatenate([np.full(len(base), IGNORE), answer])
    return replace(base, input_ids=np.concatenate([base.input_ids, answer]), labels=labels)


def copies(given: Pair) -> list[Sample]:
    """Both answers of a pair as samples, each with its pictures."""
    pixels = {key: getattr(given.chosen, key) for key in ("pixel_values", "pixel_values_videos")}
    return [given.chosen, replace(given.rejected, **pixels)]


PAIRS = {
    "text pair": pair(7, seed=21, name="text pair"),
    "pictures pair": pair(2, Image((1, 10, 12)), 3, Image((1, 4, 6)), 2, seed=22, name="pictures pair"),
    "video pair": pair(
        2, Video((2, 8, 8), seconds=0.5), 3, Image((1, 6, 10)), 2, answers=(8, 4), seed=23, name="video pair"
    ),
}


# -- what transformers says -------------------------------------------------------------------------------------------


def arguments(given: Sample) -> dict[str, Any]:
    """A sample as a forward of transformers takes it, without positions."""
    import torch

    found = {"input_ids": torch.from_numpy(given.input_ids.astype(np.int64))[None]}
    for key in ("pixel_values", "pixel_values_videos"):
        if getattr(given, key) is not None:
            grid = "image_grid_thw" if key == "pixel_values" else "video_grid_thw"
            found |= {key: torch.from_numpy(getattr(given, key)), grid: torch.from_numpy(getattr(given, grid))}
    return found


def forward(model: Any, given: Sample, labels: bool = False) -> Any:
    """One sample through transformers, which finds the positions itself unless there is a video: 4.57 truncates
    fractional seconds, so it is handed ours."""
    import torch

    keywords = arguments(given)
    if len(given.video_grid_thw):
        positions, _ = QwenVLFamily(_our_config(model)).position_index(
            given.input_ids, given.image_grid_thw, given.video_grid_thw, given.second_per_grid_ts
        )
        keywords["position_ids"] = torch.from_numpy(positions.astype(np.int64))[:, None]
    if labels:
        keywords["labels"] = torch.from_numpy(given.labels.astype(np.int64))[None]
    return model(**keywords)


def logits(model: Any, given: Sample) -> np.ndarray:
    """(T, vocabulary)."""
    import torch

    with torch.no_grad():
        return forward(model, given).logits[0].float().numpy()


def features(model: Any, given: Sample) -> np.ndarray:
    """Merged rows of the visual tower: images, then videos."""
    import torch

    found = arguments(given)
    media = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
    with torch.no_grad():
        kinds = [model.model.visual(found[rows], grid_thw=found[grid]) for rows, grid in media if rows in found]
        return torch.cat(kinds).numpy()


def loss_and_grads(model: Any, samples: Sequence[Sample]) -> tuple[float, dict[str, np.ndarray]]:
    """Mean over the trained tokens of all samples, each run by itself, and its gradients under our names."""
    model.zero_grad(set_to_none=True)
    counts = [int((s.labels[1:] != IGNORE).sum()) for s in samples]
    loss = 0.0
    for given, count in zip(samples, counts, strict=True):
        mean = forward(model, given, labels=True).loss * (count / sum(counts))
        mean.backward()
        loss += mean.item()
    tied = model.config.text_config.tie_word_embeddings
    grads = {
        canonical_name(path, tied=tied): weight.grad.numpy().copy()
        for path, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return loss, grads


def _our_config(model: Any) -> Any:
    from duetvl.models.qwen_vl.config import ModelConfig

    return ModelConfig.from_dict(model.config.to_dict())
