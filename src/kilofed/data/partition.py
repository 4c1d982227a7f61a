"""Partition of rows over clients: flwr-datasets partitioners for training rows, matching shares of held-out rows."""

import contextlib
import io
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kilofed.config.recipe import DataSpec, PartitionSpec
from kilofed.data.formats import Row
from kilofed.data.notices import Warn, log_warning
from kilofed.data.readers import Rows, row_hash
from kilofed.errors import DataError, nearest


@dataclass(frozen=True)
class Share:
    """One client's rows."""

    name: str
    """The column's value, or `client N`."""
    train: list[Row]
    test: list[Row]


def divide(rows: Rows, spec: DataSpec, seed: int, *, warn: Warn = log_warning) -> list[Share]:
    """One share per client, in a fixed order: by name for a column, else by number.

    Held-out rows are assigned by the column too; for other partitions they are spread evenly by a hash of their content.
    Without held-out rows, each client holds out `spec.holdout` of its own rows by the same hash, which keeps equal rows
    together.

    Raises:
        DataError: a missing column, more clients than rows, or a client without training rows.
    """
    part = spec.partition
    kind = part.kind
    if spec.task == "classify" and kind in ("dirichlet", "pathological") and part.column == PartitionSpec().column:
        part = replace(part, column=spec.columns.label)  # By default the skew is over labels.
    if kind == "auto":
        kind = "column" if part.column in rows.train[0] or part.column != PartitionSpec().column else "iid"
    shares = _by_column(rows, part, warn) if kind == "column" else _by_partitioner(rows, part, kind, seed, warn)
    for share in shares:
        _check_size(share, part.min_rows)
    if not rows.test:
        shares = [_hold_out(share, spec.holdout) for share in shares]
        for share in shares:
            _check_size(share, 1)
    if spec.max_test_rows:
        shares = [replace(share, test=sorted(share.test, key=row_hash)[: spec.max_test_rows]) for share in shares]
    if untested := [share.name for share in shares if not share.test]:
        warn(f"clients without held-out rows are trained but not evaluated: {_shorten(untested)}")
    return shares


def _by_column(rows: Rows, part: PartitionSpec, warn: Warn) -> list[Share]:
    train, test = _grouped(rows.train, part, "row"), _grouped(rows.test, part, "held-out row")
    if unmatched := sorted(set(test) - set(train)):
        number = sum(len(test[name]) for name in unmatched)
        warn(
            f"{number} held-out rows are skipped: no client has training rows with that value of the column: "
            f"{_shorten(unmatched)}"
        )
    return [Share(name, train[name], test.get(name, [])) for name in sorted(train)]


def _grouped(rows: Sequence[Row], part: PartitionSpec, what: str) -> dict[str, list[Row]]:
    """Rows by the value of the column; a list of values is one value of its own."""
    groups: dict[str, list[Row]] = {}
    for number, row in enumerate(rows, 1):
        owner = row.get(part.column)
        if owner is None or owner == "":
            raise _no_column(part, f"{what} {number}", row)
        groups.setdefault("+".join(map(str, owner)) if isinstance(owner, list) else str(owner), []).append(row)
    return groups


def _by_partitioner(rows: Rows, part: PartitionSpec, kind: str, seed: int, warn: Warn) -> list[Share]:
    if part.num_clients > len(rows.train):
        raise DataError(
            f"data.partition.num_clients is {part.num_clients}, but there are {len(rows.train)} training rows; "
            "use fewer clients or more rows"
        )
    indices = _indices(rows.train, part, kind, seed, warn)
    order = sorted(range(len(rows.test)), key=lambda i: row_hash(rows.test[i], seed))
    indices_by_client = [sorted(order[client :: len(indices)]) for client in range(len(indices))]
    return [
        Share(f"client {client}", [rows.train[i] for i in own], [rows.test[i] for i in indices_by_client[client]])
        for client, own in enumerate(indices)
    ]


