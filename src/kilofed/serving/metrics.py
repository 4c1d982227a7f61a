"""Metrics of a server for Prometheus, in a registry of its own; no prompt and no answer is in them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the time histograms, seconds."""


class Metrics:
    """What a server has done since it began."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.responses = Counter(
            "kilofed_responses", "Responses by path and status; other paths are one.", ["path", "status"], registry=own
        )
        self.prompt_tokens = Counter("kilofed_prompt_tokens", "Tokens of prompts.", registry=own)
        self.generated_tokens = Counter("kilofed_generated_tokens", "Tokens of answers.", registry=own)
        self.cancelled = Counter("kilofed_cancelled", "Requests whose client left.", registry=own)
        self.failed = Counter("kilofed_failed_streams", "Streams that ended with an error.", registry=own)
        self.active = Gauge("kilofed_active_requests", "Requests that are being decoded.", registry=own)
        self.waiting = Gauge("kilofed_waiting_requests", "Requests in the queue.", registry=own)
        began = Gauge("kilofed_start_time_seconds", "When the server began, Unix time.", registry=own)
        began.set_to_current_time()
        self.first_piece = Histogram(
            "kilofed_first_piece_seconds",
            "From a request to the first piece of its answer.",
            buckets=BOUNDS,
            registry=own,
        )
        self.whole = Histogram(
            "kilofed_request_seconds", "From a request to the end of its answer.", buckets=BOUNDS, registry=own
        )

    @property
    def mean_seconds(self) -> float:
        """Mean time of a request; 0 before the first has ended."""
        total = self.registry.get_sample_value("kilofed_request_seconds_sum") or 0.0
        return total / max(self.registry.get_sample_value("kilofed_request_seconds_count") or 0.0, 1.0)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it and its content type, in the text format or OpenMetrics as the `Accept` header has it."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
