"""What a run brought, said in plain sentences and plain numbers."""

from pathlib import Path

import pytest
from tests.made_results import client, made
from tests.made_results import row as a_row

from kilofed.config.recipe import Recipe
from kilofed.records.results import Bytes, Results, TotalBytes
from kilofed.runs.results import over_seeds, verdict


def row(*losses: float) -> dict[int, float]:
    """Losses by client."""
    return dict(enumerate(losses))


def test_better_than_both_says_by_how_much_and_how_surely() -> None:
    rows = {"base": row(3.0, 3.2, 3.1), "local": row(2.0, 2.2, 2.1), "federated": row(1.5, 1.7, 1.61)}
    base, local = verdict(rows)
    assert base.startswith("federated is 1.497 nats below the untouched base model (95 % interval +1.48")
    assert local.startswith("federated is 0.497 nats below local-only training (95 % interval +0.48")


def test_worse_says_that_it_does_not_beat() -> None:
    rows = {"base": row(1.0, 1.1, 1.2), "federated": row(1.5, 1.6, 1.8)}
    (sentence,) = verdict(rows)
    assert sentence.startswith(
        "federated does NOT beat the untouched base model: its held-out loss is 0.533 nats higher"
    )


def test_equal_does_not_beat_either() -> None:
    (sentence,) = verdict({"local": row(1.0, 1.0), "federated": row(1.0, 1.0)})
    assert "does NOT beat local-only training" in sentence


def test_a_gain_within_the_noise_is_called_so() -> None:
    (sentence,) = verdict({"local": row(1.0, 2.0, 3.0), "federated": row(1.5, 1.5, 2.9)})
    assert "0.033 nats below local-only training, which is within the noise (95 % interval -1." in sentence


def test_the_interval_is_of_paired_differences() -> None:
    # Clients differ by far more than the gain; the gain itself is the same for each.
    (sentence,) = verdict({"base": row(1.0, 5.0, 9.0), "federated": row(0.9, 4.9, 8.9)})
    assert sentence == "federated is 0.100 nats below the untouched base model (95 % interval +0.100 to +0.100)"


def test_one_client_has_no_interval() -> None:
    (sentence,) = verdict({"base": row(2.0), "federated": row(1.0)})
    assert sentence == "federated is 1.000 nats below the untouched base model"


def test_centralized_training_is_no_contest() -> None:
    rows = {"base": row(3.0), "centralized": row(1.0), "federated": row(1.5)}
    above, closed = verdict(rows, closed=0.75)[1:]
    assert above == "federated is 0.500 nats above centralized training"
    assert closed == "it closes 75 % of the gap from base to centralized"


def test_clients_that_were_not_trained_alone_do_not_count_against_those_that_were() -> None:
    (sentence,) = verdict({"local": {0: 1.5, 2: 2.5}, "federated": {0: 1.0, 1: 9.0, 2: 2.0}})
    assert sentence.startswith("federated is 0.500 nats below local-only training (95 % interval +0.500")


def one_seed(loss: float, up: int, digest: str, centralized: float = 0.5) -> Results:
    rows = {"base": 3.0, "federated": loss, "centralized": centralized}
    return made(
        rows={name: a_row(value, accuracy=value / 10, clients=(client(0, value),)) for name, value in rows.items()},
        bytes=Bytes(up, 2 * up),
        bytes_total=TotalBytes(4 * up, 8 * up),
        framing_bytes=up // 100,
        exchanges=5,
        seconds=1.5,
        peak_memory_bytes=up,
        state_sha256=digest,
    )


def test_repeats_are_means_with_an_interval_over_seeds(tmp_path: Path) -> None:
    every = [one_seed(1.0, 100, "a"), one_seed(2.0, 300, "b")]
    found = over_seeds(Recipe(seed=7, seeds=2), tmp_path, every)
    row = found.rows["federated"]
    assert (row.loss, row.accuracy, row.rouge_l, row.clients) == (1.5, pytest.approx(0.15), None, ())
    assert row.interval is not None
    low, high = row.interval
    assert (low + high) / 2 == pytest.approx(1.5)
    assert high - low == pytest.approx(12.706, rel=1e-3)  # 2 t(0.975, 1) s / sqrt(2), s = sqrt(1/2)
    assert (found.seeds, found.bytes) == ((7, 8), Bytes(200, 400))
    assert (found.bytes_total, found.exchanges, found.framing_bytes) == (TotalBytes(1600, 3200), 10, 4)
    assert (found.seconds, found.peak_memory_bytes) == (3.0, 300)
    assert "federated is 1.500 nats below the untouched base model (95 % interval -" in found.verdict[0].replace(
        ", which is within the noise", ""
    )
    assert [(one.seed, one.rows["federated"].loss) for one in found.per_seed] == [(7, 1.0), (8, 2.0)]
    assert found.closed == pytest.approx(0.6)
    assert found.verdict[-1] == "it closes 60 % of the gap from base to centralized"


@pytest.mark.parametrize("centralized", [3.0, 3.5])
def test_without_a_gap_none_is_closed(tmp_path: Path, centralized: float) -> None:
    found = over_seeds(Recipe(seeds=1), tmp_path, [one_seed(2.5, 100, "a", centralized)])
    assert found.closed is None
    assert not any("closes" in sentence for sentence in found.verdict)