def _indices(rows: Sequence[Row], part: PartitionSpec, kind: str, seed: int, warn: Warn) -> list[list[int]]:
    """Row numbers of each client."""
    labels = _labels(rows, part) if kind in ("dirichlet", "pathological") else []
    if kind == "pathological" and part.classes > len(set(labels)):
        raise DataError(
            f"data.partition.classes is {part.classes}; expected at most {len(set(labels))}, the number of labels"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # Some partitioners split in row order.
    try:
        indices_by_client = _partition(
            part, kind, [labels[row] for row in order] if labels else ["" for _ in order], seed
        )
    except ValueError as error:
        hint = f"alpha={part.alpha}, " if kind == "dirichlet" else ""
        raise DataError(
            f"{kind} cannot give each of {part.num_clients} clients {part.min_rows} of {len(rows)} rows "
            f"({hint}min_rows={part.min_rows}); use fewer clients, or less skew"
        ) from error
    if (num_unassigned := len(rows) - sum(map(len, indices_by_client))) > 0:
        warn(
            f"{num_unassigned} of {len(rows)} training rows are assigned to no client: {part.num_clients} clients with "
            f"{part.classes} labels each do not cover all {len(set(labels))} labels"
        )
    return [sorted(order[i] for i in own) for own in indices_by_client]


def _partition(part: PartitionSpec, kind: str, labels: list[str], seed: int) -> list[list[int]]:
    """Positions in `labels` of each client. Raises ValueError: the partitioner cannot satisfy its settings."""
    import datasets

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from flwr_datasets import partitioner as library

        class Numbered(datasets.Dataset):  # type: ignore[misc]
            """Selections are row numbers: selecting in the library takes a millisecond or two per client."""

            def select(self, indices: Iterable[int], **_: object) -> list[int]:
                return [int(index) for index in indices]

        count, by = part.num_clients, "label"
        partitioner: library.Partitioner
        if kind == "iid":
            partitioner = library.IidPartitioner(num_partitions=count)
        elif kind == "size":
            partitioner = library.LinearPartitioner(num_partitions=count)
        elif kind == "dirichlet":
            partitioner = library.DirichletPartitioner(
                count, by, part.alpha, min_partition_size=part.min_rows, seed=seed
            )
        else:
            # The first label is assigned round robin, so that every label is used if there are enough clients.
            mode = "first-deterministic"
            partitioner = library.PathologicalPartitioner(
                count, by, part.classes, class_assignment_mode=mode, seed=seed
            )
        partitioner.dataset = Numbered.from_dict({by: labels})
        return [partitioner.load_partition(client) for client in range(count)]


def _labels(rows: Sequence[Row], part: PartitionSpec) -> list[str]:
    for number, row in enumerate(rows, 1):
        if part.column not in row:
            raise _no_column(part, f"row {number}", row)
    # The library keeps labels in numpy, which drops NULs at their ends and then does not find them again.
    return [str(row[part.column]).replace("\0", "\\0") for row in rows]


def _no_column(part: PartitionSpec, what: str, row: Row) -> DataError:
    if part.column in row:
        return DataError(
            f"{what} has no value in data.partition.column={part.column}, which assigns it to a client; fill it in"
        )
    return DataError(
        f"data.partition.column is {part.column!r}, which {what} does not have{nearest(part.column, row)}\n"
        "  hint: data.partition.kind=iid data.partition.num_clients=5"
    )


def _hold_out(share: Share, holdout: float) -> Share:
    hashes = [row_hash(row) for row in share.train]
    num_test = int(len(hashes) * holdout)
    if holdout and not num_test and len(hashes) > 1:
        num_test = 1
    held_out = set(sorted(hashes)[:num_test])
    train = [row for row, number in zip(share.train, hashes, strict=True) if number not in held_out]
    return Share(
        share.name, train, [row for row, number in zip(share.train, hashes, strict=True) if number in held_out]
    )


def _check_size(share: Share, least: int) -> None:
    if len(share.train) < least:
        raise DataError(
            f"client {share.name:.80} has {len(share.train)} training rows; expected at least {least}: "
            "use fewer clients, another partition, or a smaller data.partition.min_rows or data.holdout"
        )


def _shorten(names: Sequence[str]) -> str:
    """The first five names and the number of others."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
