"""Metrics of a server, in Prometheus' text format (version 0.0.4); no prompt and no answer is in them."""

import time
from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the time histograms, seconds."""


class Times:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[sum(seconds > bound for bound in BOUNDS)] += 1
        self._sum += seconds

    @property
    def mean(self) -> float:
        """Seconds; 0 where nothing was counted."""
        return self._sum / max(sum(self._counts), 1)

    def lines(self, name: str) -> list[str]:
        """In Prometheus' text."""
        total, lines = 0, []
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


@dataclass
class Metrics:
    """What a server has done since it began. Changed in the event loop's thread only."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status; paths that are not served count as one."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cancelled: int = 0
    """Requests whose client left before the end."""
    failed: int = 0
    """Streams that had begun and ended with an error."""
    first_piece: Times = field(default_factory=Times)
    """From a request's arrival to the first piece of its answer."""
    whole: Times = field(default_factory=Times)
    """From a request's arrival to the end of its answer."""
    began: float = field(default_factory=time.time)

    def text(self, num_active: int, num_waiting: int) -> str:
        """All of it, for GET /metrics."""
        responses = [
            f'kilofed_responses_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.responses.items())
        ]
        parts = [
            ("kilofed_responses_total", "counter", "Responses by path and status.", responses),
            _single("kilofed_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            _single("kilofed_generated_tokens_total", "counter", "Tokens of answers.", self.generated_tokens),
            _single("kilofed_cancelled_total", "counter", "Requests whose client left.", self.cancelled),
            _single("kilofed_failed_streams_total", "counter", "Streams that ended with an error.", self.failed),
            _single("kilofed_active_requests", "gauge", "Requests that are being decoded.", num_active),
            _single("kilofed_waiting_requests", "gauge", "Requests in the queue.", num_waiting),
            _single("kilofed_start_time_seconds", "gauge", "When the server began, Unix time.", round(self.began)),
            _times(
                "kilofed_first_piece_seconds", "From a request to the first piece of its answer.", self.first_piece
            ),
            _times("kilofed_request_seconds", "From a request to the end of its answer.", self.whole),
        ]
        lines = [
            line
            for name, kind, what, values in parts
            for line in (f"# HELP {name} {what}", f"# TYPE {name} {kind}", *values)
        ]
        return "\n".join(lines) + "\n"


Part = tuple[str, str, str, list[str]]


def _single(name: str, kind: str, what: str, value: int) -> Part:
    return name, kind, what, [f"{name} {value}"]


def _times(name: str, what: str, times: Times) -> Part:
    return name, "histogram", what, times.lines(name)
