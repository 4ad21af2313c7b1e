"""From what a request says to a sample: messages to a conversation, pictures and videos to parts of it.

Text of users, of tools and of functions is text: it never makes a control token (`TextTokenizer`), and a picture's
place comes from a part alone. The template is that of training and of `duetvl infer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import DataError, shown
from duetvl.data.conversation import Conversation, ImagePart, Part, Turn, VideoPart
from duetvl.data.draft import Draft
from duetvl.data.encode import Processor
from duetvl.data.formats.tools import calls_text
from duetvl.data.media.images import NO_WISH, Resize
from duetvl.data.media.pixels import PixelSettings
from duetvl.serving.errors import ServerError
from duetvl.serving.media import Media
from duetvl.serving.protocol import (
    AssistantMessage,
    ImageUrlPart,
    MediaOptions,
    Message,
    SystemMessage,
    TextPart,
    Tool,
    UserPart,
    VideoUrlPart,
)

_LOW_DETAIL: Final = 512 * 512  # pixels of a picture that is to be seen in low detail, as OpenAI scales it
_MOST_LETTERS: Final = 16  # for each token of the context: a longer text is not even tokenised, which may take minutes
_PLAIN: Final = MediaOptions()


@dataclass(frozen=True)
class Prompts:
    """Makes samples for one model. `longest`: tokens that a prompt may have.

    May be used by several threads: the tokenizer is never changed once it is made, which is when another thread would
    find it borrowed.
    """

    processor: Processor
    media: Media
    longest: int

    def of_messages(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: MediaOptions | None = None
    ) -> Sample:
        """A conversation up to where the assistant is to answer, with its pixels. Raises ServerError."""
        draft = self.draft(messages, tools, options)
        try:
            sample = self.processor.load(draft, as_bytes=True)
        except DataError as error:
            raise ServerError(error, param="messages") from None
        assert not isinstance(sample, Pair)
        return sample

    def draft(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), options: MediaOptions | None = None
    ) -> Draft:
        """The same without its pixels: all tokens, and the sizes of pictures and videos. Raises ServerError."""
        self._check_letters(_texts(messages), "messages")
        try:
            conversation = self._conversation(messages, tools, options or _PLAIN)
            draft = self.processor.draft(conversation, add_generation_prompt=True)
        except DataError as error:
            raise ServerError(error, param="messages") from None
        self._check_tokens(len(draft.input_ids), "messages")
        return draft

    def of_text(self, prompt: str | Sequence[int]) -> Sample:
        """A text, or tokens, as they are: no turns are put around it. Raises ServerError."""
        ids = self.ids(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_tokens(len(ids), "prompt")
        if not ids:
            raise ServerError("the prompt is empty: it has no token", param="prompt")
        self.check_ids(ids, "prompt")
        return Sample(input_ids=np.array(ids, np.int64))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text. Raises ServerError for one that is too long to be read."""
        self._check_letters([text], "prompt")
        return self.processor.tokenizer.encode(text)

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raise ServerError for what is no token of the model's."""
        vocabulary = self.processor.family.vocabulary
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ServerError(f"{field}: {shown(wrong)} is not one of the model's {vocabulary} tokens", param=field)

    def media_tokens(self, sample: Sample) -> int:
        """Tokens of a prompt that stand for pictures and videos."""
        special = self.processor.family.special
        return int(np.isin(sample.input_ids, (special.image, special.video)).sum())

    # -- messages -----------------------------------------------------------------------------------------------------

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Tool], options: MediaOptions) -> Conversation:
        system, rest = _split(messages)
        self.media.check_count(sum(not isinstance(part, TextPart) for message in rest for part in _parts(message)))
        turns = [_system_turn(system)] if system else []
        turns += [self._turn(message, options) for message in rest]
        return Conversation(tuple(turns), tuple(tool.as_sent for tool in tools))

    def _turn(self, message: Message, options: MediaOptions) -> Turn:
        parts = [self._part(part, options) for part in _parts(message)]
        role: Literal["user", "assistant", "tool"] = message.role  # type: ignore[assignment]
        if isinstance(message, AssistantMessage) and message.tool_calls:
            calls = calls_text([call.model_dump() for call in message.tool_calls])
            parts += ["\n" if any(parts) else "", calls]
        return Turn(role, tuple(part for part in parts if part != ""))

    def _part(self, part: TextPart | ImageUrlPart | VideoUrlPart, options: MediaOptions) -> Part:
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, VideoUrlPart):
            wish = _wish(options, self.processor.video_settings)
            return VideoPart(self.media.open(part.video_url.url, "video"), fps=options.fps, wish=wish)
        wish = _wish(options, self.processor.image_settings, low=part.image_url.detail == "low")
        return ImagePart(self.media.open(part.image_url.url, "image"), wish=wish)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _check_letters(self, texts: Iterable[str], field: str) -> None:
        letters, most = sum(map(len, texts)), _MOST_LETTERS * self.longest
        if letters > most:
            raise _too_long(f"the text has {letters} characters, at most {most} are read", field)

    def _check_tokens(self, tokens: int, field: str) -> None:
        if tokens > self.longest:
            raise _too_long(f"the prompt has {tokens} tokens, at most {self.longest} are taken; shorten it", field)


def _wish(options: MediaOptions, settings: PixelSettings, *, low: bool = False) -> Resize:
    """The sizes that a request asks for; more than the server's own is not given. Raises ServerError."""
    if options.max_pixels is None and options.min_pixels is None and not low:
        return NO_WISH
    most = min(options.max_pixels or settings.max_pixels, settings.max_pixels)
    most = min(most, _LOW_DETAIL) if low else most
    least = min(settings.min_pixels, most) if options.min_pixels is None else options.min_pixels
    if least > most:
        raise ServerError(
            f"min_pixels is {least}, and pictures have at most {most} pixels here", param="mm_processor_kwargs"
        )
    return Resize(least, most)


def _too_long(words: str, field: str) -> ServerError:
    return ServerError(words, param=field, code="context_length_exceeded")


def _split(messages: Sequence[Message]) -> tuple[list[SystemMessage], list[Message]]:
    """The system messages, which come first, and the others. Raises ServerError where nothing is to be answered."""
    system = [message for message in messages if isinstance(message, SystemMessage)]
    rest = list(messages[len(system) :])
    late = next((at for at, one in enumerate(rest, len(system)) if isinstance(one, SystemMessage)), None)
    if late is not None:
        raise ServerError(
            "a system message comes after others; the model's template has it at the beginning",
            param=f"messages.{late}",
        )
    if not rest:
        raise ServerError("messages contain only a system message, so there is nothing to answer", param="messages")
    if isinstance(rest[-1], AssistantMessage):
        raise ServerError(
            "the last message is the assistant's; there is nothing to answer: end with a user's or a tool's",
            param=f"messages.{len(messages) - 1}",
        )
    return system, rest


def _system_turn(messages: Sequence[SystemMessage]) -> Turn:
    """One turn; several messages stand below each other in it."""
    texts = ["".join(part.text for part in _parts(message)) for message in messages]  # type: ignore[union-attr]
    return Turn("system", ("\n\n".join(filter(None, texts)),))


def _parts(message: Message) -> Sequence[UserPart]:
    content = message.content
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """All text of messages."""
    for message in messages:
        yield from (part.text for part in _parts(message) if isinstance(part, TextPart))
        if isinstance(message, AssistantMessage):
            yield from (call.function.arguments for call in message.tool_calls)
