"""Records that hypothesis makes up: of anything at all, and such that nearly make sense."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800")
    | st.sampled_from(["<image>", "a.png", "<bbox>", "user", "assistant", "gpt", "tool", "image", "text", '["a"]'])
)  # fmt: skip
_keys = st.sampled_from([
    "messages", "conversations", "role", "content", "from", "value", "images", "image", "videos", "video", "system",
    "tools", "type", "text", "image_url", "url", "bytes", "path", "tool_calls", "function", "name", "arguments",
    "loss", "objects", "ref", "bbox", "image_id", "bbox_type", "chosen", "rejected", "rejected_response", "prompt",
    "completion", "instruction", "input", "output", "history", "chat_template_kwargs", "fps", "max_pixels", "nframes",
])  # fmt: skip
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=5), max_leaves=25
)
_roles = st.sampled_from(["user", "human", "assistant", "gpt", "system", "tool", "function_call"])
_texts = st.text(max_size=10) | st.sampled_from(['"bbox_2d": [1, 2, 3, 4]', "<|box_start|>(1,2)<|box_end|>", "\ud800"])
_parts = st.lists(
    st.sampled_from([{"type": "image", "image": "a.png"}, {"type": "image"}, {"type": "text", "text": "b"}, {}]),
    max_size=3,
)
_questions = st.sampled_from(["<image>", "<image>a", "<video>", "a<bbox>"]) | _texts | _parts
_pictures = st.lists(st.sampled_from(["a.png", {"path": "b.png"}, ["c.png"], 3]), max_size=2)
_extra = st.fixed_dictionaries({}, optional={"tool_calls": _values, "loss": _scalars, "role": _roles})
_tools = st.just([{"name": "f"}]) | _values
_objects = st.fixed_dictionaries({}, optional={"bbox": st.just([[1, 2, 3, 4]]) | _values, "ref": _values})
_besides = {
    "images": _pictures, "videos": _pictures, "objects": _objects, "tools": _tools, "system": _texts | _values,
    "chosen": _texts | _values, "rejected": _texts | _values, "rejected_response": _texts | _values,
    "chat_template_kwargs": st.just({"fps": 1}) | _values,
}  # fmt: skip


@st.composite
def _nearly_right(draw: st.DrawFn) -> dict[str, Any]:
    """Turns that mostly alternate, with the pictures that they need or others, and a few things beside them."""
    turns: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 2))):
        turns += [{"role": "user", "content": draw(_questions)}, {"role": "assistant", "content": draw(_texts)}]
    if draw(st.integers(0, 3)) == 0:
        turns[draw(st.integers(0, len(turns) - 1))].update(draw(_extra))
    needed = sum(str(turn["content"]).count("<image>") for turn in turns)
    chosen = draw(st.sets(st.sampled_from(sorted(_besides)), max_size=2))
    return {"messages": turns, "images": ["a.png"] * needed, **{key: draw(_besides[key]) for key in sorted(chosen)}}


records = st.dictionaries(_keys, _values, max_size=6) | _nearly_right()
