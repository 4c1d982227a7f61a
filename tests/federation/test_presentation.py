"""What a method shows of itself: nothing by default, charts as plain values, and no torch behind the module."""

import json
import subprocess
import sys

from kilofed.config.recipe import TrainSpec
from kilofed.federation.parties import Server
from kilofed.federation.presentation import Chart, Presentation


def test_a_method_shows_nothing_by_default() -> None:
    server, shown = Server(seed=0, num_rounds=1, train=TrainSpec()), Presentation()
    assert list(shown.diagnose(server, [], [])) == list(shown.charts(server, [])) == []
    assert dict(shown.extra_models(server)) == {}


def test_a_chart_comes_back_from_json_as_it_was() -> None:
    chart = Chart("Scalars", "By round.", "round", "bytes", {"up": [(1.0, 3.0), (2.0, 41.5)], "down": []})
    table = json.loads(json.dumps(chart.as_dict()))
    lines = {label: [tuple(point) for point in points] for label, points in table.pop("lines").items()}
    assert Chart(**table, lines=lines) == chart


def test_the_report_reads_charts_without_torch() -> None:
    code = "import sys; from kilofed.federation.presentation import Chart; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
