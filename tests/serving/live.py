"""A server of a tiny model on a free port, in a thread of this process, and clients of it."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

import duetvl
from duetvl.inference.engine import Engine
from duetvl.serving import logs
from duetvl.serving.answering import Answering
from duetvl.serving.app import create_app
from duetvl.serving.limits import Keys, Limits
from duetvl.serving.media import Media, MediaPolicy
from duetvl.serving.metrics import Metrics
from duetvl.serving.server import Server

KEYS = {"alice": "key-of-alice-1", "bob": "key-of-bob-22"}
CONTEXT = 2048
PATIENCE = 60.0  # seconds; what does not come by then never comes


class Live:
    """`names`: served name -> adapter, as for Answering."""

    def __init__(self, model: duetvl.Model, adapters: dict[str, Any], **limits: Any) -> None:
        self.engine = Engine(
            model,
            adapters=adapters,
            tokenizer=model.processor.tokenizer,
            defaults=model.defaults,
            cache_tokens=8192,
            context=CONTEXT,
        )
        names = {"tiny": "", "alias": "", **{name: name for name in adapters}}
        self.answering = Answering(
            self.engine,
            model.processor,
            names,
            media=Media(MediaPolicy()),
            limits=Limits(**limits),
            metrics=Metrics(list(names)),
        )
        self.server = Server(create_app(self.answering, Keys(KEYS)), self.answering, host="127.0.0.1", port=0)
        self.status: int | None = None
        self.lines: list[str] = []
        _gather(self.lines)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: self.server.started or not self._thread.is_alive())
        self.port = self.server.address[1]

    def _run(self) -> None:
        self.status = self.server.serve_until_stopped()

    def stop(self) -> None:
        """End it as the first signal does."""
        if self._thread.is_alive():
            self.server.stop()
        self._thread.join(PATIENCE)

    def client(self, name: str = "alice") -> openai.OpenAI:
        """The official one."""
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEYS[name], max_retries=0, timeout=PATIENCE
        )

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, value or text, headers. A body that is no bytes is sent as JSON."""
        with_defaults = {"authorization": f"Bearer {KEYS['alice']}", "content-type": "application/json", **headers}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, content, {name.replace("_", "-"): v for name, v in with_defaults.items()})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        answered = {name.lower(): value for name, value in response.getheaders()}
        is_json = answered.get("content-type", "").startswith("application/json") and text
        return response.status, json.loads(text) if is_json else text, answered

    def chat(self, content: Any, **options: Any) -> tuple[int, Any, dict[str, str]]:
        """POST /v1/chat/completions with one message of the user's."""
        messages = [{"role": "user", "content": content}]
        return self.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, **options})

    def opened(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        """A chat completion whose response has begun; read it or close it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"authorization": f"Bearer {KEYS['alice']}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        response = connection.getresponse()
        response.connection = connection  # type: ignore[attr-defined]  # lives as long as the response
        return response

    def number(self, name: str, **labels: str) -> float:
        """One of the metrics."""
        own = {"model_name": "tiny", **labels}
        value = self.answering.metrics.registry.get_sample_value(name, own)
        return value or 0.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def events(lines: Iterator[bytes]) -> Iterator[Any]:
    """The values of server-sent events; the last is "[DONE]"."""
    for line in lines:
        if line.strip():
            assert line.startswith(b"data: ")
            content = line.removeprefix(b"data: ").strip()
            yield "[DONE]" if content == b"[DONE]" else json.loads(content)


def _gather(lines: list[str]) -> None:
    """Every line that the server logs, as it would be written."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logs.Lines("text").format(record))

    for name in (logs.LOGGER, "uvicorn"):
        logging.getLogger(name).addHandler(Keep())
