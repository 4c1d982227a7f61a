"""Counts in Prometheus' text format."""

from kilofed.serving.metrics import BOUNDS, Metrics, Times


def test_a_histogram_counts_up_to_each_bound() -> None:
    times = Times()
    for seconds in (0.01, 0.02, 0.02, 999.0):
        times.add(seconds)
    lines = times.lines("t")
    assert lines[:3] == ['t_bucket{le="0.01"} 1', 't_bucket{le="0.025"} 3', 't_bucket{le="0.05"} 3']
    assert lines[-3:] == ['t_bucket{le="+Inf"} 4', "t_sum 999.050000", "t_count 4"]
    assert len(lines) == len(BOUNDS) + 3
    assert times.mean == 999.05 / 4
    assert Times().mean == 0


def test_every_series_has_its_help_and_type() -> None:
    metrics = Metrics()
    metrics.responses["/v1/completions", 200] = 3
    lines = metrics.text(num_active=1, num_waiting=2).splitlines()
    assert 'kilofed_responses_total{path="/v1/completions",status="200"} 3' in lines
    assert "kilofed_active_requests 1" in lines
    assert "kilofed_waiting_requests 2" in lines
    named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert named == [line.split()[2] for line in lines if line.startswith("# HELP")]
    series = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    assert all(any(one == name or one.startswith(f"{name}_") for name in named) for one in series)
