"""A load generator: clients of a chat server over raw HTTP/1.1, of which some leave in the middle."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Payload = Mapping[str, Any]
CHAT = "/v1/chat/completions"


@dataclass
class Outcome:
    """One request: status (0: no whole response), seconds to the first text and to the end, tokens of the answer."""

    status: int = 0
    first: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    left: bool = False
    retry_after: float | None = None


@dataclass
class Client:
    """One client with one connection, which it keeps as long as the server does."""

    port: int
    headers: Mapping[str, str] = field(default_factory=dict)
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None

    async def post(self, payload: Payload, *, leave_after: float | None = None) -> Outcome:
        """Send a request and read its answer, or disconnect after the given seconds."""
        outcome, start = Outcome(), time.perf_counter()
        try:
            await asyncio.wait_for(self._exchange(CHAT, json.dumps(payload).encode(), outcome, start), leave_after)
        except asyncio.TimeoutError:
            outcome.left = True
            self.close()
        except (OSError, EOFError):
            outcome.status = 0
            self.close()
        outcome.seconds = time.perf_counter() - start
        return outcome

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a small response."""
        head, body = await self._sent(f"GET {path}", b""), bytearray()
        async for piece in self._pieces(head):
            body += piece
        return int(head["status"]), bytes(body)

    def close(self) -> None:
        """Leave."""
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None

    async def _exchange(self, path: str, body: bytes, outcome: Outcome, start: float) -> None:
        head = await self._sent(f"POST {path}", body)
        pending, whole = b"", bytearray()
        streams = head.get("content-type", "").startswith("text/event-stream")
        async for piece in self._pieces(head):
            if not streams:
                whole += piece
                continue
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                self._event(event, outcome, start)
        outcome.status = int(head["status"])
        outcome.retry_after = float(head["retry-after"]) if "retry-after" in head else None
        if not streams and outcome.status == 200:
            outcome.first = time.perf_counter() - start
            outcome.tokens = json.loads(whole)["usage"]["completion_tokens"]

    def _event(self, event: bytes, outcome: Outcome, start: float) -> None:
        text = event.removeprefix(b"data: ")
        if text.strip() == b"[DONE]":
            return
        chunk = json.loads(text)
        if "error" in chunk:
            raise EOFError(chunk["error"]["message"])
        if outcome.first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
            outcome.first = time.perf_counter() - start
        outcome.tokens = (chunk.get("usage") or {}).get("completion_tokens", outcome.tokens)

    async def _sent(self, line: str, body: bytes) -> dict[str, str]:
        """Send a request; the head of its response. A kept connection that the server has closed is opened anew."""
        if self.writer is not None:
            try:
                return await self._sent_over(line, body)
            except (OSError, EOFError):
                self.close()
        return await self._sent_over(line, body)

    async def _sent_over(self, line: str, body: bytes) -> dict[str, str]:
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        own = {
            "Host": "127.0.0.1",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**own, **self.headers}.items())
        self.writer.write(f"{line} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await self.writer.drain()
        status, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        head = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
        return {**head, "status": status.split()[1]}

    async def _pieces(self, head: Mapping[str, str]) -> AsyncIterator[bytes]:
        assert self.reader is not None
        if head.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            yield await self.reader.readexactly(int(head.get("content-length", 0)))
        if head.get("connection") == "close":
            self.close()


async def all_answered(port: int, payloads: Sequence[Payload], clients: int) -> list[Outcome]:
    """Outcomes of the clients' requests; each sends its next one when it has its answer."""
    waiting, outcomes = list(reversed(payloads)), []

    async def client() -> None:
        one = Client(port)
        while waiting:
            outcomes.append(await one.post(waiting.pop()))
        one.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def soak(port: int, payloads: Sequence[Payload], clients: int, seconds: float, leaving: float) -> list[Outcome]:
    """Outcomes of clients that ask for so long; a part of the requests is left at a random moment."""
    end, outcomes = time.perf_counter() + seconds, []

    async def client(number: int) -> None:
        rng, one = random.Random(number), Client(port)
        while time.perf_counter() < end:
            patience = rng.uniform(0.01, 3.0) if rng.random() < leaving else None
            outcomes.append(await one.post(rng.choice(payloads), leave_after=patience))
            if outcomes[-1].status == 429:
                await asyncio.sleep(min(outcomes[-1].retry_after or 1.0, 5.0) * rng.uniform(0.5, 1.0))
        one.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which this part of them lies; NaN for none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(part * len(ranked)))] if ranked else float("nan")
