"""One process holds a run folder; another is told which; a killed one leaves no lock behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kilofed.errors import RunError
from kilofed.runs.lock import FILE, held

HOLD = """
import sys, time
from pathlib import Path
from kilofed.runs.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_told_who_holds_it_and_a_killed_one_lets_go(holder, tmp_path: Path) -> None:
    said = rf"{tmp_path} is in use by process {holder.pid} since \d{{4}}-.* UTC: wait for it to end, or end it, then resume"
    with pytest.raises(RunError, match=said), held(tmp_path):
        pytest.fail("it was held twice")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / FILE).exists()
    with held(tmp_path):
        pass
    assert not (tmp_path / FILE).exists()


def test_this_process_holds_it_once(tmp_path: Path) -> None:
    with held(tmp_path):
        with pytest.raises(RunError, match="is in use by this process since"), held(tmp_path):
            pytest.fail("it was held twice")
        assert (tmp_path / FILE).exists()
    with held(tmp_path):
        pass


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path):
        raise KeyError
    with held(tmp_path):
        pass


def test_of_many_at_once_one_at_a_time_holds_it(tmp_path: Path) -> None:
    inside, most, done = 0, 0, 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        own = 0
        while own < 25:
            try:
                with held(tmp_path):
                    with count:
                        inside += 1
                        most = max(most, inside)
                    with count:
                        inside -= 1
                        done += 1
                        own += 1
            except RunError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert done == 4 * 25


def test_child_processes_do_not_inherit_it(tmp_path: Path) -> None:
    with held(tmp_path):
        child = subprocess.Popen(
            [sys.executable, "-c", "print('up', flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False,
        )  # fmt: skip
        assert child.stdout
        assert child.stdout.readline() == b"up\n"
        files = [os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert not [file for file in files if FILE in file]
    with held(tmp_path):  # Though the child lives on.
        child.communicate(b"\n")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*gone"), held(tmp_path / "gone"):
        pytest.fail("there is no such folder")
