"""What the server tells Prometheus, under the names that dashboards made for vLLM read.

Every interval is taken on one monotonic clock, in this process. Values of labels are bounded: served models, templates
of routes, methods of HTTP; whatever else a client sends is "other".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from duetvl.inference.request import Completion, Delta
from duetvl.inference.scheduler import Scheduler

OTHER: Final = "other"
_METHODS: Final = ("GET", "HEAD", "POST", "OPTIONS")
# How vLLM names the ends of an answer.
_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "abort", "deadline": "abort", "error": "error"}


def _steps(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... times `low`, up to `high`."""
    steps = [low * 10**decade * digit for decade in range(12) for digit in (1, 2, 5)]
    return [float(f"{step:.6g}") for step in steps if step <= high * 1.000001]


_SHORT: Final = _steps(0.001, 100)  # seconds, up to the first token or from one to the next
_LONG: Final = _steps(0.01, 2000)  # seconds of whole requests
_TOKENS: Final = _steps(1, 200_000)


class Metrics:
    """The metrics of one server, in a registry of its own: several servers may live in one process."""

    def __init__(self, model_names: Sequence[str]) -> None:
        """model_names: those under which models are served, the base model's first."""
        self.registry = CollectorRegistry()
        self.model_names = tuple(model_names)
        ProcessCollector(registry=self.registry)
        self.ttft = self._times("time_to_first_token", "from a request's arrival to its first token", _SHORT)
        self.between = self._times("inter_token_latency", "from one token of an answer to the next", _SHORT)
        self.per_token = self._times(
            "time_per_output_token", "as inter_token_latency_seconds, under its older name", _SHORT
        )
        self.whole = self._times("e2e_request_latency", "from a request's arrival to the end of its last answer", _LONG)
        self.queue = self._times("request_queue_time", "a prepared request waits for its first pass", _LONG)
        self.prefill = self._times("request_prefill_time", "from a request's first pass to its first token", _LONG)
        self.decode = self._times("request_decode_time", "from an answer's first token to its end", _LONG)
        self.prompt_sizes = self._sizes("request_prompt_tokens", "Tokens of a request's prompt")
        self.answer_sizes = self._sizes("request_generation_tokens", "Tokens of an answer")
        self.longest_answers = self._sizes("request_max_num_generation_tokens", "Tokens of a request's longest answer")
        self.pass_sizes = self._sizes("iteration_tokens_total", "Rows of one pass of the engine")
        self.prompt_tokens = self._count("prompt_tokens", "Tokens of prompts")
        self.answer_tokens = self._count("generation_tokens", "Tokens of answers")
        self.prefix_queries = self._count("prefix_cache_queries", "Tokens of prompts that were looked for in the cache")
        self.prefix_hits = self._count("prefix_cache_hits", "Tokens of prompts that were found in the cache")
        self.answers = self._count("request_success", "Answers, by how they ended", "finished_reason")
        self.responses = Counter("http_requests", "Responses", ["handler", "method", "status"], registry=self.registry)
        self.durations = Histogram(
            "http_request_duration_seconds", "Seconds from the head of a request to the end of its response",
            ["handler", "method"], registry=self.registry, buckets=_LONG,
        )  # fmt: skip

    def _times(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        labels = ["model_name"]
        return Histogram(f"vllm:{name}_seconds", f"Seconds: {help}", labels, registry=self.registry, buckets=buckets)

    def _sizes(self, name: str, help: str) -> Histogram:
        return Histogram(f"vllm:{name}", help, ["model_name"], registry=self.registry, buckets=_TOKENS)

    def _count(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", help, ["model_name", *labels], registry=self.registry)

    def model_label(self, model: str) -> str:
        """The model's name, if it is served here."""
        return model if model in self.model_names else OTHER

    def show_engine(self, scheduler: Scheduler) -> None:
        """Tell an engine's own numbers too: what runs, what waits, how full the cache is."""
        self.registry.register(_EngineNumbers(scheduler, self.model_names[0]))

    def ran_pass(self, rows: int) -> None:
        """Count a pass of `rows` rows. Called on the engine's thread."""
        self.pass_sizes.labels(self.model_names[0]).observe(rows)

    def responded(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A response has ended. handler: the template of its route."""
        method = method if method in _METHODS else OTHER
        self.responses.labels(handler, method, str(status)).inc()
        self.durations.labels(handler, method).observe(seconds)

    def watch(self, model: str, arrived: float, choices: int = 1) -> RequestWatch:
        """Watches a request of the engine's. arrived: on the clock of time.monotonic, before it was prepared."""
        return RequestWatch(self, self.model_label(model), arrived, choices)

    def text(self) -> tuple[bytes, str]:
        """All metrics for Prometheus, and the content type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class RequestWatch:
    """What becomes of one request, delta by delta; a choice that has not ended when this ends was aborted."""

    def __init__(self, metrics: Metrics, model: str, arrived: float, choices: int) -> None:
        self.metrics, self.model, self.arrived, self.choices = metrics, model, arrived, choices
        self._latest: dict[int, float] = {}  # by choice: when its latest token came
        self._completions: list[Completion] = []

    def delta(self, delta: Delta) -> None:
        """Something has come. Where it is several tokens at once, the time since the last one is shared out."""
        now, count = time.monotonic(), len(delta.token_ids)
        if count:
            self._tokens(delta.choice, now, count)
        if delta.completion is not None:
            self._completions.append(delta.completion)
            self._completed(delta.completion)

    def __enter__(self) -> RequestWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        metrics, model = self.metrics, self.model
        metrics.whole.labels(model).observe(time.monotonic() - self.arrived)
        if self._completions:
            metrics.longest_answers.labels(model).observe(max(len(one.token_ids) for one in self._completions))
        metrics.answers.labels(model, "abort").inc(self.choices - len(self._completions))

    def _tokens(self, choice: int, now: float, count: int) -> None:
        if not self._latest:
            self.metrics.ttft.labels(self.model).observe(now - self.arrived)
        before = self._latest.get(choice)
        self._latest[choice] = now
        self.metrics.answer_tokens.labels(self.model).inc(count)
        if before is not None:
            for histogram in (self.metrics.between, self.metrics.per_token):
                one = histogram.labels(self.model)
                for _ in range(count):
                    one.observe((now - before) / count)

    def _completed(self, completion: Completion) -> None:
        metrics, model, timings = self.metrics, self.model, completion.timings
        metrics.answers.labels(model, _REASONS[completion.finish_reason]).inc()
        metrics.answer_sizes.labels(model).observe(len(completion.token_ids))
        metrics.prefix_queries.labels(model).inc(completion.prompt_tokens)
        metrics.prefix_hits.labels(model).inc(completion.cached_tokens)
        if timings.first_token is not None:
            metrics.decode.labels(model).observe(timings.finished - timings.first_token)
        if len(self._completions) > 1:  # the rest is of the request, not of each of its answers
            return
        metrics.prompt_tokens.labels(model).inc(completion.prompt_tokens)
        metrics.prompt_sizes.labels(model).observe(completion.prompt_tokens)
        if timings.started is not None:
            metrics.queue.labels(model).observe(timings.started - timings.arrived)
            if timings.first_token is not None:
                metrics.prefill.labels(model).observe(timings.first_token - timings.started)


class _EngineNumbers(Collector):
    """Read when they are asked for, on another thread than the engine's: each is right, all are of about one moment."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self.scheduler, self.model = scheduler, model

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        scheduler = self.scheduler
        gauges: Iterable[tuple[str, str, float]] = (
            ("num_requests_running", "Answers under way", len(scheduler.running)),
            ("num_requests_waiting", "Answers that wait for their turn", len(scheduler.waiting)),
            (
                "kv_cache_usage_perc",
                "Part of the cache that is in use, 0 to 1",
                scheduler.pool.used / scheduler.pool.size,
            ),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        preemptions = CounterMetricFamily(
            "vllm:num_preemptions", "Answers that gave up their blocks", labels=["model_name"]
        )
        preemptions.add_metric([self.model], scheduler.preemptions)
        yield preemptions
