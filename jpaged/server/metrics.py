"""Metrics: counters and histograms of the server for Prometheus.

Pipeline: finished requests, engine -> [metrics] -> `/metrics`. Host only.

The names are those of vLLM with the prefix `jpaged:`. All values are collected in the
event loop, without locks, when a request ends; a scrape also asks the engine.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Iterator, Sequence

import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from jpaged.outputs import RequestOutput
from jpaged.server.bridge import EngineBridge
from jpaged.server.live_requests import LiveRequest

PREFIX = "jpaged:"
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0)
LONG_S = (*SHORT_S[4:], 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536)
# Name -> buckets, and what is measured.
HISTOGRAMS: dict[str, tuple[Sequence[float], str]] = {
    "time_to_first_token_seconds": (LONG_S, "From submission to the first token."),
    "inter_token_latency_seconds": (SHORT_S, "Between two tokens of a request, mean."),
    "e2e_request_latency_seconds": (LONG_S, "From submission to the end."),
    "request_queue_time_seconds": (LONG_S, "From submission to the first step."),
    "request_prefill_time_seconds": (LONG_S, "From the first step to the first token."),
    "request_decode_time_seconds": (LONG_S, "From the first token to the end."),
    "request_prompt_tokens": (TOKENS, "Tokens of a prompt."),
    "request_generation_tokens": (TOKENS, "Generated tokens of a request."),
}

# Name -> what it is.
GAUGES = {
    "num_requests_running": "Sequences with a batch row.",
    "num_requests_waiting": "Sequences that wait for a batch row.",
    "kv_cache_usage_perc": "Share of KV blocks in use, 0 to 1.",
    "engine_up": "1 if the engine serves; 0 if it is paused, draining or failed.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Generated tokens.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had.",
    "num_preemptions": "Preemptions of sequences.",
}


class Histogram:
    """Counts of values by bucket; one call counts several equal values."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value `count` times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative counts by bound, and the sum of all values."""
        bounds = [*(f"{float(bound)!r}" for bound in self._bounds), "+Inf"]
        counts = itertools.accumulate(self._counts)
        return list(zip(bounds, map(float, counts), strict=True)), self._sum


class ServerMetrics(Collector):
    """What the server has measured since its start.

    Args:
      model_name: label of all metrics.
    """

    def __init__(self, model_name: str):
        self._labels = {"model_name": model_name}
        self._counters: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._responses: collections.Counter[tuple[str, str]] = collections.Counter()
        self._histograms = {
            name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()
        }
        self._gauges: dict[str, float] = {}
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)

    def count_response(self, path: str, status: int) -> None:
        """Count a response; `path` is one of the server's own."""
        self._responses[path, str(status)] += 1

    def finished(self, live: LiveRequest) -> None:
        """Count a request that has ended."""
        if live.error is not None:
            self._reasons["error"] += live.num_sequences
            return
        self.add(live.request.output())

    def add(self, output: RequestOutput) -> None:
        """Count the output of a request that has ended."""
        found = output.metrics or {}
        generated = found.get("num_generated_tokens", 0)
        self._counters["prompt_tokens"] += len(output.prompt_token_ids)
        self._counters["generation_tokens"] += generated
        self._counters["prefix_cache_queries"] += len(output.prompt_token_ids)
        self._counters["prefix_cache_hits"] += found.get("num_cached_tokens", 0)
        self._counters["num_preemptions"] += found.get("num_preemptions", 0)
        for one in output.outputs:
            self._reasons[one.finish_reason or "error"] += 1
        observe = self._observe
        observe("request_prompt_tokens", len(output.prompt_token_ids))
        observe("request_generation_tokens", generated)
        queue, first, total = (
            found.get(name) for name in ("queue_s", "first_token_s", "total_s")
        )
        observe("request_queue_time_seconds", queue)
        observe("time_to_first_token_seconds", first)
        observe("e2e_request_latency_seconds", total)
        if queue is not None and first is not None:
            observe("request_prefill_time_seconds", first - queue)
        if total is not None and first is not None:
            observe("request_decode_time_seconds", total - first)
        longest = max((len(one.token_ids) for one in output.outputs), default=0)
        between = found.get("time_per_output_token_s")
        observe("inter_token_latency_seconds", between, longest - 1)

    def _observe(self, name: str, value: float | None, count: int = 1) -> None:
        if value is not None and count > 0:
            self._histograms[name].add(value, count)

    async def exposition(self, bridge: EngineBridge) -> tuple[bytes, str]:
        """Return the metrics as text, and the type of the text."""
        self._gauges = {
            "num_requests_running": 0.0,
            "num_requests_waiting": 0.0,
            "kv_cache_usage_perc": 0.0,
            "engine_up": 0.0,
        }
        if not bridge.is_broken:
            stats = await bridge.call(bridge.llm.stats)
            used = stats["num_blocks"] - stats["num_free_blocks"]
            is_up = not (bridge.is_paused or bridge.is_draining)
            self._gauges |= {
                "num_requests_running": stats["num_running"],
                "num_requests_waiting": max(
                    bridge.num_open_sequences - stats["num_running"], 0
                ),
                "kv_cache_usage_perc": used / stats["num_blocks"],
                "engine_up": float(is_up),
            }
        text = generate_latest(self._registry)
        return text, prometheus_client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, for the registry."""
        labels, values = list(self._labels), list(self._labels.values())
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            gauge.add_metric(values, self._gauges.get(name, 0.0))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            counter.add_metric(values, self._counters[name])
            yield counter
        reasons = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Outputs that ended, by reason.",
            labels=[*labels, "finished_reason"],
        )
        for reason in {"stop": 0, "length": 0, "abort": 0, **self._reasons}:
            reasons.add_metric([*values, reason], self._reasons[reason])
        yield reasons
        responses = CounterMetricFamily(
            f"{PREFIX}http_responses",
            "Responses by endpoint and status.",
            labels=["path", "status"],
        )
        for key, count in self._responses.items():
            responses.add_metric(list(key), count)
        yield responses
        for name, histogram in self._histograms.items():
            family = HistogramMetricFamily(
                PREFIX + name, HISTOGRAMS[name][1], labels=labels
            )
            buckets, total = histogram.buckets()
            family.add_metric(values, buckets, total)
            yield family
