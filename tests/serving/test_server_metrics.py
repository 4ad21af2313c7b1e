"""What Prometheus is told: names that dashboards know, sums that are right, labels that are bounded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from asgi_client import ask
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from duetvl.core.batch import Sample
from duetvl.inference.blocks import BlockPool
from duetvl.inference.request import Completion, Delta, Finish, Request, Timings
from duetvl.inference.scheduler import Limits, Scheduler
from duetvl.inference.scheduler import Sequence as Waiting
from duetvl.inference.vision_cache import VisionCache
from duetvl.serving.logs import RequestLog
from duetvl.serving.metrics import Metrics

# What the dashboard that vLLM publishes reads.
DASHBOARD = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket", "time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum", "request_max_num_generation_tokens_bucket", "iteration_tokens_total_bucket",
    "num_preemptions_total",
)  # fmt: skip

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(metrics: Metrics) -> Series:
    """By name and labels, what Prometheus would read."""
    text, content_type = metrics.text()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return series(metrics)[name, tuple(sorted(labels.items()))]


def completion(tokens: Sequence[int], reason: Finish = "stop", choice: int = 0, cached: int = 0) -> Completion:
    now = time.monotonic()
    timings = Timings(now - 4, now - 3, now - 1 if tokens else None, now)
    return Completion("request", choice, list(tokens), "", reason, 100, cached, timings)


def answer(
    metrics: Metrics, model: str, tokens: int, reason: Finish = "stop", *, choices: int = 1, cached: int = 0
) -> None:
    """A request, as the server tells of it."""
    with metrics.watch(model, time.monotonic() - 5, choices) as watch:
        for choice in range(choices):
            for token in range(tokens):
                watch.delta(Delta("request", choice, [token]))
            watch.delta(Delta("request", choice, completion=completion(range(tokens), reason, choice, cached)))


def test_sums_are_those_of_the_requests() -> None:
    metrics = Metrics(["base", "tuned"])
    answer(metrics, "base", 5)
    answer(metrics, "base", 3, "length", choices=2, cached=64)
    answer(metrics, "tuned", 0, "error")
    answer(metrics, "tuned", 1, "deadline")
    base, tuned = {"model_name": "base"}, {"model_name": "tuned"}
    expected = {
        "vllm:generation_tokens_total": 5 + 2 * 3,
        "vllm:prompt_tokens_total": 200,
        "vllm:prefix_cache_queries_total": 300,
        "vllm:prefix_cache_hits_total": 128,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_queue_time_seconds_sum": pytest.approx(2.0),
        "vllm:request_prefill_time_seconds_sum": pytest.approx(4.0),
        "vllm:request_decode_time_seconds_sum": pytest.approx(3.0),
        "vllm:inter_token_latency_seconds_count": 4 + 2 * 2,
        "vllm:request_generation_tokens_sum": 11,
        "vllm:request_max_num_generation_tokens_sum": 8,
    }
    told = series(metrics)
    assert {name: told[name, (("model_name", "base"),)] for name in expected} == expected
    assert value(metrics, "vllm:time_to_first_token_seconds_sum", **base) >= 10  # from arrival, preparation included
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", **base) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="length", **base) == 2
    assert value(metrics, "vllm:request_success_total", finished_reason="error", **tuned) == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="abort", **tuned) == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_count", **tuned) == 1  # the other one had no token


def test_a_request_that_is_left_counts_its_choices_as_aborted() -> None:
    metrics = Metrics(["base"])
    deltas = [
        Delta("request", 0, [1, 2, 3]),
        Delta("request", 0, [4, 5], completion=completion([1, 2, 3, 4, 5])),
        Delta("request", 1, [1]),
    ]
    with suppress(ConnectionError), metrics.watch("base", time.monotonic(), 3) as watch:
        for delta in deltas:
            watch.delta(delta)
        raise ConnectionError
    assert value(metrics, "vllm:request_success_total", finished_reason="abort", model_name="base") == 2
    assert value(metrics, "vllm:request_success_total", finished_reason="stop", model_name="base") == 1
    assert value(metrics, "vllm:generation_tokens_total", model_name="base") == 6
    assert value(metrics, "vllm:inter_token_latency_seconds_count", model_name="base") == 2


def scheduler_with(sequences: int) -> Scheduler:
    scheduler = Scheduler(BlockPool(10, consecutive=False), VisionCache(100), 4, Limits(16, 1, 16))
    ids = np.arange(6, dtype=np.int32)
    prompt = Sample(ids, ids)
    for number in range(sequences):
        request = Request(prompt, max_new_tokens=4)
        scheduler.add(Waiting(request, number, 0, ids, np.stack([ids] * 3), 6, (), 4))
    return scheduler


def test_dashboards_find_every_name_and_the_engines_numbers_are_its_own() -> None:
    metrics, scheduler = Metrics(["base"]), scheduler_with(3)
    metrics.show_engine(scheduler)
    answer(metrics, "base", 2)
    metrics.ran_pass(17)
    names = {name for name, _ in series(metrics)}
    assert not {f"vllm:{name}" for name in DASHBOARD} - names
    assert all(dict(labels).get("model_name", "base") == "base" for _, labels in series(metrics))
    assert value(metrics, "vllm:num_requests_waiting", model_name="base") == 3
    assert scheduler.next() is not None
    assert value(metrics, "vllm:num_requests_waiting", model_name="base") == 2
    assert value(metrics, "vllm:num_requests_running", model_name="base") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="base") == pytest.approx(0.2)
    assert "process_resident_memory_bytes" in names


def test_labels_are_bounded_whatever_clients_send() -> None:
    metrics = Metrics(["base"])
    app = FastAPI(openapi_url=None)

    @app.get("/v1/models/{name}")
    def model(name: str) -> str:
        return name

    guarded = RequestLog(app, metrics)
    for number in range(50):
        answer(metrics, f"model-{number}", 1)
        assert ask(guarded, f"/v1/models/{number}", method="GET").status == 200
        assert ask(guarded, f"/{number}", method="GET").status == 404
        assert ask(guarded, "/v1/models/x", method=f"M{number}").status == 405
    told = series(metrics)
    assert len({labels for name, labels in told if name == "http_requests_total"}) == 3
    assert value(metrics, "http_requests_total", handler="/v1/models/{name}", method="GET", status="200") == 50
    assert value(metrics, "http_requests_total", handler="other", method="GET", status="404") == 50
    assert value(metrics, "vllm:request_success_total", model_name="other", finished_reason="stop") == 50
    assert not [labels for _, labels in told if "model-1" in str(labels)]


def test_two_servers_of_one_process_count_apart() -> None:
    one, other = Metrics(["base"]), Metrics(["base"])
    answer(one, "base", 3)
    assert ("vllm:generation_tokens_total", (("model_name", "base"),)) in series(one)
    assert ("vllm:generation_tokens_total", (("model_name", "base"),)) not in series(other)
