"""metrics.jsonl: what kilofed wrote is read, what a method added is left alone, a broken line is named."""

from pathlib import Path

import pytest

from kilofed.errors import RunError
from kilofed.records import metrics


def test_a_round_is_read_beside_what_the_method_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"round": 0, "loss": 4, "accuracy": null, "clients": [{"id": 3, "loss": 1.5, "accuracy": 0.5, "num_tokens": 9}]}\n'
        '{"round": 1, "seeds_used": 7, "train_loss": 2.5, "failures": {"3": "it stopped"}, "seconds": 0.25}\n',
        "utf-8",
    )
    first, second = metrics.read(path)
    assert (first.round, first.loss, first.by_client, first.failures) == (0, 4.0, {3: 1.5}, {})
    assert (second.train_loss, second.seconds, second.framing_bytes) == (2.5, 0.25, 0)
    assert second.failures == {3: "it stopped"}
    assert second.loss is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"loss": 3}', "lacks round"),
        ('{"round": "1"}', "has another round"),
        ('{"round": 1, "clients": [{"id": 3}]}', r"lacks clients\.0\.loss"),
        ('{"rou', "is not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"round": 0}}\n{line}\n', "utf-8")
    with pytest.raises(RunError, match=rf"metrics\.jsonl line 2 is not a round's metrics \({said}.*; resume the run"):
        list(metrics.read(path))


def test_a_run_that_did_nothing_yet_has_no_rounds(tmp_path: Path) -> None:
    assert list(metrics.read(tmp_path / "metrics.jsonl")) == []
