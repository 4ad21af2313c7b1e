"""What tests say to the model, with and without a server."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import duetvl
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl import adapters as laying

NEW = 12  # tokens of an answer


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (84, 56)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


RED, BLUE = picture((220, 30, 30)), picture((30, 30, 220), (56, 112))


def image(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(content)}}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "say something"}],
    "system": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    "pictures": [
        {
            "role": "user",
            "content": [image(RED), {"type": "text", "text": "and"}, image(BLUE), {"type": "text", "text": "?"}],
        }
    ],
}  # fmt: skip


@dataclass
class Offline:
    """The same model without a server."""

    answers: dict[tuple[str, str], duetvl.Completion]  # by conversation and adapter
    drawn: list[duetvl.Completion]  # two, with temperature 0.9 and seed 7


def offline(model: duetvl.Model, adapters: dict[str, Any]) -> Offline:
    engine = duetvl.Engine(model, adapters=adapters, cache_tokens=4096)
    samples = {name: model.processor(said, add_generation_prompt=True) for name, said in CONVERSATIONS.items()}
    asked = {(name, adapter): duetvl.Request(sample, max_new_tokens=NEW, adapter=adapter, logprobs=2)
             for name, sample in samples.items() for adapter in engine.models}  # fmt: skip
    answers = dict(zip(asked, engine.generate(list(asked.values())), strict=True))
    sampling = replace(model.defaults.sampling, temperature=0.9, seed=7)
    drawn = engine.generate([duetvl.Request(samples["text"], max_new_tokens=NEW, n=2, sampling=sampling)])
    return Offline(answers, drawn)


def write_adapter(model: duetvl.Model, directory: Path) -> None:
    """One that changes what the model says."""
    laying.add_adapters(model, Adapters({f"model.layers.{layer}.mlp.up_proj": Size(2, 40.0) for layer in range(2)}), 1)
    ops = model.backend.ops
    for path, parameter in model.parameters.items():
        if path.endswith("lora_B.weight"):
            values = np.random.default_rng(1).standard_normal(parameter.shape).astype(np.float32)
            ops.assign(parameter.tensor, ops.from_numpy(values))
    model.save_adapter(directory)
