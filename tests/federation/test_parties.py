"""Who takes part: every purpose, round and client has a random stream of its own, the same in every process."""

import subprocess
import sys
from itertools import product

import torch

from kilofed.config.recipe import TrainSpec
from kilofed.federation.parties import Client, Server, generator


def draws(stream: torch.Generator) -> list[int]:
    return torch.randint(1 << 30, (4,), generator=stream).tolist()


def client(number: int, seed: int = 5) -> Client:
    return Client(id=number, data=(), train=TrainSpec(), num_rounds=3, seed=seed)


def test_streams_differ_by_each_of_seed_round_client_and_purpose() -> None:
    keys = list(product((0, 1), (1, 2), (-1, 0, 10), ("dropout", "noise")))
    assert len({tuple(draws(generator(*key))) for key in keys}) == len(keys)


def test_numbers_that_run_together_are_not_the_same_stream() -> None:
    assert draws(generator(1, 11, 1, "a")) != draws(generator(11, 1, 1, "a"))
    assert draws(generator(1, 1, 11, "a")) != draws(generator(1, 11, 1, "a"))


def test_a_stream_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from kilofed.federation.parties import generator;"
        "print(torch.randint(1 << 30, (4,), generator=generator(7, 2, 3, 'dropout')).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == str(draws(generator(7, 2, 3, "dropout")))


def test_a_client_s_stream_is_new_in_each_round_and_its_order_is_not() -> None:
    one = client(4)
    one.round = 1
    first, order = draws(one.rng("dropout")), draws(one.order("epoch"))
    assert draws(one.rng("dropout")) == first  # Asked twice, it begins again.
    one.round = 2
    assert draws(one.rng("dropout")) != first
    assert draws(one.order("epoch")) == order
    assert draws(client(5).order("epoch")) != order


def test_the_server_s_stream_is_no_client_s() -> None:
    server = Server(seed=5, num_rounds=3, train=TrainSpec(), round=1)
    clients = [client(number) for number in range(4)]
    for one in clients:
        one.round = 1
    streams = [draws(server.rng("noise")), *(draws(one.rng("noise")) for one in clients)]
    assert len({tuple(stream) for stream in streams}) == 5


def test_parties_share_nothing_by_default() -> None:
    one, other = client(0), client(1)
    one.state["w"], one.cache["seen"] = torch.ones(2), True
    one.states.keep((1, 0), one.state)
    assert other.state == other.cache == other.states.before((2, 0)) == {}
    assert list(one.states.before((2, 0))) == ["w"]
    assert one.start() == {}


def test_closing_the_server_closes_what_its_cache_holds_open() -> None:
    class Connection:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    held = Connection()
    server = Server(seed=0, num_rounds=1, train=TrainSpec(), cache={"api": held, "count": 3, "close": "a word"})
    server.close()
    assert held.closed == 1
