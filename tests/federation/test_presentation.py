"""What a method shows of itself: nothing by default, and no torch behind the module."""

import subprocess
import sys

from kilofed.config.recipe import TrainSpec
from kilofed.federation.parties import Server
from kilofed.federation.presentation import Presentation


def test_a_method_shows_nothing_by_default() -> None:
    server, shown = Server(seed=0, num_rounds=1, train=TrainSpec()), Presentation()
    assert list(shown.diagnose(server, [], [])) == list(shown.charts(server, [])) == []
    assert dict(shown.extra_models(server)) == {}


def test_what_a_method_shows_is_described_without_torch() -> None:
    code = "import sys, kilofed.federation.presentation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
