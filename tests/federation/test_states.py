"""A client's state: found by round and exchange, the same from every process, never half written."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kilofed.errors import RunError
from kilofed.federation.states import States


def of(number: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), number)}


@pytest.fixture(params=["memory", "folder"])
def states(request: pytest.FixtureRequest, tmp_path: Path) -> States:
    return States(tmp_path / "7" if request.param == "folder" else None)


def value(found: dict[str, torch.Tensor]) -> float | None:
    return found["x"][1, 2].item() if found else None


def test_there_is_no_state_before_the_first(states: States) -> None:
    assert states.before((1, 0)) == {}
    states.keep((1, 0), of(1))
    assert states.before((1, 0)) == {}


def test_a_message_finds_the_newest_older_state(states: States) -> None:
    states.keep((1, 0), of(1))
    assert value(states.before((1, 1))) == 1
    states.keep((1, 1), of(2))
    states.keep((2, 0), of(3))
    assert value(states.before((2, 1))) == 3
    assert value(states.before((9, 0))) == 3


def test_a_server_that_went_back_a_round_meets_its_state(states: States) -> None:
    states.keep((1, 0), of(1))
    states.keep((2, 0), of(2))
    states.keep((2, 1), of(3))
    assert value(states.before((2, 0))) == 1
    states.keep((2, 0), of(4))
    assert value(states.before((3, 0))) == 4


def test_a_message_that_comes_twice_meets_the_same_state(states: States) -> None:
    for exchange in range(4):
        states.keep((1, exchange), of(exchange))
    assert value(states.before((1, 3))) == 2
    states.keep((1, 3), of(3))
    assert value(states.before((1, 3))) == 2


def test_files_do_not_grow_with_the_run(tmp_path: Path) -> None:
    states = States(tmp_path)
    for round in range(1, 5):
        for exchange in range(6):
            states.keep((round, exchange), of(exchange))
            assert len(list(tmp_path.iterdir())) <= 3


def test_going_back_drops_later_rounds(states: States) -> None:
    states.keep((1, 0), of(1))
    states.keep((2, 0), of(2))
    states.keep((1, 0), of(5))
    assert value(states.before((3, 0))) == 5


def test_rounds_without_this_client_lose_nothing(states: States) -> None:
    states.keep((2, 0), of(2))
    states.keep((7, 0), of(7))
    assert value(states.before((7, 0))) == 2
    states.keep((12, 0), of(12))
    assert value(states.before((12, 0))) == 7
    assert value(states.before((7, 0))) is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), unique=True))
def test_memory_and_folder_agree(tmp_path_factory: pytest.TempPathFactory, moments: list[tuple[int, int]]) -> None:
    memory, folder = States(), States(tmp_path_factory.mktemp("states"))
    for number, when in enumerate(moments):
        memory.keep(when, of(number))
        folder.keep(when, of(number))
        for asked in moments:
            assert value(memory.before(asked)) == value(folder.before(asked))


def test_another_process_reads_what_one_wrote(tmp_path: Path) -> None:
    one, other = States(tmp_path / "0"), States(tmp_path / "0")
    one.keep((1, 0), of(1))
    assert value(other.before((2, 0))) == 1
    other.keep((2, 0), of(2))
    assert value(one.before((3, 0))) == 2
    one.keep((3, 0), of(3))
    assert len(list((tmp_path / "0").iterdir())) == 2


def test_what_is_found_is_a_copy(states: States) -> None:
    given = of(1)
    states.keep((1, 0), given)
    given["x"].zero_()
    states.before((2, 0))["x"].zero_()
    assert value(states.before((2, 0))) == 1


def test_a_stateless_client_leaves_no_folder(tmp_path: Path) -> None:
    assert States(tmp_path / "0").before((3, 0)) == {}
    assert not (tmp_path / "0").exists()


def test_a_half_written_file_is_not_a_state(tmp_path: Path) -> None:
    States(tmp_path).keep((1, 0), of(1))
    (tmp_path / ".round-000002-0000.safetensors.17.part").write_bytes(b"half")
    assert value(States(tmp_path).before((3, 0))) == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    States(tmp_path).keep((1, 0), of(1))
    file = tmp_path / "round-000001-0000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"round-000001-0000\.safetensors is damaged"):
        States(tmp_path).before((2, 0))


def test_dtypes_and_scalars_shapes_survive(states: States) -> None:
    kept = {"b": torch.tensor(1.5, dtype=torch.bfloat16), "i": torch.arange(3), "e": torch.empty(0, 4)}
    states.keep((1, 0), kept)
    found = states.before((2, 0))
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) and found[name].dtype == kept[name].dtype for name in kept)


def test_a_state_under_the_name_of_another_message_is_refused(tmp_path: Path) -> None:
    states = States(tmp_path, client=41)
    states.keep((1, 0), of(1), "run")
    (tmp_path / "round-000001-0000.safetensors").rename(tmp_path / "round-000002-0003.safetensors")
    with pytest.raises(RunError, match="round 1, expected 2; exchange 0, expected 3"):
        states.before((4, 0), "run")
    with pytest.raises(RunError, match="run run, expected other"):
        states.before((4, 0), "other")
    with pytest.raises(RunError, match="client 41, expected 3"):
        States(tmp_path, client=3).before((4, 0), "run")


def test_a_folder_that_cannot_be_made_and_a_file_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file stands here", "utf-8")
    with pytest.raises(RunError, match=r"cannot make .*taken"):
        States(tmp_path / "taken").keep((1, 0), of(1))
    (tmp_path / "round-000001-0000.safetensors").mkdir()
    with pytest.raises(RunError, match=r"cannot read .*round-000001-0000"):
        States(tmp_path).before((2, 0))


def kept(folder: Path, client: int = 3, run: str = "ab") -> States:
    states = States(folder / str(client), client)
    states.keep((1, 0), of(1), run)
    states.keep((2, 1), of(2), run)
    return states


def test_a_state_of_another_client_run_or_message_is_refused_by_name(tmp_path: Path) -> None:
    states, other = kept(tmp_path), kept(tmp_path, 10)
    file = tmp_path / "3" / "round-000002-0001.safetensors"
    assert value(states.before((3, 0), "ab")) == 2
    with pytest.raises(
        RunError, match=r"round-000002-0001\.safetensors holds another client state \(run ab, expected cd\)"
    ):
        states.before((3, 0), "cd")
    whole = file.read_bytes()
    file.write_bytes((tmp_path / "10" / file.name).read_bytes())
    with pytest.raises(RunError, match=r"3/round-000002-0001\.safetensors .*\(client 10, expected 3\)"):
        states.before((3, 0), "ab")
    file.write_bytes((tmp_path / "3" / "round-000001-0000.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"\(round 1, expected 2; exchange 0, expected 1\)"):
        states.before((3, 0), "ab")
    file.write_bytes(whole)
    assert value(states.before((3, 0), "ab")) == value(other.before((3, 0), "ab")) == 2


@pytest.mark.parametrize("place", range(0, 600, 13))
def test_a_flipped_bit_is_refused_by_name(tmp_path: Path, place: int) -> None:
    states = kept(tmp_path)
    file = tmp_path / "3" / "round-000002-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"3/round-000002-0001\.safetensors is damaged"):
        states.before((3, 0), "ab")


def test_the_newest_of_the_rounds_up_to_one_is_told_by_its_digest(tmp_path: Path) -> None:
    states = kept(tmp_path)
    first, second = states.newest(1), states.newest(7)
    assert States(tmp_path / "41", 41).newest(7) is None
    assert states.newest(0) is None
    assert first
    assert second
    assert (first.when, second.when) == ((1, 0), (2, 1))
    again = kept(tmp_path / "again")
    assert (again.newest(1), again.newest(7)) == (first, second)
    assert kept(tmp_path / "other", run="cd").newest(7) != second


def test_a_run_goes_on_with_the_state_that_it_ended_with_or_a_later_one_of_its_own(tmp_path: Path) -> None:
    states = kept(tmp_path)
    mark = states.newest(2)
    states.hold_against(mark, 2, "ab")
    states.hold_against(mark, 9, "ab")
    states.keep((3, 0), of(3), "ab")
    states.hold_against(mark, 2, "ab")  # Of a round that was killed.
    states.hold_against(mark, 3, "ab")  # Of a client that answered too late.
    States(tmp_path / "none", 0).hold_against(None, 2, "ab")
    with pytest.raises(RunError, match="expected cd"):
        states.hold_against(None, 2, "cd")
    (tmp_path / "3" / "round-000002-0001.safetensors").unlink()
    with pytest.raises(RunError, match=r"round-000002-0001\.safetensors is missing, .* round 2 ended \(there is none"):
        states.hold_against(mark, 2, "ab")


def test_an_older_state_is_not_gone_on_with(tmp_path: Path) -> None:
    states = kept(tmp_path)
    mark = states.newest(2)
    (tmp_path / "3" / "round-000002-0001.safetensors").unlink()
    with pytest.raises(RunError, match=r"is missing.*the newest there is round-000001-0000\.safetensors"):
        states.hold_against(mark, 2, "ab")
    states.keep((2, 1), of(5), "ab")
    with pytest.raises(RunError, match=r"round-000002-0001\.safetensors is not the one with which round 2 ended"):
        states.hold_against(mark, 2, "ab")
