"""Whether the hub can be reached, so that a machine without network is told at once and not after minutes of retries."""

import functools
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 5.0
"""Seconds for one connection to the hub."""


@functools.cache
def settle() -> None:
    """Put the hub's libraries in offline mode, in which they use their cache alone, if the hub cannot be reached."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies().get(address.scheme):
        return  # The user said so; or a proxy has to be trusted.
    try:
        socket.create_connection((address.hostname or "", address.port or 443), PATIENCE).close()
    except OSError:
        import datasets

        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
