"""A committed round comes back as it was written, with what it goes with; the method's tensors stay apart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilofed.errors import RunError
from kilofed.federation.states import Mark
from kilofed.payload import Payload
from kilofed.runs import commit
from kilofed.runs.commit import Commit, Lines

STATE = {"w": torch.arange(6.0).reshape(2, 3), "i": torch.tensor([7])}
MARKS = {3: Mark((2, 1), "0" * 64), 10: Mark((1, 0), "f" * 64), 41: Mark((2, 0), "0123456789abcdef" * 4)}
WHOLE = Commit(STATE, 2, "ab" * 8, "cd" * 32, Lines(12, "1" * 64), Lines(3, "2" * 64), 5, MARKS)


def test_what_was_committed_comes_back(tmp_path: Path) -> None:
    assert commit.read(tmp_path) is None
    commit.write(tmp_path, WHOLE)
    found = commit.read(tmp_path)
    assert found
    assert replace(found, state={}) == replace(WHOLE, state={})
    assert found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in STATE.items())


def test_without_client_states_nothing_is_added_to_the_methods_tensors(tmp_path: Path) -> None:
    commit.write(tmp_path, replace(WHOLE, clients={}))
    assert Payload.decode((tmp_path / commit.FILE).read_bytes()).tensors.keys() == STATE.keys()
    found = commit.read(tmp_path)
    assert found
    assert found.clients == {}


def test_the_digest_of_the_state_is_of_its_numbers_and_its_round_alone() -> None:
    digest = WHOLE.state_sha256
    other = Lines(99, "3" * 64)
    assert (
        replace(WHOLE, run="", recipe="", ledger=other, metrics=other, num_means=0, clients={}).state_sha256 == digest
    )
    assert replace(WHOLE, round=3).state_sha256 != digest
    assert replace(WHOLE, state={**STATE, "i": torch.tensor([8])}).state_sha256 != digest


@pytest.mark.parametrize("place", range(0, 1400, 7))
def test_a_flipped_bit_anywhere_is_refused_by_name(tmp_path: Path, place: int) -> None:
    commit.write(tmp_path, WHOLE)
    content = bytearray((tmp_path / commit.FILE).read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    (tmp_path / commit.FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"state\.safetensors is not a whole state of a run .*put a copy of it back"):
        commit.read(tmp_path)


def test_a_commit_that_lacks_something_is_refused(tmp_path: Path) -> None:
    commit.write(tmp_path, WHOLE)
    found = Payload.decode((tmp_path / commit.FILE).read_bytes())
    for name in found.scalars:
        rest = {key: value for key, value in found.scalars.items() if key != name}
        (tmp_path / commit.FILE).write_bytes(Payload(found.tensors, rest).encode())
        with pytest.raises(RunError, match="is not a whole state of a run"):
            commit.read(tmp_path)


def test_a_state_of_a_release_without_digests_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / commit.FILE).write_bytes(Payload(STATE, {"round": 2}).encode())
    found = commit.read(tmp_path)
    assert found
    assert (found.round, found.run, found.state_sha256) == (2, "", WHOLE.state_sha256)
