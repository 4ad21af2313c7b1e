"""Questions to an OpenAI-compatible server: some at once, tried again where that may help, and not where it cannot."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from duetvl.core.errors import ConfigError, DataError, DuetvlError, first_line, shown
from duetvl.data.conversation import Conversation, ImagePart, Part, VideoPart
from duetvl.evaluation.answers import Asked
from duetvl.evaluation.run import Answers
from duetvl.evaluation.scoring import Row

KEY: Final = "OPENAI_API_KEY"
_TRIES: Final = 6
_FIRST_PAUSE: Final = 0.5  # seconds; each pause is twice the one before
_LONGEST_PAUSE: Final = 20.0
_AGAIN: Final = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_WRONG_PLACE: Final = (401, 403, 404, 405)  # no question will fare better


class ServerDown(DuetvlError):
    """A server cannot be reached, or does not let us in. What is answered is kept."""


class Refused(DuetvlError):
    """A server does not answer one question."""


@dataclass(frozen=True)
class Reply:
    """An answer of a server."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Endpoint:
    """A model on a server. `url` ends in /v1 or the like; `option` is what users gave it by, for messages.

    The key is that of the environment's OPENAI_API_KEY. pause: seconds before the second try.
    """

    url: str
    model: str
    option: str
    timeout: float = 600.0
    pause: float = _FIRST_PAUSE

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        """One answer. Raises Refused where there is none for this question, ServerDown where for no question."""
        body = {"model": self.model, "messages": list(messages), **options}
        content = self._tried(f"{self.url}/chat/completions", json.dumps(body).encode())
        try:
            choice, usage = content["choices"][0], content.get("usage") or {}
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("its content is not text")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Refused(f"{self.option} {self.url}: answers with no chat completion: {first_line(error)}") from None
        clean = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file
        reason = str(choice.get("finish_reason") or "stop")
        return Reply(clean, reason, usage.get("prompt_tokens"), usage.get("completion_tokens"))

    def _tried(self, url: str, body: bytes | None = None) -> Any:
        """The JSON that an address answers with, tried up to six times."""
        for number in range(_TRIES):
            try:
                return _json_of(url, body, self.timeout)
            except urllib.error.HTTPError as error:
                reason = f"{self.option} {self.url}: status {error.code}: {_message(error)}"
                if error.code in _WRONG_PLACE:
                    raise ServerDown(f"{reason} (the key is that of {KEY})") from None
                if error.code not in _AGAIN or number == _TRIES - 1:
                    raise Refused(reason) from None
                pause = _retry_after(error)
            except (OSError, ValueError) as error:  # no connection, none in time, or what comes is no JSON
                reason = f"{self.option} {self.url}: {first_line(error)}"
                if number == _TRIES - 1:
                    raise (Refused if isinstance(error, ValueError) else ServerDown)(reason) from None
                pause = None
            time.sleep(min(_LONGEST_PAUSE, self.pause * 2**number) if pause is None else pause)
        raise AssertionError("the last try raises")


def open_endpoint(url: str, model: str | None, option: str) -> Endpoint:
    """The model of a server, found by asking for its list. ConfigError where it has several, or does not answer."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{option} {shown(url)}: expected http://HOST:PORT/v1")
    base = url.rstrip("/").removesuffix("/chat/completions")
    try:
        listed = _json_of(f"{base}/models", None, 30.0)
        names = [str(entry["id"]) for entry in listed["data"]]
    except urllib.error.HTTPError as error:
        hint = "; most servers want /v1 at the end" if error.code == 404 else f" (the key is that of {KEY})"
        raise ConfigError(f"{option} {url}: status {error.code} for its list of models{hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option} {url}: gives no list of models: {first_line(error)}") from None
    if model is None and len(names) != 1:
        raise ConfigError(f"{option} {url}: has the models {', '.join(names) or '(none)'}; say which one")
    if model is not None and model not in names:
        raise ConfigError(f"{option} {url}: has no model {shown(model)}; it has {', '.join(names) or 'none'}")
    return Endpoint(base, model or names[0], option)


def server_answers(
    endpoint: Endpoint, asked: Asked, numbers: Sequence[int], concurrency: int, options: Mapping[str, Any]
) -> Answers:
    """Index and row of every answer as it comes, of at most `concurrency` questions at once. Raises ServerDown."""

    def answer(number: int) -> Row:
        started = time.monotonic()
        try:
            question = asked.questions[number]
            reply = endpoint.chat(messages_of(question.conversation), **options)
        except (DataError, Refused) as error:
            return {"text": None, "finish_reason": "error", "error": str(error)}
        row = {"text": reply.text, "finish_reason": reply.finish_reason}
        counts = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        return {**row, **counts, "seconds": {"total": round(time.monotonic() - started, 6)}}

    return _at_once(answer, numbers, concurrency)


def _at_once(answer: Callable[[int], Row], numbers: Sequence[int], most: int) -> Iterator[tuple[int, Row]]:
    with ThreadPoolExecutor(most) as pool:
        waiting: dict[Future[Row], int] = {}
        try:
            for number in numbers:
                if len(waiting) == most:
                    yield from _done(waiting)
                waiting[pool.submit(answer, number)] = number
            while waiting:
                yield from _done(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _done(waiting: dict[Future[Row], int]) -> Iterator[tuple[int, Row]]:
    ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
    yield from ((waiting.pop(future), future.result()) for future in ready)


# -- what is sent ----------------------------------------------------------------------------------------------------


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation in OpenAI's form, its media as data URIs. Raises DataError for media that cannot be read."""
    return [{"role": turn.role, "content": [_content(part) for part in turn.parts]} for turn in conversation.turns]


def _content(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, ImagePart | VideoPart):
        raise DataError(f"a server is asked about text, pictures and videos, and not {type(part).__name__}")
    content = _bytes_of(part.source)
    if isinstance(part, VideoPart):
        name = mimetypes.guess_type(str(part.source))[0] or "video/mp4"
        return {"type": "video_url", "video_url": {"url": _uri(name, content)}}
    return {"type": "image_url", "image_url": {"url": _uri(_picture_type(content), content)}}


def _bytes_of(source: object) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        raise DataError(f"a server is sent files, and not {type(source).__name__}")
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from None


def _picture_type(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.get_format_mimetype() or "image/png"
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"is no picture: {first_line(error)}") from None


def _uri(name: str, content: bytes) -> str:
    return f"data:{name};base64,{base64.b64encode(content).decode()}"


# -- HTTP ------------------------------------------------------------------------------------------------------------


def _json_of(url: str, body: bytes | None, timeout: float) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal."""
    try:
        content = json.load(error)
        return shown(content["error"]["message"], 300)
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(error.headers.get("Retry-After", ""))))
    except ValueError:
        return None
