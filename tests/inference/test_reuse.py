"""What is found again when pictures come through the processor: by their pixels, never by name, shape or coding."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from PIL import Image

import duetvl
from duetvl.core.backend import Backend

QUESTION = "What is there to be seen in this picture, from left to right and from top to bottom? " * 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("reuse") / "model", std=0.2)


def drawn(width: int, height: int, seed: int = 1) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def data_uri(picture: Image.Image, form: str) -> str:
    held = io.BytesIO()
    picture.save(held, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


def found(engine: Any, model: Any, picture: Any, **settings: Any) -> int:
    """Rows that were there already; the answer is that of an engine that keeps nothing."""
    processor = model.processor
    before = processor.media
    processor.media = settings.get("media", before)
    prompt = processor(
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    processor.media = before
    request = duetvl.Request(prompt, max_new_tokens=6, stop_ids=frozenset())
    (answer,) = engine.generate([request])
    (alone,) = duetvl.Engine(model, cache_tokens=1024, reuse=False).generate([request])
    assert answer.token_ids == alone.token_ids
    return answer.cached_tokens


def test_one_picture_in_several_codings(be: Backend, directory: Path, tmp_path: Path) -> None:
    model = duetvl.load_model(directory, backend=be)
    engine = duetvl.Engine(model, cache_tokens=4096)
    picture = drawn(84, 56)
    picture.save(tmp_path / "one.png")
    assert found(engine, model, str(tmp_path / "one.png")) == 0
    for same in (data_uri(picture, "PNG"), data_uri(picture, "BMP"), picture):
        assert found(engine, model, same) > 64
    drawn(84, 56, seed=2).save(tmp_path / "one.png")
    assert found(engine, model, str(tmp_path / "one.png")) == 0


def test_sides_and_sizes_are_told_apart(be: Backend, directory: Path) -> None:
    from dataclasses import replace

    model = duetvl.load_model(directory, backend=be)
    engine = duetvl.Engine(model, cache_tokens=4096)
    plain = Image.new("RGB", (30, 150), (90, 90, 90))
    assert found(engine, model, plain) == 0
    assert found(engine, model, plain.transpose(Image.Transpose.ROTATE_90)) == 0
    assert found(engine, model, plain) > 64
    own = model.processor.media
    smaller = replace(own, image=replace(own.image, max_pixels=56 * 56))
    assert found(engine, model, plain, media=smaller) == 0
