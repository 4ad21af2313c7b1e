"""One server for each backend, and what its model answers without it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from PIL import Image

import duetvl
from duetvl.core.backend import Backend
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl import adapters

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

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


@pytest.fixture(scope="session")
def tiny_model(be: Backend, tmp_path_factory: pytest.TempPathFactory) -> tuple[duetvl.Model, dict[str, Any]]:
    """A model, and an adapter of it."""
    directory = tiny_run.write_model(tmp_path_factory.mktemp("serving") / "tiny", std=0.2)
    model = duetvl.load_model(directory, backend=be)
    write_adapter(duetvl.load_model(directory, backend=be), directory.with_name("adapter"))
    return model, {"other": model.with_adapter(directory.with_name("adapter"))}


def write_adapter(model: duetvl.Model, directory: Path) -> None:
    """One that changes what the model says."""
    adapters.add_adapters(
        model, Adapters({f"model.layers.{layer}.mlp.up_proj": Size(2, 40.0) for layer in range(2)}), 1
    )
    ops = model.backend.ops
    for path, parameter in model.parameters.items():
        if path.endswith("lora_B.weight"):
            values = np.random.default_rng(1).standard_normal(parameter.shape).astype(np.float32)
            ops.assign(parameter.tensor, ops.from_numpy(values))
    model.save_adapter(directory)


@pytest.fixture(scope="session")
def live(tiny_model: Any, expected: Offline) -> Iterator[Any]:
    from live import Live

    server = Live(*tiny_model)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def expected(tiny_model: Any) -> Offline:
    """What the model answers before a server's thread has it."""
    return offline(*tiny_model)
