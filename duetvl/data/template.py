"""Conversations in, pieces of text, control tokens and media out.

The layout is token for token that of LLaMA-Factory's `qwen2_vl` template, which is also that of the published chat
template: a system turn, "You are a helpful assistant." unless one is given, then turns of user and assistant, each
ended by `<|im_end|>` and a line end. Of an assistant's turn the content, `<|im_end|>` and the line end are trained;
nothing else is. Results of tools are a user's turn, each in `<tool_response>`; `duetvl.data.formats.tools` has the
rest of what tools need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, Literal, NamedTuple

from duetvl.core.errors import DataError
from duetvl.data.conversation import Conversation, ImagePart, Part, Turn, VideoPart
from duetvl.data.formats.tools import tools_text

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"


class TemplatePiece(NamedTuple):
    """A stretch of a conversation: text to be tokenised on its own, a control token, a medium."""

    kind: Literal["text", "control", "image", "video"]
    text: str = ""
    medium: ImagePart | VideoPart | None = None
    trained: bool = False


def render(
    conversation: Conversation,
    *,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    add_generation_prompt: bool = False,
    system: str | None = None,
) -> Iterator[TemplatePiece]:
    """The pieces of a conversation whose boxes are written out.

    `system` is the system prompt of a conversation that has none (or an empty one), by default `DEFAULT_SYSTEM`.
    Every answer is trained, with `mask_history` only the last; what a turn says itself (`Turn.trained`) goes before.
    `train_on_prompt` trains everything but the answers as well, the placeholders of media included, as LLaMA-Factory
    does. Raises DataError when a prompt is asked for after an answer.
    """
    turns = conversation.turns
    if add_generation_prompt and turns[-1].role == "assistant":
        raise DataError("the conversation ends with an assistant message; there is nothing to generate after it")
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    prompt = _Prompt(train_on_prompt, system or DEFAULT_SYSTEM)
    yield from prompt.system(conversation)
    for is_tool, group in groupby(enumerate(turns), key=lambda numbered: numbered[1].role == "tool"):
        if is_tool:
            yield from prompt.turn("user", _results([turn for _, turn in group]))
            continue
        for at, turn in group:
            if turn.role == "user":
                yield from prompt.turn("user", turn.parts)
            elif turn.role == "assistant":
                usual = at == last or not mask_history
                yield from prompt.answer_start()
                yield from _answer(turn, usual if turn.trained is None else turn.trained)
    if add_generation_prompt:
        yield from prompt.answer_start()


class _Prompt:
    """Everything that is not an answer."""

    def __init__(self, trained: bool, default_system: str) -> None:
        self.trained, self.default_system = trained, default_system

    def system(self, conversation: Conversation) -> Iterator[TemplatePiece]:
        first = conversation.turns[0]
        given = "".join(part for part in first.parts if isinstance(part, str)) if first.role == "system" else ""
        return self.turn("system", (given or self.default_system, tools_text(conversation.tools)))

    def turn(self, role: str, parts: Sequence[Part]) -> Iterator[TemplatePiece]:
        yield TemplatePiece("control", TURN_START, trained=self.trained)
        for piece in _content((f"{role}\n", *parts)):
            yield piece._replace(trained=self.trained)
        yield TemplatePiece("control", TURN_END, trained=self.trained)
        yield TemplatePiece("text", "\n", trained=self.trained)

    def answer_start(self) -> Iterator[TemplatePiece]:
        yield TemplatePiece("control", TURN_START, trained=self.trained)
        yield TemplatePiece("text", "assistant\n", trained=self.trained)


def _answer(turn: Turn, trained: bool) -> Iterator[TemplatePiece]:
    """An answer is tokenised apart from its header, so that a line end it starts with stays."""
    for piece in _content(turn.parts):
        yield piece._replace(trained=trained)
    yield TemplatePiece("control", TURN_END, trained=trained)
    yield TemplatePiece("text", "\n", trained=trained)


def _results(turns: Sequence[Turn]) -> list[Part]:
    """Results of tools that follow each other stand in one turn."""
    parts: list[Part] = []
    for turn in turns:
        parts += ["\n" if parts else "", "<tool_response>\n", *turn.parts, "\n</tool_response>"]
    return parts


def _content(parts: Sequence[Part]) -> Iterator[TemplatePiece]:
    """Pieces of a message's parts; texts that touch are tokenised together."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield TemplatePiece("text", _whole(text))
        text = ""
        assert isinstance(part, ImagePart | VideoPart), "boxes are written out before"
        yield TemplatePiece("image" if isinstance(part, ImagePart) else "video", medium=part)
    if text:
        yield TemplatePiece("text", _whole(text))


def _whole(text: str) -> str:
    """Text that has an encoding; JSON can spell half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a text contains half of a character (a lone surrogate) at {error.start}") from None
    return text
