"""Summary lines of this Python installation's functions, each labelled with its family of packages, for classification."""

from kilofed.data.sources import Rows, pydocs

__all__ = ["load"]


def load(*, seed: int, num_clients: int = 5, train_rows: int = 200, test_rows: int = 40) -> Rows:
    """Read rows with `text` and `label`.

    Args:
        seed: decides which families and lines are taken.
        num_clients: families, each of which is one label.
        train_rows: training rows per label, at most.
        test_rows: held-out rows per label, at most.

    Raises:
        ValueError: as in `pydocs`.
    """
    found = pydocs.load(seed=seed, num_clients=num_clients, train_rows=train_rows, test_rows=test_rows)
    train, test = (
        [{"text": row["response"], "label": row["client"]} for row in rows] for rows in (found.train, found.test)
    )
    return Rows(train, test, f"families: {len(train)} training rows, {len(test)} held-out rows")
