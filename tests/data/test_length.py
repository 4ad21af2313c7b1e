"""Samples that are too long: what is cut, what never is, what is made smaller, what is left out."""

import pickle
import re
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from duetvl.api import load_processor
from duetvl.core.batch import IGNORE, Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Dropped
from duetvl.data.encode import EncodeSettings, Processor, RecordEncoder
from duetvl.data.excess import SampleTooLong
from duetvl.data.length import proportions
from duetvl.data.sources.records import Record
from duetvl.data.tokenizer import TextTokenizer

SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def processor(processor_dir: Path) -> Processor:
    return load_processor(processor_dir)


def record(*turns: Any, **rest: Any) -> Record:
    """Turns of user and assistant by turns; a list has texts and pictures (arrays)."""
    messages = [
        {
            "role": "assistant" if at % 2 else "user",
            "content": turn if isinstance(turn, str) else list(map(_part, turn)),
        }
        for at, turn in enumerate(turns)
    ]
    return Record(Path("chat.jsonl"), 7, "chat.jsonl:7", {"messages": messages, **rest})


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video", "video": part} if isinstance(part, list) else {"type": "image", "image": part}


def picture(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def drafted(processor: Processor, found: Record, **options: Any) -> Draft:
    return RecordEncoder(processor, EncodeSettings(**options)).draft(found)


def text(processor: Processor, ids: np.ndarray) -> str:
    return processor.decode(ids, skip_special_tokens=False)


# -- truncate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "limit", "expected"),
    [  # made by hand from the rule, as LLaMA-Factory's tests have some of them
        (3000, 2000, 1000, (600, 400)),
        (2000, 3000, 1000, (400, 600)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
        (100, 500, 1000, (100, 500)),
        (500, 100, 1000, (500, 100)),
        (500, 500, 1000, (500, 500)),
        (10, 10, 10, (5, 5)),
        (7, 3, 9, (6, 3)),
    ],
)
def test_proportions(source: int, target: int, limit: int, expected: tuple[int, int]) -> None:
    assert proportions(source, target, limit) == expected


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASKED, TOLD, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


def count(processor: Processor, shown: str) -> int:
    """Tokens of a text with control tokens in it: one for each of those, and the rest as text."""
    parts = re.split(r"<\|\w+\|>", shown)
    return len(parts) - 1 + sum(len(processor.tokenizer.encode(part)) for part in parts)


def truncated(processor: Processor, room: int, found: Record, **options: Any) -> Draft:
    """Cut to the system turn and `room` tokens."""
    return drafted(processor, found, cutoff_len=count(processor, HEAD) + room, too_long="truncate", **options)


@pytest.mark.parametrize(
    ("turns", "room", "expected"),
    [  # headers and ends are 11 tokens of an exchange, each letter is one
        # a long question gives way to its answer; its header and end stay
        (["1234567890", "ok"], 16, f"{ASKED}123{END}{TOLD}ok{END}"),
        # a long answer ends without the tokens that say so
        (["12", "1234567890"], 20, f"{ASKED}1{END}{TOLD}1234567890"),
        # both: 17 of 31 tokens are the question's side and 12 the answer's
        (["1234567890", "1234567890"], 20, f"{ASKED}1234{END}{TOLD}1234567"),
        # an exchange that fits is whole, the one after it is cut, what comes then is left out
        (["1", "2", "3456789", "4", "5", "6"], 27, f"{ASKED}1{END}{TOLD}2{END}{ASKED}34{END}{TOLD}4{END}"),
        (["1", "2", "3456789", "4"], 22, f"{ASKED}1{END}{TOLD}2{END}"),
    ],
)
def test_what_is_cut(processor: Processor, turns: list[str], room: int, expected: str) -> None:
    draft = truncated(processor, room, record(*turns))
    assert text(processor, draft.input_ids) == HEAD + expected
    assert draft.notes == ("truncated",) and draft.where == "chat.jsonl:7"


def test_the_last_answer_alone_is_kept_from_the_back(processor: Processor) -> None:
    draft = truncated(processor, 27, record("123456789", "2", "3", "4"), mask_history=True)
    assert text(processor, draft.input_ids) == HEAD + f"{ASKED}12{END}{TOLD}2{END}{ASKED}3{END}{TOLD}4{END}"
    assert text(processor, draft.labels[draft.labels != IGNORE]) == f"4{END}"


def test_pictures_are_never_cut(processor: Processor) -> None:
    """Text behind and before a picture goes; the picture stays whole, or its exchange goes as a whole."""
    found = record(["12345", picture(56, 56), "67890"], "ok")
    block = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"
    draft = truncated(processor, 23, found)
    assert text(processor, draft.input_ids) == HEAD + f"{ASKED}1234{block}{END}{TOLD}ok{END}"
    with pytest.raises(Dropped, match=r"chat\.jsonl:7: its first exchange without its texts does not fit"):
        truncated(processor, 15, found)
    later = truncated(processor, 20, record("1", "2", ["3", picture(56, 56)], "4"))
    assert text(processor, later.input_ids) == HEAD + f"{ASKED}1{END}{TOLD}2{END}"
    assert later.media == () and len(later.image_grid_thw) == 0


def test_a_pair_is_cut_at_one_place(processor: Processor) -> None:
    answers = {
        "chosen": {"role": "assistant", "content": "12345678"},
        "rejected": {"role": "assistant", "content": "9"},
    }
    prompt = {"messages": [{"role": "user", "content": "abcdefgh"}], **answers}
    found = Record(Path("p.jsonl"), 1, "p.jsonl:1", prompt)
    whole = drafted(processor, found)
    limit = count(processor, HEAD) + 20
    draft = drafted(processor, found, cutoff_len=limit, too_long="truncate")
    assert draft.rejected is not None and whole.rejected is not None
    chosen, rejected = text(processor, draft.input_ids), text(processor, draft.rejected[0])
    assert len(draft.input_ids) <= limit < len(whole.input_ids)
    assert rejected.endswith(f"{TOLD}9{END}") and chosen.partition(TOLD)[0] == rejected.partition(TOLD)[0]
    assert text(processor, draft.labels[draft.labels != IGNORE]) == chosen.partition(TOLD)[2]


def test_a_sample_without_trained_tokens_is_left_out(processor: Processor) -> None:
    """The only trained answer is the one that does not fit."""
    messages = [
        {"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": False},
        {"role": "user", "content": "3" * 50}, {"role": "assistant", "content": "4"},
    ]  # fmt: skip
    found = Record(Path("chat.jsonl"), 7, "chat.jsonl:7", {"messages": messages})
    with pytest.raises(Dropped, match="none of its trained tokens is left"):
        truncated(processor, 16, found)


# -- the other policies ------------------------------------------------------------------------------------------------


def test_error_and_drop(processor: Processor) -> None:
    found = record("a", "b")
    with pytest.raises(DataError) as caught:
        drafted(processor, found, cutoff_len=20)
    assert not isinstance(caught.value, Dropped)
    assert str(caught.value).startswith(
        "chat.jsonl:7: has 30 tokens, the longest may have 20: text 30; give data.cutoff_len=30 (more memory)"
    )
    with pytest.raises(Dropped, match=r"chat\.jsonl:7: has 30 tokens, the longest may have 20"):
        drafted(processor, found, cutoff_len=20, too_long="drop")
    assert drafted(processor, found, cutoff_len=30, too_long="drop").notes == ()


def within(processor: Processor, key: str, value: int) -> Processor:
    """The same with a bound that an error proposes, as a recipe with it has."""
    other, own = copy(processor), processor.media
    picture_bound = key == "data.max_pixels"
    other.media = (
        replace(own, image=replace(own.image, max_pixels=value)) if picture_bound else replace(own, total_pixels=value)
    )
    return other


@pytest.mark.parametrize(
    ("parts", "long", "bound"),
    [
        ([picture(112, 112)] * 3, "3 pictures 48", "data.max_pixels=11760 (smaller pictures)"),
        (
            [picture(28, 56), [picture(112, 112)] * 8],
            "1 picture 2, 1 video 64",
            "data.video_total_pixels=49392 (smaller frames; ",
        ),
    ],
)
def test_an_error_says_what_is_long_and_what_would_fit(
    processor: Processor, parts: list[Any], long: str, bound: str
) -> None:
    found = record(["look ", *parts], "ok")
    limit = drafted(processor, found).tokens - 20
    with pytest.raises(SampleTooLong) as caught:
        drafted(processor, found, cutoff_len=limit)
    error = pickle.loads(pickle.dumps(caught.value))  # as workers send it
    assert f", {long}; give {bound}" in str(error) and f" or data.cutoff_len={limit + 20} (more memory)" in str(error)
    assert error.excess == caught.value.excess
    key, value = error.excess.bound
    assert drafted(within(processor, key, value), found, cutoff_len=limit).tokens <= limit
    with pytest.raises(SampleTooLong):  # one more token's area is too much
        drafted(within(processor, key, value + 784), found, cutoff_len=limit)


def test_pictures_and_videos_shrink_by_one_share(processor: Processor) -> None:
    found = record(["look ", picture(112, 112), picture(56, 112), [picture(112, 112)] * 4], "ok")
    whole = drafted(processor, found)
    assert whole.image_grid_thw.tolist() == [[1, 8, 8], [1, 4, 8]] and whole.video_grid_thw.tolist() == [[2, 8, 8]]
    media = 16 + 8 + 32
    draft = drafted(processor, found, cutoff_len=whole.tokens - media + 31, too_long="shrink")
    assert draft.notes == ("shrunk",)
    # 9 + 3 + 18 tokens; sides are multiples of 28, so a larger share is the whole
    assert draft.image_grid_thw.tolist() == [[1, 6, 6], [1, 2, 6]] and draft.video_grid_thw.tolist() == [[2, 6, 6]]
    with pytest.raises(Dropped, match="with its pictures and videos at their smallest it exceeds"):
        drafted(processor, found, cutoff_len=whole.tokens - media + 3, too_long="shrink")
    with pytest.raises(Dropped, match="30 of them text"):
        drafted(processor, record("a", "b"), cutoff_len=20, too_long="shrink")


def test_boxes_follow_a_picture_that_shrinks(processor: Processor) -> None:
    """In pixels of the picture as the model sees it: the right lower corner is its size."""
    objects = {"ref": [], "bbox": [[0, 0, 112, 112]]}
    values = {
        "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<bbox>"}],
        "images": [picture(112, 112)], "objects": objects,
    }  # fmt: skip
    found = Record(Path("chat.jsonl"), 7, "chat.jsonl:7", values)
    whole = drafted(processor, found)
    assert "[0, 0, 112, 112]" in text(processor, whole.input_ids)
    small = drafted(processor, found, cutoff_len=whole.tokens - 1, too_long="shrink")
    assert small.image_grid_thw.tolist() == [[1, 6, 6]] and "[0, 0, 84, 84]" in text(processor, small.input_ids)


