"""A server of the chat page that answers what a test tells it to, a piece at a time.

The page's own server runs a model, which says what it likes when it likes. Here a test holds the pace: `answers` is
what the next requests get, and a piece that is an `Event` waits until it is set.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from duetvl.serving.page import page_file

CUT: Final = object()  # a piece at which the connection breaks off
ScriptedEvent = str | threading.Event | object


@dataclass
class Script:
    """What the server says, and what it was asked."""

    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["tiny-vl", "tiny-vl-adapter"])
    answers: list[Sequence[ScriptedEvent] | tuple[int, dict[str, Any]]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)  # a client went away in mid-answer


class Handler(BaseHTTPRequestHandler):
    """OpenAI's protocol, as far as the page speaks it."""

    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Models and the page's files."""
        if self.path == "/v1/models":
            if self.known():
                self.reply(
                    200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.script.models]}
                )
        elif file := page_file(self.path):
            self.send(200, file.content, {"Content-Type": file.content_type, **file.headers})
        else:
            self.reply(404, error("nothing is here"))

    def do_POST(self) -> None:
        """An answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.known():
            return
        self.script.requests.append(json.loads(body))
        answer = self.script.answers.pop(0)
        if isinstance(answer, tuple) and isinstance(answer[0], int):
            self.reply(*answer)
            return
        try:
            self.stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.script.left.set()

    def known(self) -> bool:
        """Whether the request has the key, if there is one; answered where it has not."""
        if self.script.key and self.headers.get("Authorization") != f"Bearer {self.script.key}":
            self.reply(401, error("this server wants an API key"))
            return False
        return True

    def reply(self, status: int, body: dict[str, Any]) -> None:
        """A whole answer."""
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Bytes with their headers."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, pieces: Sequence[ScriptedEvent]) -> None:
        """Server-sent events, whose bytes are divided without regard to characters and lines."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events(pieces):
            if event is CUT:
                self.close_connection = True
                return
            if isinstance(event, threading.Event):
                while not event.wait(0.05):
                    self.chunk(b": still here\n\n")
            else:
                half = len(event) // 2
                self.chunk(event[:half])
                self.chunk(event[half:])
        self.chunk(b"")

    def chunk(self, content: bytes) -> None:
        """One chunk of HTTP; an empty one is the last."""
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()


def error(message: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def events(pieces: Sequence[ScriptedEvent]) -> Iterator[Any]:
    """The bytes of each event, and what is no text as it is."""
    written = 0
    yield data(choice({"role": "assistant", "content": ""}))
    for piece in pieces:
        if isinstance(piece, str):
            written += 1
            yield data(choice({"content": piece}))
        else:
            yield piece
    yield data(choice({}, finish="stop"))
    usage = {"prompt_tokens": 312, "completion_tokens": written, "total_tokens": 312 + written}
    yield data({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def choice(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    """A chunk of a stream."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def data(chunk: dict[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def start(script: Script, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server that runs in a thread until `shutdown()`, and its address."""
    handler = type("Bound", (Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/"
