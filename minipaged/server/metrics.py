"""What Prometheus is told, by vLLM's names: its dashboards show this engine as they show vLLM.

Counters and gauges are read from the engine when somebody asks; histograms are filled as things happen.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minipaged.async_llm import AsyncLLM
from minipaged.requests.request import Request
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.text.outputs import RequestOutput

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
MANY = 2000
LABELS = ("model_name", "engine")
HISTOGRAMS = {
    "time_to_first_token_seconds": ("seconds from the arrival to the first token", SECONDS),
    "inter_token_latency_seconds": ("seconds between two tokens of a sequence", SECONDS),
    "request_time_per_output_token_seconds": ("mean of it over a request", SECONDS),
    "e2e_request_latency_seconds": ("seconds from the arrival to the last token", SECONDS),
    "request_queue_time_seconds": ("seconds from the arrival to the first computation", SECONDS),
    "request_prefill_time_seconds": ("seconds from the first computation to the first token", SECONDS),
    "request_decode_time_seconds": ("seconds from the first token to the last", SECONDS),
    "request_inference_time_seconds": ("seconds from the first computation to the last token", SECONDS),
    "request_prompt_tokens": ("tokens of a request's prompt", TOKENS),
    "request_generation_tokens": ("tokens of a request's output", TOKENS),
    "request_max_num_generation_tokens": ("tokens of its longest output", TOKENS),
    "request_params_n": ("samples that a request asks for", (1, 2, 5, 10, 20)),
    "iteration_tokens_total": ("tokens computed in a step", TOKENS),
}


class _Registry(CollectorRegistry):
    """Without the times at which the metrics were made: a third of the lines, and nobody looks at them."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """registry: what /metrics writes. model: the label model_name."""

    def __init__(self, llm: AsyncLLM, model: str):
        self.registry = _Registry()
        self._llm, self._labels = llm, (model, "0")
        self._histograms = {
            name: Histogram(f"vllm:{name}", about, LABELS, buckets=sizes, registry=self.registry).labels(*self._labels)
            for name, (about, sizes) in HISTOGRAMS.items()
        }
        names = (*LABELS, "finished_reason")
        self._success = Counter("vllm:request_success", "outputs by their end", names, registry=self.registry)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(*self._labels, reason)
        self._last_token: dict[int, float] = {}  # by sequence: when
        self._last_fork: dict[str, float] = {}  # by request: when its samples drew their first tokens
        self.registry.register(self)
        llm.engine.observers.append(self._step)

    def left(self, requests: list[Request]) -> None:
        """Nobody waits for them any more, and they were aborted."""
        self._success.labels(*self._labels, "abort").inc(sum(request.params.n or 1 for request in requests))

    def finished(self, output: RequestOutput) -> None:
        """A request is over."""
        told, times = self._histograms, output.metrics
        lengths = [one.num_tokens for one in output.outputs]
        for one in output.outputs:
            self._success.labels(*self._labels, one.finish_reason).inc()
        told["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        told["request_generation_tokens"].observe(sum(lengths))
        told["request_max_num_generation_tokens"].observe(max(lengths, default=0))
        told["request_params_n"].observe(len(output.outputs))
        first, last, begun = times.first_token_time, times.finished_time, times.first_scheduled_time
        if begun is not None:
            told["request_queue_time_seconds"].observe(begun - times.arrival_time)
        if first is None or last is None or begun is None or not any(lengths):
            return  # aborted, or failed
        told["time_to_first_token_seconds"].observe(first - times.arrival_time)
        told["request_prefill_time_seconds"].observe(first - begun)
        told["request_decode_time_seconds"].observe(last - first)
        told["request_inference_time_seconds"].observe(last - begun)
        told["e2e_request_latency_seconds"].observe(last - times.arrival_time)
        if (each := output.time_per_output_token) is not None:
            told["request_time_per_output_token_seconds"].observe(each)

    def _step(self, plan: StepPlan, output: StepOutput) -> None:
        """In the engine's thread. Between two tokens of a sequence there may be steps that it sat out, swapped out."""
        now, last, forked = time.monotonic(), self._last_token, self._last_fork
        if plan.sequences:
            self._histograms["iteration_tokens_total"].observe(plan.num_tokens)
        for part in plan.sequences:
            if part.draw or part.num_candidates:
                before = last.get(part.seq_id) or forked.get(part.request_id)
                if before is not None:
                    self._histograms["inter_token_latency_seconds"].observe(now - before)
                last[part.seq_id] = now
                if part.draw and part.draw.num_draws > 1:  # each of them is a sequence from now on
                    forked[part.request_id] = now
        if len(last) + len(forked) > MANY:
            self._forget()

    def _forget(self) -> None:
        """Of sequences that have ended."""
        scheduler = self._llm.engine.scheduler
        requests = [one for queue in (scheduler.running, scheduler.swapped, scheduler.waiting) for one in queue]
        live, names = {seq.seq_id for one in requests for seq in one.live}, {one.request_id for one in requests}
        self._last_token = {seq_id: when for seq_id, when in self._last_token.items() if seq_id in live}
        self._last_fork = {name: when for name, when in self._last_fork.items() if name in names}

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself. It isn't asked to stand still: these are single numbers."""
        engine = self._llm.engine
        scheduler, totals, prefixes = engine.scheduler, engine.totals, engine.scheduler.admission.prefixes
        in_use = 1 - engine.memory.num_free / engine.memory.num_blocks
        gauges = {
            "num_requests_running": ("requests that compute", len(scheduler.running)),
            "num_requests_waiting": ("requests that wait", len(scheduler.waiting) + len(scheduler.swapped)),
            "kv_cache_usage_perc": ("the share of blocks in use, 0 to 1", in_use),
        }
        counters = {
            "num_preemptions": ("requests that had to make way", sum(scheduler.num_preemptions.values())),
            "prompt_tokens": ("tokens of prompts", totals.num_prompt_tokens),
            "generation_tokens": ("tokens of outputs", totals.num_output_tokens),
            "prefix_cache_queries": ("tokens looked for in the prefix cache", prefixes.queried),
            "prefix_cache_hits": ("tokens found in it", prefixes.found),
        }
        if scheduler.transfers.takes:
            taken = scheduler.transfers.counts.num_loaded_tokens
            counters["external_prefix_cache_hits"] = "tokens of prompts that came from another engine", taken
        if scheduler.speculation:
            counts = scheduler.speculation.counts
            counters |= {
                "spec_decode_num_drafts": ("times that tokens were guessed", counts.num_drafts),
                "spec_decode_num_draft_tokens": ("tokens guessed", counts.num_draft_tokens),
                "spec_decode_num_accepted_tokens": ("of them right", counts.num_accepted_tokens),
            }
        for kinds, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (about, value) in kinds.items():
                metric = family(f"vllm:{name}", about, labels=LABELS)
                metric.add_metric(self._labels, value)
                yield metric