# -- whatever the sample -----------------------------------------------------------------------------------------------

SIZES = st.integers(10, 200)
PARTS = st.one_of(st.text("ab \n1", max_size=12), st.builds(picture, SIZES, SIZES))
ASKING = st.lists(PARTS, min_size=1, max_size=4)
TURNS = st.lists(st.tuples(ASKING, st.text("xy \n2", max_size=20)), min_size=1, max_size=3)


def check(processor: Processor, draft: Draft, limit: int) -> Sample:
    """What holds for every draft: its length, its media and its tokens agree, and its pixels come out as it says."""
    assert len(draft.input_ids) <= limit and len(draft.labels) == len(draft.input_ids)
    assert text(processor, draft.input_ids).startswith(HEAD)
    sample = RecordEncoder(processor).load(draft)
    assert isinstance(sample, Sample)
    assert np.array_equal(sample.image_grid_thw, draft.image_grid_thw)
    batch = processor.pack([sample])  # refuses a sample whose tokens and media disagree
    assert len(batch.pixel_rows) == draft.patches
    return sample


@SMALL
@given(TURNS, st.integers(20, 120), st.booleans())
def test_truncated_samples_are_whole(processor: Processor, turns: Any, limit: int, mask_history: bool) -> None:
    found = record(*(part for turn in turns for part in turn))
    whole = drafted(processor, found, mask_history=mask_history)
    try:
        draft = drafted(processor, found, cutoff_len=limit, too_long="truncate", mask_history=mask_history)
    except Dropped:
        assert whole.tokens > limit
        return
    check(processor, draft, limit)
    assert draft.trained_tokens > 0
    assert (draft.tokens < whole.tokens) == (draft.notes == ("truncated",)) == (whole.tokens > limit)
    kept = {id(medium.part.source) for medium in draft.media}
    assert kept <= {id(medium.part.source) for medium in whole.media}


