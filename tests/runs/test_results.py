"""What a run brought, said in plain sentences and plain numbers."""

import pytest

from kilofed.config.recipe import Recipe
from kilofed.runs.results import over_seeds, verdict


def row(*losses: float) -> dict[str, object]:
    return {"loss": sum(losses) / len(losses), "clients": [{"loss": loss} for loss in losses]}


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


def test_central_training_is_no_contest() -> None:
    above, closed = verdict({"base": row(3.0), "central": row(1.0), "federated": row(1.5)})[1:]
    assert above == "federated is 0.500 nats above central training"
    assert closed == "it closes 75 % of the gap from base to central"


@pytest.mark.parametrize("central", [3.0, 3.5])
def test_without_a_gap_none_is_closed(central: float) -> None:
    sentences = verdict({"base": row(3.0), "central": row(central), "federated": row(2.5)})
    assert not any("closes" in sentence for sentence in sentences)


def test_clients_that_were_not_trained_alone_do_not_count_against_those_that_were() -> None:
    every = [{"id": 0, "loss": 1.0}, {"id": 1, "loss": 9.0}, {"id": 2, "loss": 2.0}]
    alone = [{"id": 0, "loss": 1.5}, {"id": 2, "loss": 2.5}]
    (sentence,) = verdict({"local": {"loss": 2.0, "clients": alone}, "federated": {"loss": 4.0, "clients": every}})
    assert sentence.startswith("federated is 0.500 nats below local-only training (95 % interval +0.500")


def one_seed(loss: float, up: float, digest: str) -> dict[str, object]:
    score = {"accuracy": loss / 10, "perplexity": 1.0, "rouge_l": None, "exact_match": None}
    rows = {"base": {"loss": 3.0, **score, "clients": []}, "federated": {"loss": loss, **score, "clients": []}}
    return {
        "rows": rows,
        "bytes": {"up": up, "down": 2 * up},
        "bytes_total": {"up": 4 * up, "down": 8 * up},
        "exchanges": 5,
        "seconds": 1.5,
        "peak_memory_bytes": int(up),
        "state_sha256": digest,
        "method": "fedavg",
    }


def test_repeats_are_means_with_an_interval_over_seeds(tmp_path) -> None:
    found = over_seeds(Recipe(seed=7, seeds=2), tmp_path, [one_seed(1.0, 100, "a"), one_seed(2.0, 300, "b")])
    rows = found["rows"]
    assert rows["federated"]["loss"] == 1.5
    assert rows["federated"]["accuracy"] == pytest.approx(0.15)
    assert rows["federated"]["rouge_l"] is None
    low, high = rows["federated"]["interval"]
    assert (low + high) / 2 == pytest.approx(1.5)
    assert high - low == pytest.approx(12.706, rel=1e-3)  # 2 t(0.975, 1) s / sqrt(2), s = sqrt(1/2)
    assert (found["seeds"], found["bytes"]) == ([7, 8], {"up": 200, "down": 400})
    assert (found["bytes_total"], found["exchanges"]) == ({"up": 1600, "down": 3200}, 10)
    assert (found["seconds"], found["peak_memory_bytes"]) == (3.0, 300)
    assert "nats below the untouched base model" in found["verdict"][0]
