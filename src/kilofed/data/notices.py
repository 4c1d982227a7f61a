"""What is said of rows that are skipped, to whoever is told: the log of a run, or the findings of `kilofed check`."""

import logging
from collections.abc import Callable

log = logging.getLogger("kilofed")

Warn = Callable[[str], None]
"""Is told one sentence."""


def log_warning(text: str) -> None:
    """Tell the log."""
    log.warning("%s", text)
