"""The client side of a method: marks, policy, state, errors; random streams; methods by name."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kilofed.config.fields import Value, warn_once
from kilofed.config.recipe import MethodSpec, TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.errors import ClientError, KilofedError, NonFiniteLoss, PayloadError, PrivacyError, RecipeError
from kilofed.federation.address import Address
from kilofed.federation.cohort import Cohort
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import Method, handle, load_method, method_names, on_client, with_present_names
from kilofed.federation.parties import Client, Server, generator
from kilofed.methods.fedkseed import FedKSeed
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import CentralGaussian, Mechanism

OPEN = Mechanism()
CENTRAL = CentralGaussian(1.0, 0.0, 1e-5, "0" * 32)


@dataclass(frozen=True)
class Probe(Method):
    """A method whose clients answer what they are told to."""

    reply: Payload = field(default_factory=Payload)
    error: Exception | None = None

    @on_client
    def tell(self, client: Client, ask: Payload) -> Payload:
        if self.error:
            raise self.error
        return self.reply

    @on_client(reads_data=False)
    def profile(self, client: Client, ask: Payload) -> Payload:
        return Payload({"speed": torch.full((2,), 100.0 * client.id)}, {"cores": client.id})

    @on_client
    def count(self, client: Client, ask: Payload) -> Payload:
        client.state["n"] = client.state.get("n", torch.zeros(1)) + 1
        return Payload({"n": client.state["n"].clone()})

    @on_client
    def forget(self, client: Client, ask: Payload) -> Payload:
        client.state.clear()
        return Payload()

    def secret(self, client: Client, ask: Payload) -> Payload:
        raise AssertionError("it ran")


def client(number: int) -> Client:
    return Client(id=number, data=[], train=TrainSpec(), num_rounds=3, seed=0)


def ask(action: str, verb: str = "mean", round: int = 1, exchange: int = 0, **tensors: torch.Tensor) -> bytes:
    return Payload(tensors, Address(action, verb, round, exchange).scalars).encode()


# What a client does with a message.


def test_only_marked_functions_run() -> None:
    for action in ("secret", "round", "__init__", "replies", "nothing"):
        reply = Payload.decode(handle(Probe(), OPEN, client(1), ask(action)))
        assert f"'{action}' is not something that clients of Probe do" in str(reply.scalars["@error"])


def test_a_misspelt_action_is_answered_with_the_nearest() -> None:
    reply = Payload.decode(handle(Probe(), OPEN, client(1), ask("profle")))
    assert "(did you mean profile?)" in str(reply.scalars["@error"])


def test_a_foreign_message_is_refused() -> None:
    with pytest.raises(PayloadError, match="not written by a kilofed server"):
        handle(Probe(), OPEN, client(1), Payload({"x": torch.ones(1)}).encode())
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        handle(Probe(), OPEN, client(1), b"GET / HTTP/1.1")


def test_the_address_is_not_part_of_what_a_function_sees() -> None:
    seen = {}

    @dataclass(frozen=True)
    class Looking(Method):
        @on_client
        def look(self, client: Client, ask: Payload) -> Payload:
            seen.update(ask.scalars, round=client.round)
            return Payload()

    body = Payload(scalars={"mine": 4, **Address("look", "mean", 7, 1).scalars}).encode()
    handle(Looking(), OPEN, client(0), body)
    assert seen == {"mine": 4, "round": 7}


def test_the_clients_own_policy_refuses_single_replies() -> None:
    reply = Payload.decode(handle(Probe(), CENTRAL, client(1), ask("tell", "call")))
    assert "'tell' in Probe lets the server see single replies" in str(reply.scalars["@error"])
    assert not reply.tensors


def test_an_action_that_reads_no_rows_is_exempt_from_the_policy() -> None:
    reply = Payload.decode(handle(Probe(), CENTRAL, client(3), ask("profile", "call")))
    assert torch.equal(reply.tensors["speed"], torch.full((2,), 300.0))  # Not clipped to 1.
    assert reply.scalars == {"cores": 3, **Address("profile", "call", 1, 0).answered(3)}


def test_a_mean_leaves_clipped_and_without_scalars() -> None:
    method = Probe(Payload({"x": torch.tensor([3.0, 4.0])}, {"weight": 2, "loss": 1.0}))
    reply = Payload.decode(handle(method, CENTRAL, client(1), ask("tell")))
    torch.testing.assert_close(reply.tensors["x"], torch.tensor([0.6, 0.8]))
    assert list(reply.scalars) == ["@"]


@pytest.mark.parametrize("error", [ClientError("no space"), NonFiniteLoss("loss is nan"), PrivacyError("no")])
def test_what_a_client_can_name_becomes_a_reply(error: KilofedError) -> None:
    reply = Payload.decode(handle(Probe(error=error), OPEN, client(1), ask("tell")))
    assert reply.scalars == {"@error": str(error), **Address("tell", "mean", 1, 0).answered(1)}


@pytest.mark.parametrize("error", [ZeroDivisionError("by none"), KeyError("x"), MemoryError(), RecursionError("deep")])
def test_a_mistake_in_the_program_is_a_reply_and_its_traceback_stays_in_the_clients_log(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    reply = Payload.decode(handle(Probe(error=error), OPEN, client(1), ask("tell")))
    assert str(reply.scalars["@error"]).startswith(f"{type(error).__name__}: {error}")
    assert "Traceback" in caplog.text


def test_under_central_privacy_an_error_says_its_kind_and_nothing_of_the_data() -> None:
    error = KeyError("Mrs Jones, born 1961")
    reply = Payload.decode(handle(Probe(error=error), CENTRAL, client(1), ask("tell")))
    assert "KeyError" in str(reply.scalars["@error"])
    assert "Jones" not in str(reply.scalars["@error"])


def test_a_client_that_failed_keeps_its_state() -> None:
    one = client(0)
    handle(Probe(), OPEN, one, ask("count"))
    spoilt = Probe(Payload(scalars={"loss": float("nan")}))
    reply = Payload.decode(handle(spoilt, OPEN, one, ask("tell", round=2)))
    assert "expected a finite number" in str(reply.scalars["@error"])
    again = Payload.decode(handle(Probe(), OPEN, one, ask("count", round=3)))
    assert again.tensors["n"].item() == 2


@pytest.mark.parametrize("verb", ["sum", "", "mean ", "Call"])
def test_there_are_two_verbs_and_no_other(verb: str) -> None:
    body = Payload(scalars={"@": f"tell/{verb}/000001/000000/{'0' * 16}"}).encode()
    with pytest.raises(PayloadError, match=r"expected mean or call|not written by a kilofed server"):
        handle(Probe(Payload({"x": torch.ones(2)})), CENTRAL, client(1), body)


def test_state_goes_on_from_message_to_message() -> None:
    one = client(0)
    replies = [Payload.decode(handle(Probe(), OPEN, one, ask("count", round=n))) for n in (1, 2, 3)]
    assert [reply.tensors["n"].item() for reply in replies] == [1, 2, 3]


def test_a_repeated_round_finds_the_state_before_it() -> None:
    one = client(0)
    for number in (1, 2, 2, 2):
        reply = Payload.decode(handle(Probe(), OPEN, one, ask("count", round=number)))
    assert reply.tensors["n"].item() == 2


def test_state_that_a_client_clears_stays_cleared() -> None:
    one = client(0)
    handle(Probe(), OPEN, one, ask("count", round=1))
    handle(Probe(), OPEN, one, ask("forget", round=2))
    reply = Payload.decode(handle(Probe(), OPEN, one, ask("count", round=3)))
    assert reply.tensors["n"].item() == 1


# Random streams, finding methods.


def test_random_streams_are_the_same_everywhere() -> None:
    # Pinned: a change of these numbers breaks the resuming of runs made before it.
    assert torch.randint(10**6, (3,), generator=generator(0, 1, 2, "dropout")).tolist() == [608362, 538402, 19132]
    assert torch.randint(10**6, (3,), generator=generator(7, 0, -1, "cohort")).tolist() == [222728, 772495, 599138]


def test_random_streams_differ_by_seed_round_client_and_purpose() -> None:
    names = [
        (0, 1, 2, "a"),
        (1, 1, 2, "a"),
        (0, 2, 2, "a"),
        (0, 1, 3, "a"),
        (0, 1, 2, "b"),
        (0, 12, 2, "a"),
        (0, 1, 22, "a"),
    ]
    assert len({generator(*name).initial_seed() for name in names}) == len(names)


def test_a_clients_stream_moves_with_the_round_and_its_order_does_not() -> None:
    one = client(3)
    seeds = []
    for one.round in (1, 2):
        seeds.append((one.rng("x").initial_seed(), one.order("x").initial_seed()))
    assert seeds[0][0] != seeds[1][0]
    assert seeds[0][1] == seeds[1][1]


def test_a_method_is_found_by_its_file_name() -> None:
    assert "fedavg" in method_names()
    assert "__init__" not in method_names()
    for name in method_names():
        method = load_method(MethodSpec(name))
        assert type(method).__module__ == f"kilofed.methods.{name}"


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"method 'fedprx' does not exist \(did you mean fedprox\?\)"):
        load_method(MethodSpec("fedprx"))
    with pytest.raises(RecipeError, match=r"method 'no_such.file' does not exist"):
        load_method(MethodSpec("no_such.file"))


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"^method\.moo is not a field of FedProx \(there is: client_weighting, mu, wire\)"
    ):
        load_method(MethodSpec("fedprox", {"moo": 1.0}))


def test_a_method_file_defines_one_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_methods").mkdir()
    (tmp_path / "no_methods" / "none.py").write_text("from kilofed.methods.fedavg import FedAvg\n", "utf-8")
    monkeypatch.setenv("KILOFED_TRUST", "no_methods.none")
    with pytest.raises(RecipeError, match=r"no_methods\.none defines 0 Method classes; expected one"):
        load_method(MethodSpec("no_methods.none"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".fedavg",
        "fedavg.",
        "a..b",
        "fed avg",
        "../fedavg",
        "fedavg\0",
        "fed-avg",
        "\ud800",
        "1",
        "a/b.c",
    ],
)
def test_a_name_that_no_module_can_have_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^method is .*; expected a name such as fedavg or my_package\.my_method$"):
        load_method(MethodSpec(name))


def test_an_import_that_fails_inside_a_method_file_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_methods").mkdir()
    (tmp_path / "bad_methods" / "needy.py").write_text("import a_module_that_is_not_there\n", "utf-8")
    monkeypatch.setenv("KILOFED_TRUST", "bad_methods.needy")
    said = (
        r"cannot be imported \(ModuleNotFoundError: .*'a_module_that_is_not_there', at .*needy\.py line 1\); correct"
    )
    with pytest.raises(RecipeError, match=said):
        load_method(MethodSpec("bad_methods.needy"))


def test_a_method_in_one_file_outside_the_package_is_found_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.setenv("KILOFED_TRUST", "fixtures.outside_method")
    method = load_method(MethodSpec("fixtures.outside_method", {"step": 0.5}))
    server = Server(0, 1, TrainSpec())
    method.setup(server)
    clients = {number: client(number) for number in (1, 2, 3)}
    engine = InProcess([1, 2, 3], lambda number, body: handle(method, OPEN, clients[number], body))
    assert method.round(server, Cohort([1, 2, 3], engine, Ledger(), OPEN, round=1)) == {"x": 1.0}


def test_former_names_of_a_methods_fields_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    method = load_method(MethodSpec("fedkseed", {"epoch": 3, "weights": "uniform"}))
    assert method == FedKSeed(rounds_per_pool=3, client_weighting="uniform")
    assert [message.partition(" is ")[0] for message in caplog.messages] == ["method.epoch", "method.weights"]


def test_a_table_of_a_recipe_takes_present_names_in_all_its_parts() -> None:
    table: dict[str, Value] = {"rounds": 2, "evaluate": {"controls": []}, "method": {"name": "kd", "guide_steps": 4}}
    expected = {"rounds": 2, "evaluate": {"baselines": []}, "method": {"name": "kd", "client_distill_steps": 4}}
    assert with_present_names(table, "kd") == expected
    assert with_present_names(expected, "kd") == expected
    assert with_present_names({"method": "kd"}, "kd") == {"method": "kd"}


@pytest.mark.parametrize(
    "given", [{"rounds_per_pool": 3, "epoch": 5}, {"epoch": 3, "rounds_per_pool": 5}, {"epoch": 5}]
)
def test_of_two_names_of_a_methods_field_the_one_laid_over_last_counts(given: dict[str, Value]) -> None:
    # As in `kilofed run RECIPE method.epoch=5`, where the recipe has the present name.
    found = load_method(MethodSpec("fedkseed", {"num_seeds": 64, **given}))
    assert isinstance(found, FedKSeed)
    assert found.rounds_per_pool == 5


def test_a_module_that_nobody_trusts_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untrusted_of_a_stranger").mkdir()
    (tmp_path / "untrusted_of_a_stranger" / "method.py").write_text("raise AssertionError('it ran')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="trust"):
        load_method(MethodSpec("untrusted_of_a_stranger.method"))


def test_messages_are_as_long_as_foreseen_unless_a_method_says_otherwise() -> None:
    assert Probe.exact_bytes
    assert not FedKSeed.exact_bytes


def test_a_method_is_never_done_early_unless_it_says_so() -> None:
    assert not Probe().done(Server(0, 3, TrainSpec()))


@pytest.mark.parametrize(("rows", "seen"), [(0, 1), (3, 2 * 3), (41, 2 * 4)])
def test_a_client_weighs_at_most_the_examples_that_it_can_train_on_and_at_least_1(rows: int, seen: int) -> None:
    assert Probe().max_weight(TrainSpec(steps=2, batch_size=4), rows) == seen
