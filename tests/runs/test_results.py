"""What a run brought, said in plain sentences and plain numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.made_results import MADE, client, made
from tests.made_results import row as a_row

from kilofed.config.fields import Value
from kilofed.config.recipe import PrivacySpec, Recipe
from kilofed.config.tables import changed
from kilofed.errors import RunError
from kilofed.privacy.mechanisms import load_mechanism
from kilofed.records.codec import to_json
from kilofed.records.results import Bytes, PrivacySpent, Results, ScoreRows, TotalBytes, read
from kilofed.reports import report
from kilofed.runs import commit
from kilofed.runs.export import adapter
from kilofed.runs.folder import recipe_of, write_json
from kilofed.runs.loop import resume, run
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


def test_repeats_release_a_model_each_and_spend_together(tmp_path: Path) -> None:
    spec = PrivacySpec(kind="central", noise_multiplier=2.0, delta=1e-4)
    alone = load_mechanism(spec)
    every = [
        replace(one_seed(1.0, 100, "a"), privacy=PrivacySpent("central", alone.epsilon(means), 1e-4, means))
        for means in (3, 10, 41)
    ]
    found = over_seeds(Recipe(seeds=3, privacy=spec), tmp_path, every).privacy
    assert found == PrivacySpent("central", alone.epsilon(54), 1e-4, 54)
    assert found.epsilon is not None
    assert found.epsilon > max(one.privacy.epsilon or 0 for one in every)
    assert over_seeds(Recipe(seeds=2), tmp_path, [one_seed(1.0, 1, "a")] * 2).privacy == MADE.privacy


@pytest.fixture(scope="module")
def folders() -> list[Path]:
    return []


@pytest.fixture
def private(tiny_recipe: Recipe, folders: list[Path], tmp_path_factory, tmp_path: Path) -> Path:
    """A copy of a finished run of two rounds with noise, to be spoilt."""
    if not folders:
        words: dict[str, Value] = {"privacy.kind": "central", "evaluate.generate": 0, "evaluate.baselines": ["base"]}
        folders.append(run(changed(tiny_recipe, words), out=tmp_path_factory.mktemp("runs") / "run").folder)
    return Path(shutil.copytree(folders[0], tmp_path / "run"))


def test_epsilon_is_of_the_means_that_were_committed(private: Path) -> None:
    kept = commit.read(private)
    known = read(private)
    assert kept
    assert known
    assert kept.num_means == known.privacy.num_means == 2
    (private / "results.json").unlink()
    commit.write(private, replace(kept, num_means=7))
    again = resume(private).results
    assert again.privacy.num_means == 7
    assert again.privacy.epsilon == load_mechanism(recipe_of(private).privacy).epsilon(7)


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_shorter_file_of_lines_lowers_no_epsilon(private: Path, name: str, finished: bool) -> None:
    if not finished:
        (private / "results.json").unlink()
    rows = (private / name).read_text("utf-8").splitlines(keepends=True)
    (private / name).write_text("".join(rows[: len(rows) // 2]), "utf-8")
    with pytest.raises(RunError, match=rf"{name} has \d+ whole lines; when round 2 ended it had"):
        resume(private)
    if finished:
        with pytest.raises(RunError, match=rf"{name} is not as it was when results\.json was written"):
            report.write(private)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"num_means": 2', '"num_means": 1'),
        lambda text: text.replace('"epsilon": ', '"epsilon": 0'),
        lambda text: text.replace('"loss": ', '"loss": 1'),
        lambda text: text.replace('"sha256": "', '"sha256": "0'),
        lambda text: "",
    ],
)
def test_edited_results_are_worked_out_anew_and_said(private: Path, damage, caplog: pytest.LogCaptureFixture) -> None:
    path = private / "results.json"
    before, known = path.read_text("utf-8"), read(private)
    path.write_text(damage(before), "utf-8")
    assert path.read_text("utf-8") != before
    with pytest.raises(RunError, match=r"results\.json "):
        report.write(private)
    again = resume(private).results
    assert known
    assert replace(again, peak_memory_bytes=0) == replace(known, peak_memory_bytes=0, run=str(private))
    assert f"{path}" in caplog.text
    assert "it is worked out anew" in caplog.text


@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_adapter_is_not_exported_and_is_made_anew(
    private: Path, tmp_path: Path, gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = private / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    if gone:
        path.unlink()
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        RunError, match=r"adapter/adapter_model\.safetensors is (missing|not as it was).*resume the run"
    ):
        adapter(private, tmp_path / "out")
    resume(private)
    assert path.read_bytes() == whole
    assert "it is worked out anew" in caplog.text
    adapter(private, tmp_path / "out")


def test_results_of_another_state_are_not_believed(private: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = read(private)
    assert known
    write_json(private / "results.json", replace(known, state_sha256="ab" * 32, seconds=0.0).to_json())
    again = resume(private).results
    assert again.state_sha256 == known.state_sha256
    assert "results.json is of another state than" in caplog.text


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("text", ["{", '{"rows": {}}', None])
def test_damaged_or_foreign_rows_are_scored_anew_and_said(
    private: Path, text: str | None, finished: bool, caplog: pytest.LogCaptureFixture
) -> None:
    known = read(private)
    assert known
    if not finished:
        (private / "results.json").unlink()
    path = private / "baselines.json"
    if text is None:
        rows = {name: replace(row, loss=7.5) for name, row in known.rows.items()}
        text = json.dumps(to_json(ScoreRows(rows, "0" * 16)))
    before = (private / "baselines.json").read_bytes()
    path.write_text(text, "utf-8")
    assert resume(private).results.rows == known.rows
    assert "its rows are scored anew" in caplog.text
    assert path.read_bytes() == before