@SMALL
@given(TURNS, st.integers(20, 120))
@example([([picture(15, 81)], ""), ([picture(42, 71)], "")], 50)  # the first would grow from 12 to 16 patches
def test_shrunk_samples_keep_their_text(processor: Processor, turns: Any, limit: int) -> None:
    found = record(*(part for turn in turns for part in turn))
    whole = drafted(processor, found)
    try:
        draft = drafted(processor, found, cutoff_len=limit, too_long="shrink")
    except Dropped:
        assert whole.tokens > limit
        return
    check(processor, draft, limit)
    pad = processor.family.special.image
    assert np.array_equal(draft.input_ids[draft.input_ids != pad], whole.input_ids[whole.input_ids != pad])
    # Areas, not sides: at another area a narrow picture may round to one side more and another less.
    assert (draft.image_grid_thw.prod(axis=1) <= whole.image_grid_thw.prod(axis=1)).all()


def test_pairs_are_loaded_with_one_set_of_pixels(processor: Processor) -> None:
    answers = {name: {"role": "assistant", "content": name} for name in ("chosen", "rejected")}
    prompt = [{"role": "user", "content": "<image>?"}]
    values = {"messages": prompt, "images": [picture(56, 56)], **answers}
    encoder = RecordEncoder(processor)
    draft = encoder.draft(Record(Path("p.jsonl"), 1, "p.jsonl:1", values))
    pair = encoder.load(draft)
    assert isinstance(pair, Pair) and pair.rejected.pixel_values is None
    assert np.array_equal(pair.chosen.image_grid_thw, pair.rejected.image_grid_thw)
    for sample, answer in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        assert sample.labels is not None
        assert text(processor, sample.labels[sample.labels != IGNORE]) == f"{answer}<|im_end|>\n"
    assert len(encoder.pack([pair]).cu_seqlens) == 3


# -- texts of any length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "kind"), [("error", DataError), ("drop", Dropped), ("shrink", Dropped)])
def test_texts_that_must_be_too_long_are_not_tokenised(
    processor: Processor, policy: Any, kind: type[DataError], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text: seen.append(len(text)) or encode(self, text))
    with pytest.raises(
        DataError, match=r"has a text of 1\d{6} characters, which has more tokens, the longest"
    ) as caught:
        drafted(processor, record("x" * 10**6, "y"), cutoff_len=64, too_long=policy)
    assert isinstance(caught.value, Dropped) == (kind is Dropped) and max(seen, default=0) < 1000


def test_a_long_text_is_cut_as_a_shorter_one_is(processor: Processor) -> None:
    long, short = (
        drafted(processor, record("word " * count, "yes"), cutoff_len=64, too_long="truncate")
        for count in (10**5, 10**4)
    )
    assert long.tokens == 64 and long.notes == ("truncated",)
    np.testing.assert_array_equal(long.input_ids, short.input_ids)
