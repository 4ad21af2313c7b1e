"""Records of every layout: what they become, and what is said of those that contradict themselves."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from duetvl.core.errors import DataError
from duetvl.data.conversation import BoxPart, Conversation, ImagePart, Preference, RefPart, Turn, VideoPart
from duetvl.data.formats.reading import read_record
from duetvl.data.media.images import Resize

ROOT = Path("/media")


def plain(part: Any) -> Any:
    """A part as a value that compares."""
    if isinstance(part, ImagePart):
        return ("image", str(part.source))
    if isinstance(part, VideoPart):
        listed = isinstance(part.source, list)
        return ("video", [str(frame) for frame in part.source] if listed else str(part.source))
    return part


def turns(found: Conversation | Preference) -> list[tuple[Any, ...]]:
    assert isinstance(found, Conversation)
    return [turn(each) for each in found.turns]


def turn(each: Turn) -> tuple[Any, ...]:
    return (each.role, *map(plain, each.parts))


def pair(found: Conversation | Preference) -> tuple[Any, Any, Any]:
    assert isinstance(found, Preference)
    assert not any(each.trained for each in found.prompt.turns)
    return turns(found.prompt), turn(found.chosen), turn(found.rejected)


A, B = ("image", "/media/a.png"), ("image", "/media/b.png")
DIALOGUE = [("user", "hi"), ("assistant", "yo"), ("user", A, "what?"), ("assistant", "a box")]
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
    {"from": "human", "value": "<image>what?"},
    {"from": "gpt", "value": "a box"},
]
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "<image>what?"},
    {"role": "assistant", "content": "a box"},
]
PARTS = [
    *MESSAGES[:2],
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
    MESSAGES[3],
]
EMPTY, WHAT = {"type": "image"}, {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("sharegpt", {"conversations": SHAREGPT, "images": ["a.png"]}),
        ("messages", {"messages": MESSAGES, "images": ["a.png"]}),
        ("messages", {"messages": MESSAGES, "images": "a.png", "videos": [], "system": "", "tools": None}),
        ("messages", {"messages": json.dumps(MESSAGES), "images": json.dumps(["a.png"])}),
        ("messages", {"messages": MESSAGES, "images": [{"bytes": None, "path": "a.png"}]}),
        ("messages", {"messages": PARTS}),
        ("messages", {"messages": [*PARTS[:2], {"role": "user", "content": [EMPTY, WHAT]}, PARTS[3]], "image": A[1]}),
        ("swift", {"messages": MESSAGES, "images": ["a.png"], "channel": "x"}),
        ("llava", {"id": "7", "image": "a.png", "conversations": SHAREGPT}),
        ("qwen", {"image": ["a.png"], "conversations": SHAREGPT}),
        ("alpaca", {"instruction": "<image>what?", "output": "a box", "history": [["hi", "yo"]], "images": ["a.png"]}),
    ],
)  # fmt: skip
def test_one_dialogue_in_every_layout(form: str, record: dict[str, Any]) -> None:
    assert turns(read_record(record, media_dirs=[ROOT])) == DIALOGUE
    assert turns(read_record(record, form=form, media_dirs=[ROOT])) == DIALOGUE


def test_columns_and_tags_of_dataset_info() -> None:
    talk = [
        {"who": "sys", "what": "S"}, {"who": "me", "what": "<image>"}, {"who": "it", "what": '{"name": "f"}'},
        {"who": "result", "what": "4"}, {"who": "bot", "what": "four"},
    ]  # fmt: skip
    tags = {
        "role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "bot",
        "function_tag": "it", "observation_tag": "result", "system_tag": "sys",
    }  # fmt: skip
    columns = {"messages": "talk", "images": "pics"}
    found = read_record({"talk": talk, "pics": ["a.png"]}, columns=columns, tags=tags, media_dirs=[ROOT])
    assert turns(found) == [
        ("system", "S"), ("user", A), ("assistant", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
        ("tool", "4"), ("assistant", "four"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="unknown role 'human'"):
        read_record({"talk": [{"who": "human", "what": "a"}]}, columns=columns, tags=tags)


def test_alpaca_joins_instruction_and_input() -> None:
    record = {"instruction": "a", "input": "b", "output": "c", "system": "S"}
    assert turns(read_record(record)) == [("system", "S"), ("user", "a\nb"), ("assistant", "c")]
    renamed = {"q": "a", "more": "b", "r": "c"}
    columns = {"prompt": "q", "query": "more", "response": "r"}
    assert turns(read_record(renamed, columns=columns)) == [("user", "a\nb"), ("assistant", "c")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "what?", "completion": "a box", "image": "a.png"},
        {"prompt": "<image>what?", "completion": "a box", "image": "a.png"},
        {"prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "a box"}],
         "images": ["a.png"]},
        {"query": "<image>what?", "response": "a box", "images": ["a.png"]},
        {"index": "3", "question": "what?", "answer": "a box", "image": "a.png"},
    ],
)  # fmt: skip
def test_questions_and_answers(record: dict[str, Any]) -> None:
    """Where a question has no marker its pictures come first, as in TRL."""
    found = turns(read_record(record, media_dirs=[ROOT]))
    assert found == [("user", A, "what?"), ("assistant", "a box")]


GOOD, BAD = ("assistant", "good"), ("assistant", "bad")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "<image>q"}], "images": ["a.png"],
         "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        {"messages": [{"role": "user", "content": "<image>q"}], "images": ["a.png"],
         "chosen": {"role": "assistant", "content": "good"}, "rejected": {"role": "assistant", "content": "bad"}},
        {"id": 1, "image": "a.png", "prompt": "<image>q", "chosen": "good", "rejected": "bad"},
        {"images": ["a.png"], "prompt": [{"role": "user", "content": [EMPTY, {"type": "text", "text": "q"}]}],
         "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
         "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "bad"}]}]},
        {"images": ["a.png"],
         "chosen": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "bad"}]},
        {"instruction": "<image>q", "input": "", "chosen": "good", "rejected": "bad", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "good"}],
         "rejected_response": "bad", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "good"}],
         "rejected_messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "bad"}],
         "images": ["a.png"]},
    ],
)  # fmt: skip
def test_one_pair_in_every_layout(record: dict[str, Any]) -> None:
    for form in ("auto", "preference"):
        found = read_record(record, form=form, media_dirs=[ROOT])
        assert pair(found) == ([("user", A, "q")], GOOD, BAD)


def test_sources_of_pictures() -> None:
    given = ["data:image/png;base64,AAAA", "file:///x.png", "/abs/x.png", b"\x89PNG", {"bytes": b"GIF", "path": "a"}]
    content: list[Any] = [{"type": "image_url", "image_url": {"url": "u.png"}}, {"type": "image_url", "value": "v.png"}]
    content += [{"type": "image", "image": source} for source in given]
    found = read_record({"messages": [{"role": "user", "content": content}, GPT]}, media_dirs=[ROOT])
    assert isinstance(found, Conversation)
    sources = [part.source for part in found.turns[0].parts if isinstance(part, ImagePart)]
    assert [str(source) for source in sources[:2]] == ["/media/u.png", "/media/v.png"]
    assert sources[2] == given[0] and [str(source) for source in sources[3:5]] == ["/x.png", "/abs/x.png"]
    assert sources[5:] == [b"\x89PNG", b"GIF"]


GPT = {"role": "assistant", "content": "x"}


def test_a_table_may_hold_pictures_as_base64() -> None:
    content = bytes(range(256)) * 2
    text = base64.b64encode(content).decode()
    found = read_record({"question": "q", "answer": "a", "image": text}, media_dirs=[ROOT])
    assert isinstance(found, Conversation) and isinstance(found.turns[0].parts[0], ImagePart)
    assert found.turns[0].parts[0].source == content


def test_videos_and_their_settings() -> None:
    talk = [{"role": "user", "content": "<video><video><image>"}, GPT]
    sample = {"min_pixels": 784, "max_pixels": 3136, "fps": 0.5}
    record = {
        "messages": talk,
        "videos": ["a.mp4", ["1.png", "2.png"]],
        "images": ["c.png"],
        "chat_template_kwargs": sample,
    }
    found = read_record(record, media_dirs=[ROOT])
    assert isinstance(found, Conversation)
    file, frames, image = found.turns[0].parts
    assert plain(file) == ("video", "/media/a.mp4") and plain(frames) == ("video", ["/media/1.png", "/media/2.png"])
    assert isinstance(file, VideoPart) and isinstance(frames, VideoPart) and isinstance(image, ImagePart)
    assert file.fps == frames.fps == 0.5
    assert file.wish == frames.wish == image.wish == Resize(784, 3136)
    part = {"type": "video", "video": "b.mp4", "nframes": 8, "video_start": 0, "video_end": 2.5, "min_frames": 4,
            "max_frames": 16, "total_pixels": 100000, "fps": 1, "max_pixels": 784}  # fmt: skip
    found = read_record({"messages": [{"role": "user", "content": [part]}, GPT], "chat_template_kwargs": sample})
    assert isinstance(found, Conversation)
    own = found.turns[0].parts[0]
    assert isinstance(own, VideoPart)
    assert (own.frames, own.start, own.end, own.min_frames, own.max_frames) == (8, 0.0, 2.5, 4, 16)
    assert (own.total_pixels, own.fps, own.wish) == (100000, 1.0, Resize(784, 784))


def test_boxes_beside_messages() -> None:
    talk = [
        {"role": "user", "content": "<image><image>Where is <ref-object>?"},
        {"role": "assistant", "content": "At <bbox>, <bbox>."},
    ]
    objects = {"ref": ["cat"], "bbox": [[1, 2, 3, 4], [5, 6]], "image_id": [1, 0]}
    found = read_record({"messages": talk, "images": ["a.png", "b.png"], "objects": objects}, media_dirs=[ROOT])
    assert turns(found) == [
        ("user", A, B, "Where is ", RefPart("cat"), "?"),
        ("assistant", "At ", BoxPart(1, (1.0, 2.0, 3.0, 4.0)), ", ", BoxPart(0, (5.0, 6.0)), "."),
    ]


def test_markers_without_objects_are_text() -> None:
    talk = [{"role": "user", "content": "<bbox>"}, {"role": "assistant", "content": "<ref-object>"}]
    assert turns(read_record({"messages": talk})) == [("user", "<bbox>"), ("assistant", "<ref-object>")]


def test_system_prompts_hold_no_pictures() -> None:
    talk = [{"role": "system", "content": "Say <image>."}, {"role": "user", "content": "a"}, GPT]
    assert turns(read_record({"messages": talk}))[0] == ("system", "Say <image>.")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected a record (an object), found list"),
        ({}, "found nothing"),
        ({"a": 1}, "has no known layout: it has neither messages"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": {}}, "messages must be a list of messages, found dict"),
        ({"messages": "hi"}, "messages must be JSON, found 'hi'"),
        ({"messages": [user("a")]}, "ends with the user's message"),
        ({"messages": [user("a"), GPT, GPT]}, "message 3: expected the user, found the assistant"),
        ({"messages": [user("a"), user("b")]}, "message 2: expected the assistant, found the user"),
        ({"messages": [user("a"), {"role": "tool", "content": "4"}, GPT]}, "message 2: expected the assistant"),
        ({"messages": [{"role": "tool", "content": "4"}, GPT]}, "message 1: expected the user, found the tool"),
        ({"messages": [user("a"), {"role": "asistant", "content": "b"}]}, "unknown role 'asistant'; did you mean"),
        ({"messages": [user("a"), {"role": ["x"], "content": "b"}]}, "message 2: unknown role"),
        ({"messages": [user("<image>"), GPT]}, "the texts hold 1 <image> markers, but images lists 0; a marker meant"),
        ({"messages": [user("Picture 1: <img>a.png</img>\n?"), GPT]}, "'<img>a.png</img>' would be plain text"),
        ({"messages": [user("a"), GPT], "rejected_messages": [user("b"), GPT]}, "rejected must be one answer"),
        ({"messages": [user("<image>"), GPT], "images": ["a", "b"]}, "hold 1 <image> markers, but images lists 2"),
        ({"messages": [user("<image>"), GPT], "image": "a", "images": ["b"]}, "both 'images' and 'image'; keep one"),
        ({"messages": [user("a"), {"role": "assistant", "content": "<image>"}], "images": ["a"]}, "not in the as"),
        ({"messages": [user("a"), {**GPT, "loss": 0.5}]}, "loss is 0.5; expected true or 1 (trained)"),
        ({"messages": [user("a"), {**GPT, "loss": "no"}]}, "loss is 'no'"),
        ({"messages": [user("a"), {**GPT, "weight": 0.5}]}, "weight is 0.5; expected true or 1"),
        ({"messages": [user("a"), {**GPT, "weight": 0, "train": True}]}, "weight and train contradict each other"),
        ({"messages": [{**user("a"), "weight": 2}, GPT]}, "message 1: weight is 2"),
        ({"messages": [{**user("a"), "images": ["a.png"]}, GPT]}, "message 1: a message's own 'images' is not read"),
        ({"prompt": "a", "chosen": {**GPT, "weight": 0}, "rejected": "c"}, "chosen says that it is not trained"),
        ({"prompt": "a", "chosen": GPT, "rejected": {**GPT, "loss": False}}, "rejected says that it is not trained"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "message 2: content must be a text"),
        ({"messages": [user("a"), {"role": "system", "content": "S"}, GPT]}, "found the system"),
        ({"messages": [{"role": "system", "content": "S"}, user("a"), GPT], "system": "T"}, "keep one"),
        ({"messages": [user("a"), GPT], "system": 3}, "'system' must be a text, found int"),
        ({"messages": [user("a"), GPT], "tools": "{"}, "tools must be JSON"),
        ({"messages": [user("a"), GPT], "tools": [1]}, "tools must be a list of functions"),
        ({"messages": [user("a"), GPT], "audios": ["a.wav"]}, "audios, which these models do not support"),
        ({"messages": [user("a"), {"role": "function_call", "content": "f()"}]}, "a function call must be JSON"),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{}]}]}, "needs a name and arguments"),
        ({"messages": [user("<video>"), GPT], "videos": [[]]}, "a video part needs its file or its frames"),
        ({"messages": [user("<video>"), GPT], "videos": [3]}, "a picture or video cannot be 3"),
        ({"messages": [user("<image>"), GPT], "images": [["a"]]}, "must be one path, data URI or bytes"),
        ({"messages": [user("<image>"), GPT], "images": [3]}, "a picture or video cannot be 3"),
        ({"messages": [user("<image>"), GPT], "images": [{"x": 1}]}, "needs one of bytes, url, path; found x"),
        ({"messages": [user("<image>"), GPT], "images": ["\ud800"]}, "'\\ud800' is not a path"),
        ({"messages": [user("<image>"), GPT], "images": [""]}, "'' is not a path"),
        ({"messages": [user([{"type": "image"}]), GPT], "images": ["a", "b"]}, "of which 1 belong to no message"),
        ({"messages": [user([{"type": "image"}] * 2), GPT], "images": ["a"]}, "fewer than the messages need"),
        ({"messages": [user("a"), GPT], "chat_template_kwargs": 4}, "chat_template_kwargs must be an object"),
        ({"messages": [user("a<bbox>"), GPT], "objects": {"bbox": []}}, "hold 1 <bbox> markers, but objects.bbox"),
        ({"messages": [user("a<bbox>"), GPT], "objects": {"bbox": [[1, 2]]}}, "picture 0, the record has 0"),
        ({"messages": [user("a"), GPT], "objects": {"bbox": [[1, 2, 3]], "image_id": [0]}, "image": "a"}, "a box is"),
        ({"messages": [user("a"), GPT], "objects": {"bbox": [[5, 0, 1, 9]]}, "image": "a"}, "in the wrong order"),
        ({"messages": [user("a"), GPT], "objects": {"bbox_type": "x"}}, "expected real"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history must be a list of [question, answer]"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be a list of [question, answer]"),
        ({"instruction": "a", "output": 3}, "must be a text, a message or a list"),
        ({"instruction": ["a"], "output": "b"}, "message 1: expected an object"),
        ({"messages": [user("a")], "chosen": "b"}, "found no rejected"),
        ({"messages": [user("a")], "rejected": "b"}, "found no chosen"),
        ({"messages": [user("a"), GPT], "chosen": "b", "rejected": "c"}, "expected the user, found the assistant"),
        ({"messages": [user("a")], "chosen": user("b"), "rejected": "c"}, "expected the assistant, found the user"),
        ({"messages": [user("a")], "chosen": "b", "rejected": user("c")}, "rejected: an answer must be the assist"),
        ({"messages": [user("a")], "chosen": "b", "rejected": {}}, "rejected: unknown role None"),
        ({"prompt": "a", "chosen": [GPT, user("b")], "rejected": "c"}, "chosen must be one answer to the prompt"),
        ({"chosen": [user("a"), GPT], "rejected": [user("b"), GPT]}, "have no common prompt"),
        ({"chosen": "a", "rejected": "b"}, "have no common prompt"),
    ],
)  # fmt: skip
def test_contradictions(record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_record(record)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["loss", "loss_scale", "loss_weight", "weight", "train", "training", "trainable"])
def test_keys_that_say_what_is_trained(key: str) -> None:
    for value, trained in ((0, False), (False, False), (1.0, True), (True, True), (None, None)):
        found = read_record({"messages": [{**user("a"), key: 0}, {**GPT, key: value}]})
        assert isinstance(found, Conversation) and [t.trained for t in found.turns] == [None, trained]
        assert [t.unread for t in found.turns] == [(), ()]


def test_json_in_a_text_may_have_a_byte_order_mark() -> None:
    talk = json.dumps([user("a"), GPT])
    assert turns(read_record({"messages": f"\ufeff{talk}"})) == [("user", "a"), ("assistant", "x")]


def test_keys_that_seem_to_hold_media_are_named() -> None:
    like = ("rejected_images", "question_image", "img", "image_path", "source_video_url")
    others = ("num_images", "has_video", "image_id", "frame_rate", "imagination")
    found = read_record({"messages": [user("a"), GPT], **dict.fromkeys((*like, *others), "a.png")})
    assert isinstance(found, Conversation) and found.unread == like


def test_what_is_not_read_is_named() -> None:
    answer = {**GPT, "id": 3, "reasoning_content": "hm", "refusal": None, "annotations": [], "mask": False}
    asked = {**user([{"type": "text", "text": "a", "image": None, "weight": 0}]), "train": True}
    found = read_record({"messages": [asked, answer], "label": False, "image_path": "a.png", "image_id": 3})
    assert isinstance(found, Conversation)
    assert found.unread == ("label", "image_path")
    assert [each.unread for each in found.turns] == [("weight", "train"), ("reasoning_content", "mask")]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"form": "alpacca"}, "no format 'alpacca'; did you mean 'alpaca'?"),
        ({"form": "alpaca"}, "the record has no 'output' or 'response' or"),
        ({"form": "preference"}, "needs chosen and rejected, found no chosen"),
        ({"columns": {"mesages": "m"}}, "columns has no 'mesages'; did you mean 'messages'?"),
        ({"columns": {"messages": "talk"}}, "no known layout"),
        ({"columns": {"messages": "talk"}, "form": "sharegpt"}, "the record has no 'talk'; found 'messages'"),
        ({"tags": {"user": "me"}}, "tags has no 'user'; did you mean 'user_tag'?"),
        ({"boxes": "pixel"}, "boxes is 'pixel', expected as_written, pixels or norm1000"),
    ],
)
def test_settings_that_do_not_fit(how: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_record({"messages": [user("a"), GPT]}, **how)
    assert message in str(caught.value)


DOCUMENT = Path(__file__).parents[2] / "docs" / "data_formats.md"


def test_records_of_the_documentation() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = [read_record(json.loads(block)) for block in blocks]
    assert [type(each) for each in found] == [Conversation] * 6 + [Preference] * 3
