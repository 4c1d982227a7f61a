"""Who holds which rows: flwr-datasets partitioners over the training rows, held-out rows dealt alongside."""

import contextlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kilofed.data import Row, Rows, row_hash
from kilofed.errors import DataError
from kilofed.recipe import DataSpec, PartitionSpec

log = logging.getLogger("kilofed")


@dataclass(frozen=True)
class Share:
    """One client's rows."""

    name: str
    """The column's value, or the client's number."""
    train: list[Row]
    test: list[Row]


def divide(rows: Rows, spec: DataSpec, seed: int) -> list[Share]:
    """One share per client, in a fixed order: by name for a column, else by number.

    Held-out rows follow the column where it names the owner; otherwise they are dealt evenly by a hash of their content.
    Without held-out rows, each client keeps `spec.holdout` of its own rows apart, by the same hash.

    Raises:
        DataError: a missing column, more clients than rows, a client without rows to train or test on.
    """
    part = spec.partition
    kind = part.kind
    if kind == "auto":
        kind = "column" if part.column in rows.train[0] else "iid"
    if kind == "column":
        shares = _by_column(rows, part)
    else:
        shares = _by_partitioner(rows, part, kind, seed)
    if not rows.test:
        shares = [_hold_out(share, spec.holdout) for share in shares]
    if spec.max_test_rows:
        shares = [Share(s.name, s.train, sorted(s.test, key=row_hash)[: spec.max_test_rows]) for s in shares]
    for share in shares:
        if len(share.train) < max(part.min_rows, 1):
            raise DataError(
                f"client {share.name} has {len(share.train)} training rows, at least {max(part.min_rows, 1)} are needed: "
                "take fewer clients, another partition, or a smaller data.partition.min_rows"
            )
        if not share.test:
            log.warning("client %s has no held-out rows: it is trained but not scored", share.name)
    return shares


def _by_column(rows: Rows, part: PartitionSpec) -> list[Share]:
    train, test = _grouped(rows.train, part.column), _grouped(rows.test, part.column, must=False)
    if lost := sorted(set(test) - set(train)):
        log.warning("held-out rows of %s are left out: no client has training rows of that name", ", ".join(lost))
    return [Share(name, train[name], test.get(name, [])) for name in sorted(train)]


def _grouped(rows: Sequence[Row], column: str, *, must: bool = True) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for number, row in enumerate(rows, 1):
        if column not in row:
            if not must:
                raise DataError(f"held-out row {number} has no column {column!r}, which says whose it is")
            raise DataError(
                f"data.partition.column is {column!r}, row {number} has {', '.join(sorted(row))}\n"
                "  hint: data.partition.kind=iid data.partition.num_clients=5"
            )
        owner = row[column]
        groups.setdefault("+".join(map(str, owner)) if isinstance(owner, list) else str(owner), []).append(row)
    return groups


def _by_partitioner(rows: Rows, part: PartitionSpec, kind: str, seed: int) -> list[Share]:
    if part.num_clients < 1:
        raise DataError(f"data.partition.num_clients is {part.num_clients}; {kind} needs to know how many clients")
    if part.num_clients > len(rows.train):
        raise DataError(f"{part.num_clients} clients cannot share {len(rows.train)} training rows: take fewer clients")
    indices = _indices(rows.train, part, kind, seed)
    order = sorted(range(len(rows.test)), key=lambda i: row_hash(rows.test[i], seed))
    dealt = [sorted(order[client :: len(indices)]) for client in range(len(indices))]
    return [
        Share(f"client {client}", [rows.train[i] for i in own], [rows.test[i] for i in dealt[client]])
        for client, own in enumerate(indices)
    ]


def _indices(rows: Sequence[Row], part: PartitionSpec, kind: str, seed: int) -> list[list[int]]:
    """Row numbers of each client, as the partitioner divides them."""
    import datasets
    from flwr_datasets import partitioner as library

    labelled = kind in ("dirichlet", "pathological")
    if labelled and part.column not in rows[0]:
        raise DataError(
            f"data.partition.column is {part.column!r}; {kind} needs a label column, there is {', '.join(sorted(rows[0]))}"
        )
    columns: dict[str, list[object]] = {"row": list(range(len(rows)))}
    if labelled:
        columns["label"] = [str(row[part.column]) for row in rows]
    count = part.num_clients
    made: library.Partitioner
    if kind == "iid":
        made = library.IidPartitioner(num_partitions=count)
    elif kind == "dirichlet":
        made = library.DirichletPartitioner(
            num_partitions=count,
            partition_by="label",
            alpha=part.alpha,
            min_partition_size=max(part.min_rows, 1),
            self_balancing=False,
            seed=seed,
        )
    elif kind == "size":
        made = library.LinearPartitioner(num_partitions=count)
    else:
        made = library.PathologicalPartitioner(
            num_partitions=count, partition_by="label", num_classes_per_partition=part.classes, seed=seed
        )
    table = datasets.Dataset.from_dict(columns)
    made.dataset = table.shuffle(seed=seed)  # IID and linear partitioners cut in order.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return [sorted(made.load_partition(client)["row"]) for client in range(count)]
    except ValueError as error:
        raise DataError(f"{kind} cannot divide {len(rows)} rows among {count} clients: {error}") from error


def _hold_out(share: Share, holdout: float) -> Share:
    ranked = sorted(share.train, key=row_hash)
    num_test = int(len(ranked) * holdout)
    if holdout and not num_test and len(ranked) > 1:
        num_test = 1
    held = {id(row) for row in ranked[:num_test]}
    train = [row for row in share.train if id(row) not in held]
    return Share(share.name, train, [row for row in share.train if id(row) in held])
