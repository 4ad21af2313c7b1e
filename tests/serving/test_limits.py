"""Keys, limits, and the middleware that holds them."""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from asgi_client import ask, read_body

from duetvl.core.errors import ConfigError
from duetvl.serving.errors import ServerError
from duetvl.serving.guards import BodyLimit, KeyGuard, Receive, Scope, Send
from duetvl.serving.limits import Admission, Keys, Limits

ALICE, BOB = "alice-1234567890", "bob-1234567890"


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_read_from_a_file_and_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of our users\n\nalice:{ALICE}\n  {BOB}  \nwith:colon:inside-1\n")
    keys = Keys.read(path, {"DUETVL_API_KEYS": "ops:from-environment, anonymous-key"})
    holders = {
        key: keys.check(f"Bearer {key}") for key in (ALICE, BOB, "from-environment", "anonymous-key", "colon:inside-1")
    }
    assert list(holders.values()) == ["alice", "key-4", "ops", "key-2", "with"]
    assert keys.check(f"bearer  {ALICE} ") == "alice"
    assert not Keys.read(None, {}) and Keys.read(None, {}).check(None) == ""


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", ALICE, f"Basic {ALICE}", "Bearer ä\udc80"],
)
def test_whoever_has_no_key_is_told_how_to_send_one(header: str | None) -> None:
    with pytest.raises(ServerError, match="Authorization: Bearer KEY") as caught:
        Keys({"alice": ALICE}).check(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key") and ALICE[:-1] not in str(caught.value)


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys({"alice": ALICE, "bob": BOB, "carol": "carol-123"})
    assert keys.check(f"Bearer {ALICE}") == "alice"
    with pytest.raises(ServerError):
        keys.check("Bearer x")
    assert compared == [(32, 32)] * 6  # the first that fits does not end it, and lengths tell nothing


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none\n",
        "short",
        "a:secret key with blanks",
        "a b:secret-123",
        "a:secret-123\na:secret-456",
        "a:secret-123\nb:secret-123",
        "a:ключ-ключ",
    ],
)
def test_files_of_keys_that_make_no_sense_are_refused_without_showing_keys(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="API keys") as caught:
        Keys.read(tmp_path / "keys", {})
    assert "secret" not in str(caught.value)


def test_a_file_of_keys_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            Keys.read(path, {})


# -- limits ----------------------------------------------------------------------------------------------------------


def test_requests_are_admitted_up_to_the_limits() -> None:
    admission = Admission(Limits(requests=3, per_key=2))
    with ExitStack() as stack:
        for tenant in ("alice", "alice", "bob"):
            stack.enter_context(admission.enter(tenant))
        for tenant, words in (("bob", "3 requests are running, this server"), ("alice", "3 requests are running")):
            with pytest.raises(ServerError, match=words) as caught, admission.enter(tenant):
                pass
            assert caught.value.status == 429 and int(caught.value.headers()["Retry-After"]) >= 1
            assert caught.value.body()["error"]["code"] == "rate_limit_exceeded"
    assert admission.under_way == 0
    with admission.enter("alice"), admission.enter("alice"):
        with pytest.raises(ServerError, match="2 requests are running with this key"), admission.enter("alice"):
            pass
        with admission.enter("bob"):
            assert admission.under_way == 3
    with pytest.raises(KeyError), admission.enter("bob"):
        raise KeyError  # a request that fails is no longer under way
    assert admission.under_way == 0


def test_tokens_are_limited() -> None:
    limits = Limits(output_tokens=5)
    limits.check_output(5)
    with pytest.raises(ServerError, match="max_completion_tokens is 6") as caught:
        limits.check_output(6, "max_completion_tokens")
    assert caught.value.status == 400 and caught.value.param
    for name in ("body_bytes", "requests", "per_key", "prompt_tokens", "seconds"):
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: 0})


# -- middleware ------------------------------------------------------------------------------------------------------


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body; one that ends too soon is an error of the application."""
    body = await read_body(receive)
    if body is None:
        raise RuntimeError("the client has left")
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-tenant", scope["state"]["tenant"].encode())]}
    )
    await send({"type": "http.response.body", "body": body})


KEYS = Keys({"alice": ALICE, "bob": BOB})
APP = KeyGuard(BodyLimit(echo, Limits(body_bytes=1000, body_seconds=0.05)), KEYS, ("/health", "/", "/page/"))
KEY = f"Bearer {ALICE}"


def test_every_path_is_guarded_but_the_open_ones() -> None:
    assert ask(APP, "/v1/models", authorization=KEY).headers["x-tenant"] == "alice"
    for path in (
        "/v1/models",
        "/metrics",
        "/health/",
        "/healthx",
        "//health",
        "/page",
        "/pagex",
        "/openapi.json",
        "/HEALTH",
    ):
        reply = ask(APP, path)
        assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer" and not reply.taken, path
        assert reply.error["code"] == "invalid_api_key" and reply.error["type"] == "invalid_request_error"
    for path in ("/health", "/", "/page/a.js"):
        assert ask(APP, path).headers["x-tenant"] == ""
    assert ask(KeyGuard(echo, Keys({})), "/v1/models").status == 200


def test_a_body_is_counted_while_it_streams_in() -> None:
    assert ask(APP, body=[b"x" * 400, b"y" * 600, b""], authorization=KEY).body == b"x" * 400 + b"y" * 600
    reply = ask(APP, body=repeat(b"x" * 100), authorization=KEY)  # one that never ends
    assert (reply.status, reply.taken) == (413, 11) and reply.headers["connection"] == "close"
    assert "more than the 1000 bytes" in reply.error["message"]
    for length in ("1001", "9" * 400):
        reply = ask(APP, body=repeat(b"x"), authorization=KEY, content_length=length)
        assert (reply.status, reply.taken) == (413, 0)
    assert ask(APP, body=[b"x", b""], authorization=KEY, content_length="-1").status == 200  # counted all the same


def test_compressed_and_slow_bodies_are_refused() -> None:
    for coding in ("gzip", "deflate", "br", "GZIP, identity"):
        reply = ask(APP, body=[b"x", b""], authorization=KEY, content_encoding=coding)
        assert (reply.status, reply.taken) == (415, 0)
    assert ask(APP, body=[b"x", b""], authorization=KEY, content_encoding="identity").status == 200
    assert ask(APP, body=[b"x"], authorization=KEY).status == 408


def test_after_its_body_a_request_may_last_and_failures_of_the_application_pass_through() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        leaving = asyncio.ensure_future(receive())  # as servers watch for clients that leave
        await asyncio.sleep(0.1)
        leaving.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("of the application")

    with pytest.raises(KeyError):
        ask(BodyLimit(slow, Limits(body_seconds=0.05)))


def test_a_websocket_is_closed_and_the_lifespan_passes() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        seen.append(message["code"])

    async def run() -> None:
        guarded = KeyGuard(BodyLimit(app, Limits()), KEYS)
        for kind in ("lifespan", "websocket"):
            await guarded({"type": kind}, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert seen == ["lifespan", 1008]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A real server around `echo`."""
    server = uvicorn.Server(uvicorn.Config(APP, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def test_a_gigabyte_without_length_is_cut_off_over_a_real_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        head = f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        sent, chunk = 0, b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        try:
            while sent < 1 << 30:
                sock.sendall(chunk)
                sent += 1 << 16
        except OSError:  # the server has closed it
            pass
        assert sent < 64 << 20
