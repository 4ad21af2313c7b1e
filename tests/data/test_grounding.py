"""Boxes and points: found in texts, rescaled, written in the form of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from duetvl.api import load_processor
from duetvl.core.batch import IGNORE
from duetvl.core.errors import DataError
from duetvl.core.family import Grounding
from duetvl.data.conversation import BoxPart, Conversation, ImagePart, RefPart, Turn
from duetvl.data.encode import RecordEncoder
from duetvl.data.formats.grounding import write_boxes
from duetvl.data.formats.reading import read_record
from duetvl.data.sources.records import Reading, Record
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.host import QwenVLFamily

HALVED = ((1000, 2000), (504, 1008))  # (height, width) in the file and in the model
SECOND = ((100, 100), (112, 56))


def talk(answer: str, question: str = "<image><image>Where?", **beside: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png", "b.png"][: question.count("<image>")], **beside}


def read(record: dict[str, Any], boxes: str = "as_written") -> Conversation:
    found = read_record(record, boxes=boxes)
    assert isinstance(found, Conversation)
    return found


def written(conversation: Conversation, style: Grounding) -> str:
    done = write_boxes(conversation, [HALVED, SECOND], style)
    assert all(isinstance(part, str | ImagePart) for turn in done.turns for part in turn.parts)
    return "".join(str(part) for part in done.turns[-1].parts)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "relative",
            "<|object_ref_start|>cat<|object_ref_end|> at <|box_start|>(50,200),(500,999)<|box_end|>, "
            "<|box_start|>(500,250)<|box_end|>",
        ),
        ("absolute", "cat at [50, 101, 504, 504], [28, 28]"),
    ],
)
def test_objects_of_swift(style: Grounding, expected: str) -> None:
    objects = {"ref": ["cat"], "bbox": [[100, 200, 1000, 1000], [50, 25]], "bbox_type": "real", "image_id": [0, 1]}
    assert written(read(talk("<ref-object> at <bbox>, <bbox>", objects=objects)), style) == expected


@pytest.mark.parametrize(
    ("style", "expected"),
    [("relative", "<|box_start|>(250,500),(999,999)<|box_end|>"), ("absolute", "[252, 252, 1008, 504]")],
)
def test_objects_as_parts_of_the_sides(style: Grounding, expected: str) -> None:
    objects = {"bbox": [[0.25, 0.5, 1, 1]], "bbox_type": "norm1"}
    assert written(read(talk("<bbox>", objects=objects)), style) == expected


JSON_BOX = '```json\n[{"bbox_2d": [50, 20, 100, 80.5], "label": "cat"}, {"point_2d":[10,20]}]\n```'
MARKUP = "A <|box_start|>(50,20),(100, 80)<|box_end|> and <|box_start|>(10,20)<|box_end|>."


@pytest.mark.parametrize(
    ("text", "boxes", "style", "expected"),
    [
        (JSON_BOX, "pixels", "absolute",
         '```json\n[{"bbox_2d": [28, 22, 56, 90], "label": "cat"}, {"point_2d":[6, 22]}]\n```'),
        (JSON_BOX, "pixels", "relative",
         '```json\n[{"bbox_2d": [500, 200, 999, 805], "label": "cat"}, {"point_2d":[100, 200]}]\n```'),
        (JSON_BOX, "norm1000", "absolute",
         '```json\n[{"bbox_2d": [3, 2, 6, 9], "label": "cat"}, {"point_2d":[1, 2]}]\n```'),
        (JSON_BOX, "as_written", "absolute", JSON_BOX),
        (MARKUP, "pixels", "absolute", "A [28, 22, 56, 90] and [6, 22]."),
        (MARKUP, "pixels", "relative",
         "A <|box_start|>(500,200),(999,800)<|box_end|> and <|box_start|>(100,200)<|box_end|>."),
        (MARKUP, "norm1000", "relative",
         "A <|box_start|>(50,20),(100,80)<|box_end|> and <|box_start|>(10,20)<|box_end|>."),
        (MARKUP, "as_written", "relative", MARKUP),
    ],
)  # fmt: skip
def test_coordinates_in_texts(text: str, boxes: str, style: Grounding, expected: str) -> None:
    """They belong to the last picture before them: the second one, of 100 x 100 pixels, 56 wide and 112 high here."""
    found = written(read(talk(text), boxes), style)
    assert found == expected
    if "json" in expected:
        json.loads(found.strip("`").removeprefix("json"))


BOX, WHOLE = "[28, 22, 56, 90]", "[0, 0, 56, 112]"  # [50, 20, 100, 80] and the whole of a picture of 100 x 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bbox_2d": [[50, 20, 100, 80], [0, 0, 100, 100]]}', f'{{"bbox_2d": [{BOX}, {WHOLE}]}}'),
        ('[{"bbox_2d": [[50, 20, 100, 80]], "label": "no 1"}]', f'[{{"bbox_2d": [{BOX}], "label": "no 1"}}]'),
        ('{"bbox_2d": [[50, 20], [100, 80]]}', '{"bbox_2d": [[28, 22], [56, 90]]}'),
        ('{"bbox_2d": ["50", "20", "100", "80"]}', f'{{"bbox_2d": {BOX}}}'),
        ('{"bbox_2d": "[50, 20, 100, 80]"}', f'{{"bbox_2d": "{BOX}"}}'),
        (r'{"arguments": "{\"bbox_2d\": [50, 20, 100, 80]}"}', rf'{{"arguments": "{{\"bbox_2d\": {BOX}}}"}}'),
        ("{'bbox': [5e1, 20., 100, 80.0]}", f"{{'bbox': {BOX}}}"),
        ("It is at [50, 20, 100, 80].", f"It is at {BOX}."),
        ('{"coordinate": [50, 20]}', '{"coordinate": [28, 22]}'),
        ('{"polygon": [50, 20, 100, 20, 100, 80]}', '{"polygon": [28, 22, 56, 22, 56, 90]}'),
        ('<p data-bbox="50 20 100 80">a</p>', '<p data-bbox="28 22 56 90">a</p>'),
        ("<|box_start|>(50,20),(100,80),(0,0),(100,100)<|box_end|>", f"{BOX}, {WHOLE}"),
        ("<|quad_start|>(50,20),(100,20),(100,80),(50,80)<|quad_end|>", "[28, 22, 56, 22, 56, 90, 28, 90]"),
        ('{"bbox_2d": [], "count": 5}', '{"bbox_2d": [], "count": 5}'),
        *(
            (prose, prose)
            for prose in (
                "Answer as [x1, y1, x2, y2]; 1,234,567,890 [1]",
                "A camera (2021, 33 MP)",
                "see [12][13] (Fig. 3, 4)",
                "1 2 3",
                "row 1 2 3 4",
                "from 1,234 to 5,678",
                "a box of 12, 3 of them red",
                "position 1,234",
            )
        ),
    ],
)
def test_every_shape_of_coordinates_is_rescaled(text: str, expected: str) -> None:
    assert written(read(talk(text), "pixels"), "absolute") == expected


def test_several_pairs_keep_their_mark() -> None:
    for mark, pairs in (("box", "(50,20),(99,80),(0,0),(10,10)"), ("quad", "(50,20),(99,20),(99,80),(50,80)")):
        text = f"<|{mark}_start|>{pairs}<|{mark}_end|>"
        assert written(read(talk(text), "norm1000"), "relative") == text


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("at (50,20),(100,80)", "(50,20)"),
        ("<box>50 20 100 80</box>", "<box>50"),
        ("<|box_start|>50,20<|box_end|>", "<|box_start|>50"),
        ("<|box_start|>(1,2),(3,4),(5,6)<|box_end|>", "(5,6)"),
        ("click [50, 20]", "[50, 20]"),
        ("at 50, 20, 100, 80", "50, 20, 100, 80"),
        ("click(x=50, y=20)", "x=50, y=20"),
        ('{"bbox_2d": "50 20 100 80"}', '"50 20'),
        ('{"bbox_2d": [[50, 20, 100, 80], [0, null, 9, 9]]}', "[50, 20, 100, 80], [0"),
        ('{"bbox_2d": [50, 20, 100, 80, "cat"]}', "[5"),
        ('{"bbox_2d": [50, 20, 100]}', "[50, 20, 100]"),
        ('{"bbox_2d": {"x1": 50}}', '"x1": 50'),
        ('{"box_2d": [20, 50, 80, 100]}', '"box_2d": [20, 50'),
        ('{"bbox_2d": [1, 2, 3, 4], "scores": [0.9, 0.1]}', '"scores": [0.9'),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', "parts of the picture's sides"),
        ("（50，20）", "（50，20）"),  # noqa: RUF001
        ("50 20 100 80", "50 20 100 80"),
        ("50 20 100 80\n0 0 9 9\n", "50 20 100 80"),
        ("{<50><20><100><80>}", "<50><20>"),
        ("<patch_index_0044><patch_index_0863>", "<patch_index_0044>"),
        ("box: 50 20 100 80", "box: 50 20"),
        ("the position 50, 20", "position 50, 20"),
        ("坐标：50，20", "坐标：50，20"),  # noqa: RUF001
        ("from 50,20 to 100,80", "50,20 to 100,80"),
        ("(50 px, 20 px)", "(50 px, 20 px)"),
        ("(50, 20, cat)", "(50, 20,"),
    ],
)
def test_coordinates_in_no_known_form_are_an_error(text: str, piece: str) -> None:
    with pytest.raises(DataError) as caught:
        read(talk(text), "pixels")
    assert piece in str(caught.value)
    assert read(talk(text)).turns[-1].parts == (text,)  # as written


def test_numbers_without_a_picture_are_no_coordinates() -> None:
    text = "Sorted: [1, 2, 3, 4], (5, 6)."
    assert read(talk(text, "Sort."), "pixels").turns[-1].parts == (text,)


def test_a_question_may_hold_a_box() -> None:
    question = "<image>What is <|box_start|>(0,0),(1000,500)<|box_end|>? And in <image>?"
    turn = read(talk("x", question), "pixels").turns[0]
    assert turn.parts[2] == BoxPart(0, (0, 0, 1000, 500))


def test_pairs_have_boxes_in_both_answers() -> None:
    box = "<|box_start|>({},0)<|box_end|>".format
    record = {"prompt": "<image>" + box(1), "images": ["a.png"], "chosen": box(2), "rejected": box(3)}
    pair = read_record(record, boxes="norm1000")
    assert not isinstance(pair, Conversation)
    values = [turn.parts[-1] for turn in (pair.prompt.turns[0], pair.chosen, pair.rejected)]
    assert values == [BoxPart(0, (x, 0), "norm1000") for x in (1, 2, 3)]


def test_labels_may_reach_a_little_beyond() -> None:
    conversation = Conversation((Turn("assistant", (BoxPart(1, (-0.5, 0, 100.6, 100.9)),)),))
    assert written(conversation, "absolute") == "[0, 0, 56, 112]"
    assert written(conversation, "relative") == "<|box_start|>(0,0),(999,999)<|box_end|>"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (BoxPart(1, (0, 0, 120, 50)), "box [0, 0, 120, 50] in pixels lies outside picture 2 of 100 x 100 pixels"),
        (BoxPart(1, (-5, 0)), "lies outside picture 2"),
        (BoxPart(0, (5, 5, 10, 10), "norm1"), "in norm1 lies outside picture 1 of 2000 x 1000 pixels"),
        (BoxPart(0, (5, 5, 10, 1100), "norm1000"), "in norm1000 lies outside"),
        (BoxPart(2, (0, 0)), "belongs to picture 3, of 2"),
    ],
)
def test_boxes_that_do_not_fit(part: BoxPart, message: str) -> None:
    with pytest.raises(DataError) as caught:
        write_boxes(Conversation((Turn("assistant", (part,)),)), [HALVED, SECOND], "absolute")
    assert message in str(caught.value)


def test_a_box_needs_a_picture() -> None:
    with pytest.raises(DataError, match="has no picture before it"):
        read({"messages": talk(MARKUP, "Where?")["messages"]}, "pixels")


def test_what_has_no_boxes_stays() -> None:
    conversation = Conversation((Turn("user", ("a", ImagePart("b.png"))), Turn("assistant", ("c",), trained=False)))
    done = write_boxes(conversation, [HALVED], "relative")
    assert all(new is old for new, old in zip(done.turns, conversation.turns, strict=True))


def test_names_of_objects() -> None:
    conversation = Conversation((Turn("user", (RefPart("a cat"),)),))
    assert written(conversation, "absolute") == "a cat"


@given(
    height=st.integers(28, 4000), width=st.integers(28, 4000), shrink=st.floats(0.3, 2),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)  # fmt: skip
def test_boxes_stay_where_they_are(height: int, width: int, shrink: float, corners: list[float]) -> None:
    """Written numbers, scaled back, are within half a unit of the box."""
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    box = BoxPart(0, (x1 * width, y1 * height, x2 * width, y2 * height))
    model = (max(28, round(height * shrink)), max(28, round(width * shrink)))
    conversation = Conversation((Turn("assistant", (box,)),))
    text = write_boxes(conversation, [((height, width), model)], "absolute").turns[0].parts[0]
    numbers = json.loads(str(text))
    for number, part, side in zip(numbers, (x1, y1, x2, y2), (model[1], model[0]) * 2, strict=True):
        assert 0 <= number <= side and abs(number - part * side) <= 0.5 + 1e-6


@pytest.mark.parametrize(("model_type", "style"), [("qwen2_vl", "relative"), ("qwen2_5_vl", "absolute")])
def test_families_say_what_they_expect(tiny_configs: Any, model_type: str, style: str) -> None:
    assert QwenVLFamily(ModelConfig.from_dict(tiny_configs(model_type))).grounding == style


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [("pixels", "At [0, 28, 70, 56]."), ("norm1000", "At [0, 6, 28, 11]."), ("as_written", None)],
)
def test_boxes_follow_the_resized_picture(
    processor_dir: Path, tmp_path: Path, boxes: str, expected: str | None
) -> None:
    """A file of 400 x 200 pixels enters the model as 140 x 56: at most 112 x 112 pixels, sides of 28."""
    Image.fromarray(np.zeros((200, 400, 3), np.uint8)).save(tmp_path / "a.png")
    encoder = RecordEncoder(load_processor(processor_dir))
    written = "At <|box_start|>(0,100),(200,200)<|box_end|>."
    record = Record(tmp_path / "a.jsonl", 1, "a.jsonl:1", talk(written, "<image>Where?"), Reading(boxes=boxes))
    draft = encoder.draft(record)
    assert draft.image_grid_thw.tolist() == [[1, 4, 10]]
    answer = draft.labels[draft.labels != IGNORE]
    said = encoder.processor.decode(answer, skip_special_tokens=False)
    assert said == f"{written if expected is None else expected}<|im_end|>\n"
