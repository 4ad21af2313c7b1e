"""Whatever a record holds, it is read, encoded, or refused with one line of a DataError: a worker never dies of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from random_records import records

from duetvl.api import load_processor
from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.conversation import BoxPart, Conversation, Preference, RefPart
from duetvl.data.encode import RecordEncoder
from duetvl.data.formats.reading import read_record
from duetvl.data.sources.records import Reading, Record
from duetvl.data.template import render

ROOT = Path("/media")
boxes_of_texts = st.sampled_from(["as_written", "pixels", "norm1000"])


@pytest.fixture(scope="module")
def encoder(processor_dir: Path) -> RecordEncoder:
    return RecordEncoder(load_processor(processor_dir))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the pictures that made-up records name."""
    directory = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(np.zeros((56, 84, 3), np.uint8)).save(directory / name)
    return directory


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=records, boxes=boxes_of_texts)
def test_no_record_breaks_the_encoder(
    encoder: RecordEncoder, pictures: Path, values: dict[str, Any], boxes: str
) -> None:
    record = Record(pictures / "made_up.jsonl", 7, "made_up.jsonl:7", values, Reading(boxes=boxes))
    sample = encoded_or_said(encoder, record)
    if sample is not None:
        batch = encoder.pack([sample])
        assert batch.tokens == len(sample) and len(batch.visual_dst) == len(batch.visual_src)


def encoded_or_said(encoder: RecordEncoder, record: Record) -> Sample | Pair | None:
    """A sample, or nothing after an error of one line that names the record."""
    try:
        return encoder.load(encoder.draft(record))
    except DataError as error:
        said = str(error)
    assert said.startswith("made_up.jsonl:7: ") and "\n" not in said
    return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    record=records,
    form=st.sampled_from(["auto", "messages", "sharegpt", "alpaca", "llava", "qwen", "swift", "preference"]),
    boxes=boxes_of_texts,
)
def test_no_record_raises_anything_but_data_error(record: dict[str, Any], form: str, boxes: str) -> None:
    found = read_or_say(record, form=form, media_dirs=[ROOT], boxes=boxes)
    for conversation in conversations(found):
        assert conversation.turns[-1].role == "assistant"
        if not any(isinstance(part, BoxPart | RefPart) for each in conversation.turns for part in each.parts):
            layout(conversation)


def layout(conversation: Conversation) -> None:
    """Every text of it can be handed to a tokenizer, or is refused."""
    try:
        pieces = list(render(conversation))
    except DataError as error:
        assert "half of a character" in str(error)  # noqa: PT017
        return
    assert all(piece.text.encode() or piece.medium for piece in pieces)


def read_or_say(record: dict[str, Any], **how: Any) -> Conversation | Preference | None:
    """What is read, or nothing after an error of one line."""
    try:
        return read_record(record, **how)
    except DataError as error:
        said = str(error)
    assert said and "\n" not in said
    return None


def conversations(found: Conversation | Preference | None) -> list[Conversation]:
    if isinstance(found, Preference):
        return [Conversation((*found.prompt.turns, answer)) for answer in (found.chosen, found.rejected)]
    return [] if found is None else [found]
