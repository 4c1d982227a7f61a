"""One client after the other in this process: the reference that every engine must equal."""

from collections.abc import Callable, Iterator, Mapping, Sequence

Handler = Callable[[int, bytes], bytes]
"""(client id, message) to reply."""


class InProcess:
    """Calls `handler` for each client in ascending id order.

    Args:
        ids: numbers of the clients.
        handler: the clients' side.
    """

    def __init__(self, ids: Sequence[int], handler: Handler) -> None:
        self._ids, self._handler = sorted(ids), handler

    def client_ids(self) -> list[int]:
        return list(self._ids)

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for client in sorted(asks):
            yield client, self._handler(client, asks[client])

    def overhead(self) -> int:
        """None: nothing is framed."""
        return 0

    def close(self) -> None:
        """Nothing to let go of."""
