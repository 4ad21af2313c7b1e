"""A whole server: the loop is never held up, what Prometheus reads adds up, and no request makes it fail."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from live import KEYS, Live, until

from duetvl.core.backend import Backend

CHAT = "/v1/chat/completions"
ANSWERED = ("stop", "length", "abort", "error")


@pytest.fixture(scope="module")
def short(tiny_model: Any) -> Iterator[Live]:
    """A server of short answers."""
    server = Live(*tiny_model, output_tokens=3)
    yield server
    server.stop()


def test_health_answers_while_all_threads_prepare(short: Live) -> None:
    gate, busy = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        busy.release()
        gate.wait()

    async def hold_all() -> None:
        await asyncio.gather(*(short.answering.in_pool(hold) for _ in range(4)))

    holding = threading.Thread(target=asyncio.run, args=(hold_all(),))
    holding.start()
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(short.chat("hello")[0]))
    try:
        for _ in range(4):
            busy.acquire()
        asking.start()
        until(lambda: short.answering.admission.under_way == 1)
        for path in ("/health", "/ready", "/metrics"):
            assert short.ask("GET", path)[0] == 200
        assert not answers
    finally:
        gate.set()
        holding.join()
        asking.join()
    assert answers == [200]


def test_metrics_add_up_to_the_requests(short: Live) -> None:
    def told() -> Counter[str]:
        numbers: Counter[str] = Counter()
        for reason in ANSWERED:
            numbers["answers"] += int(short.number("vllm:request_success_total", finished_reason=reason))
        for name in ("generation_tokens_total", "prompt_tokens_total", "e2e_request_latency_seconds_count",
                     "time_to_first_token_seconds_count", "iteration_tokens_total_count"):  # fmt: skip
            numbers[name] += int(short.number(f"vllm:{name}"))
        return numbers

    before = told()
    usage: Counter[str] = Counter()
    for number in range(3):
        status, answer, _ = short.chat(f"question {number}", n=1 + number, ignore_eos=True)
        assert status == 200
        usage.update({key: value for key, value in answer["usage"].items() if isinstance(value, int)})
    assert short.chat("hello", temperature=9)[0] == 400
    assert short.chat("hello", max_tokens=4)[0] == 400
    difference = told() - before
    assert difference["answers"] == 6 and difference["e2e_request_latency_seconds_count"] == 3
    assert difference["time_to_first_token_seconds_count"] == 3
    assert difference["generation_tokens_total"] == usage["completion_tokens"] == 18
    assert difference["prompt_tokens_total"] == usage["prompt_tokens"]
    assert difference["iteration_tokens_total_count"] >= 3 * 3
    registry = short.answering.metrics.registry
    for status, count in (("200", 3), ("400", 2)):
        labels = {"handler": CHAT, "method": "POST", "status": status}
        assert (registry.get_sample_value("http_requests_total", labels) or 0) >= count


def test_a_body_that_is_too_large_reaches_nobody(tiny_model: Any) -> None:
    server = Live(*tiny_model, body_bytes=1000)
    try:
        status, answer, headers = server.chat("x" * 1000)
        assert status == 413 and answer["error"]["code"] == "request_too_large" and headers["x-request-id"]
        assert server.chat("x", max_tokens=1)[0] == 200
    finally:
        server.stop()


GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"model": "tiny", "prompt": "hello"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [72, 73]},
}


def bodies(path: str, drawn: Any) -> Iterator[Any]:
    """What was drawn; and, as most of that is refused for its first fault, each field of it in a good request."""
    yield drawn
    if isinstance(drawn, dict):
        yield from ({**GOOD[path], name: value} for name, value in drawn.items())


def test_no_request_that_the_schema_allows_makes_the_server_fail(short: Live, be: Backend) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    if be.name != "torch_npu":
        pytest.skip("what is refused and how does not depend on the backend")
    base = f"http://127.0.0.1:{short.port}"
    headers = {"authorization": f"Bearer {KEYS['alice']}"}
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json", headers=headers)
    seen: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        examples = settings(
            max_examples=10 if operation.body else 3,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @examples
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            for body in bodies(case.path, case.body):
                case.body = body
                response = case.call(base_url=base, headers=headers)
                seen[case.path, response.status_code] += 1
                assert response.status_code < 500, (case.path, body, response.text)
                if response.status_code >= 400:
                    assert response.json()["error"]["message"]

        ask()
    assert {path for path, _ in seen} >= {CHAT, "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/metrics"}
    assert min(seen[path, 200] for path in GOOD) >= 3, seen
    assert short.ask("GET", "/health")[0] == 200 and short.chat("hello")[0] == 200
