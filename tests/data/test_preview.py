"""A preview shows what the model sees: checked against a sample whose parts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duetvl.api import load_processor
from duetvl.core.batch import Pair
from duetvl.data.encode import Processor
from duetvl.data.preview import contact_sheet, frames, media, text_view

GRADIENT = np.arange(56 * 84 * 3, dtype=np.uint32).reshape(56, 84, 3).astype(np.uint8)  # wraps around: noise


@pytest.fixture(scope="module")
def processor(processor_dir: Path) -> Processor:
    return load_processor(processor_dir)


def conversation(*parts: dict) -> list[dict]:
    question = [*parts, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]


def image() -> dict:
    return {"type": "image", "image": GRADIENT}


def video(count: int) -> dict:
    return {"type": "video", "video": [np.full((56, 56, 3), 40 * i, np.uint8) for i in range(count)], "fps": 2.0}


def test_the_text_shows_trained_spans_grids_and_positions(processor):
    sample = processor(conversation(image(), video(4)), sample_id="chat.jsonl:3")
    lines = text_view(sample, processor).splitlines()
    assert lines[0] == f"chat.jsonl:3: {len(sample)} tokens, {np.count_nonzero(sample.labels >= 0)} trained"
    assert lines[1] == "image 1: grid 1 x 4 x 6, 84 x 56 pixels, 6 tokens"
    assert lines[2] == "video 1: grid 2 x 4 x 4, 56 x 56 pixels, 4 frames, 1.000 s per grid, 8 tokens"
    start = int(np.flatnonzero(sample.input_ids == processor.family.special.image)[0])
    assert lines[3].startswith(
        f"positions (time, height, width): text 0-{start - 1}, image ({start}, {start}-{start + 1},"
    )
    text = "\n".join(lines[4:])
    assert "<|vision_start|>[6 x <|image_pad|>]<|vision_end|>" in text
    assert "[8 x <|video_pad|>]<|vision_end|>what?<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n«red<|im_end|>\n»")


def test_a_pair_shows_both_answers(processor):
    sample = processor(conversation())
    shown = text_view(Pair(sample, sample), processor)
    assert shown.startswith("chosen: ") and "\nrejected: " in shown


def test_pixels_come_back_from_their_patch_rows(processor):
    sample = processor(conversation(image(), video(4)))
    picture, clip = media(sample)
    shown = frames(picture, processor.image_settings, processor.family.geometry)
    assert len(shown) == 1
    np.testing.assert_array_equal(np.asarray(shown[0]), GRADIENT)
    greys = [np.asarray(frame) for frame in frames(clip, processor.video_settings, processor.family.geometry)]
    assert [(frame.min(), frame.max(), frame.shape) for frame in greys] == [
        (40 * i, 40 * i, (56, 56, 3)) for i in range(4)
    ]


def test_the_sheet_has_a_shelf_for_every_medium(processor):
    sheet = contact_sheet([processor(conversation(image())), processor(conversation(video(2)))], processor)
    assert sheet is not None
    assert sheet.size == (2 * 56 + 3 * 6, 56 + 56 + 3 * 6)
    assert contact_sheet([processor(conversation())], processor) is None
