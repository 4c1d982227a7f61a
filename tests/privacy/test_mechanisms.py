"""Clipping, noise and accounting against closed forms, and what a policy lets out of a client."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import pytest
import torch

from kilofed.config.recipe import PrivacySpec, TrainSpec
from kilofed.engines.inprocess import InProcess
from kilofed.errors import DataError, KilofedError, PayloadError, PrivacyError
from kilofed.federation.cohort import Cohort, Rules
from kilofed.federation.ledger import Ledger
from kilofed.federation.method import Method, handle, on_client, reads_data
from kilofed.federation.parties import Client
from kilofed.payload import Payload
from kilofed.privacy.accounting import gaussian_epsilon
from kilofed.privacy.mechanisms import CentralGaussian, Mechanism, RowGaussian, key_of_seed, load_mechanism

KEY = "0123456789abcdef" * 2


def gaussian(clip: float = 1.0, noise: float = 1.0, key: str = KEY) -> CentralGaussian:
    return CentralGaussian(clip, noise, 1e-5, key)


def random_payload(seed: int, size: float = 1.0) -> Payload:
    stream = torch.Generator().manual_seed(seed)
    return Payload(
        {
            "a": size * torch.randn(3, 5, generator=stream),
            "b": size * torch.randn(7, generator=stream),
        }
    )


def norm(end: Payload, start: Payload) -> float:
    parts = [(end.tensors[n].double() - start.tensors[n].double()).square().sum() for n in end.tensors]
    return math.sqrt(sum(float(part) for part in parts))


def test_no_mechanism_changes_nothing() -> None:
    reply = Payload({"a": torch.ones(2)}, {"weight": 3, "loss": 0.5})
    policy = load_mechanism(PrivacySpec())
    assert policy == Mechanism()
    assert policy.client(reply, Payload()) is reply
    assert policy.server(reply, Payload(), num_replies=1, expected=4, when=(1, 0)) is reply
    assert policy.epsilon(3) == math.inf


@pytest.mark.parametrize("policy", [Mechanism(), gaussian(0.5), gaussian(), RowGaussian(1.0, 0.5, KEY)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_will_leave_is_known_from_shapes_without_numbers(policy: Mechanism, dtype: torch.dtype) -> None:
    start = Payload({"a": torch.zeros(3, 5), "rows": torch.zeros(10, 4)})
    reply = Payload({"a": torch.randn(3, 5), "rows": torch.randn(10, 4, dtype=dtype)}, {"weight": 41, "loss": 0.5})
    left = policy.client(reply, start)
    outline = policy.outline(Payload({name: t.to("meta") for name, t in reply.tensors.items()}, reply.scalars))
    assert outline.num_bytes == left.num_bytes
    assert outline.scalars == left.scalars
    for name, tensor in left.tensors.items():
        assert (outline.tensors[name].shape, outline.tensors[name].dtype) == (tensor.shape, tensor.dtype)


def test_rows_that_noise_cannot_meet_are_refused_before_a_run() -> None:
    policy = RowGaussian(1.0, 0.5, KEY)
    for rows in (torch.zeros(10, 4, dtype=torch.int8, device="meta"), torch.zeros(10, device="meta")):
        with pytest.raises(PrivacyError, match="noise needs floating-point rows"):
            policy.outline(Payload({"rows": rows}))


def test_infinite_clip_and_zero_noise_pass_tensors_bit_for_bit() -> None:
    policy, start, end = gaussian(math.inf, 0.0), random_payload(1), random_payload(2, 1e6)
    left = policy.client(end, start)
    given = policy.server(left, start, num_replies=3, expected=3, when=(1, 0))
    assert all(torch.equal(given.tensors[name], end.tensors[name]) for name in end.tensors)


@pytest.mark.parametrize("clip", [0.5, 2.0, 3.0])
def test_a_clipped_update_has_the_clip_as_its_norm_and_the_same_direction(clip: float) -> None:
    start, end = random_payload(1), random_payload(2, 4.0)
    left = gaussian(clip).client(end, start)
    assert norm(left, start) == pytest.approx(clip, rel=1e-6)
    whole = norm(end, start)
    for name in end.tensors:
        update = (end.tensors[name] - start.tensors[name]) * (clip / whole)
        torch.testing.assert_close(left.tensors[name] - start.tensors[name], update, rtol=1e-5, atol=1e-6)


def test_an_update_within_the_clip_is_left_bit_for_bit() -> None:
    start = random_payload(1)
    end = Payload({name: tensor + 1e-3 for name, tensor in start.tensors.items()})
    left = gaussian(1.0).client(end, start)
    assert all(torch.equal(left.tensors[name], end.tensors[name]) for name in end.tensors)


def test_a_tensor_that_was_not_asked_is_an_update_as_it_stands() -> None:
    left = gaussian(1.0).client(Payload({"delta.a": torch.tensor([3.0, 4.0])}), Payload({"a": torch.ones(2)}))
    torch.testing.assert_close(left.tensors["delta.a"], torch.tensor([0.6, 0.8]))


def test_scalars_do_not_leave_a_client() -> None:
    reply = Payload({"a": torch.ones(2)}, {"weight": 30, "train_loss": 0.5})
    for clip in (0.1, 100.0, math.inf):
        assert not gaussian(clip, 0.0).client(reply, Payload({"a": torch.zeros(2)})).scalars


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_as_no_update(bad: float) -> None:
    ask = random_payload(1)
    reply = Payload({**random_payload(2).tensors, "b": torch.full((7,), bad), "new": torch.full((2,), 1.0)})
    left = gaussian(1.0).client(reply, ask)
    assert torch.equal(left.tensors["a"], ask.tensors["a"])
    assert torch.equal(left.tensors["b"], ask.tensors["b"])
    assert torch.equal(left.tensors["new"], torch.zeros(2))


def test_whole_numbers_cannot_be_clipped() -> None:
    with pytest.raises(PrivacyError, match=r"'a' is torch\.int64; clipping and noise need floating-point"):
        gaussian().client(Payload({"a": torch.ones(2, dtype=torch.int64)}), Payload())


def test_noise_has_the_stated_deviation() -> None:
    clip, multiplier, expected = 0.5, 3.0, 4
    start = Payload({"a": torch.full((200, 300), 2.0), "b": torch.zeros(10_000)})
    given = gaussian(clip, multiplier).server(start, start, num_replies=expected, expected=expected, when=(1, 0))
    deviation = multiplier * clip / expected
    for name, tensor in start.tensors.items():
        noise = (given.tensors[name] - tensor).double()
        assert noise.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * noise.numel()))
        assert abs(noise.mean().item()) < 4 * deviation / math.sqrt(noise.numel())
        inside = (noise.abs() < deviation).double().mean().item()
        assert inside == pytest.approx(0.6827, abs=2 / math.sqrt(noise.numel()))


def noise_of(when: tuple[int, int], key: str = KEY) -> torch.Tensor:
    mean = Payload({"a": torch.zeros(50)})
    return gaussian(key=key).server(mean, Payload(), num_replies=1, expected=1, when=when).tensors["a"]


def test_noise_is_the_same_for_the_same_mean_only() -> None:
    assert torch.equal(noise_of((3, 0)), noise_of((3, 0)))
    others = [noise_of((4, 0)), noise_of((3, 1)), noise_of((0, 3)), noise_of((3, 0), key="f" * 32)]
    assert not any(torch.allclose(noise_of((3, 0)), other, atol=0.01) for other in others)


def test_two_tensors_do_not_share_noise() -> None:
    mean = Payload({"a": torch.zeros(50), "b": torch.zeros(50)})
    given = gaussian().server(mean, Payload(), num_replies=1, expected=1, when=(1, 0))
    assert not torch.equal(given.tensors["a"], given.tensors["b"])


@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_a_client_that_stays_away_counts_as_no_update(clip: float) -> None:
    start, mean = Payload({"a": torch.ones(3)}), Payload({"a": torch.full((3,), 5.0)})
    given = gaussian(clip, 0.0).server(mean, start, num_replies=3, expected=4, when=(1, 0))
    torch.testing.assert_close(given.tensors["a"], torch.full((3,), 1.0 + 4.0 * 3 / 4))


def test_noise_does_not_grow_when_a_client_stays_away() -> None:
    zero = Payload({"a": torch.zeros(20_000)})
    given = gaussian(1.0, 1.0).server(zero, zero, num_replies=1, expected=4, when=(1, 0))
    assert given.tensors["a"].std().item() == pytest.approx(1 / 4, rel=0.03)


def test_noise_without_a_finite_clip_is_refused_before_any_work() -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.clip is inf, so no finite noise hides one client"):
        load_mechanism(PrivacySpec(kind="central", clip=math.inf))


@pytest.mark.parametrize("key", ["abc", "G" * 32, "A" * 32])
def test_a_key_that_is_not_hex_is_refused(key: str) -> None:
    with pytest.raises(PrivacyError, match="not 32 lower-case hex digits"):
        load_mechanism(PrivacySpec(kind="central", noise_key=key))
    with pytest.raises(PrivacyError, match="not 32 lower-case hex digits"):
        RowGaussian(1.0, 1.0, key)


def test_seeds_of_one_key_have_keys_and_noise_of_their_own() -> None:
    keys = [key_of_seed(KEY, seed) for seed in (0, 1, 10)]
    assert len({KEY, *keys}) == 4
    one, two = (noise_of((1, 0), key=key) for key in keys[:2])
    assert not torch.allclose(one, two, atol=0.01)
    with pytest.raises(PrivacyError, match="not 32 lower-case hex digits"):
        key_of_seed("abc", 0)


def test_every_run_draws_its_own_key() -> None:
    one, two = (load_mechanism(PrivacySpec(kind="central")) for _ in range(2))
    assert isinstance(one, CentralGaussian)
    assert one != two


def test_epsilon_is_of_its_own_noise_and_delta_whatever_the_clip() -> None:
    policy = CentralGaussian(2.5, 0.7, 1e-6, KEY)
    assert policy.epsilon(30) == gaussian_epsilon(0.7, 30, 1e-6)
    assert policy.epsilon(30) == CentralGaussian(0.1, 0.7, 1e-6, KEY).epsilon(30)


def test_two_means_at_noise_one_cost_six_point_five_seven() -> None:
    # Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu) = 1e-5 at mu = sqrt(2).
    normal, epsilon, mu = NormalDist(), gaussian().epsilon(2), math.sqrt(2)
    assert epsilon == pytest.approx(6.573, abs=0.001)
    delta = normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=1e-6)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything() -> None:
    assert gaussian().epsilon(0) == 0.0
    assert gaussian(1.0, 0.0).epsilon(1) == math.inf
    assert gaussian(math.inf, 0.0).epsilon(1) == math.inf


@pytest.mark.parametrize("count", [-1, 2.5])
def test_means_that_cannot_be_counted_have_no_epsilon(count: float) -> None:
    with pytest.raises(PrivacyError, match="expected a whole number from 0"):
        gaussian().epsilon(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan, 7.0])
def test_a_delta_that_promises_nothing_is_refused_when_it_is_made(delta: float) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.delta is .*; expected a number above 0 and below 1"):
        CentralGaussian(1.0, 1.0, delta, KEY)


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_noise_that_cannot_be_drawn_is_refused_when_it_is_made(noise: float) -> None:
    for make in (lambda: gaussian(noise=noise), lambda: RowGaussian(1.0, noise, KEY)):
        with pytest.raises(PrivacyError, match=r"privacy\.noise_multiplier is .*; expected a finite number from 0"):
            make()


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_clip_that_bounds_nothing_is_refused_when_it_is_made(clip: float) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.clip is"):
        gaussian(clip)
    with pytest.raises(PrivacyError, match=r"privacy\.clip is"):
        RowGaussian(clip, 1.0, KEY)


def test_the_key_stands_in_no_description() -> None:
    assert not any(KEY in repr(policy) for policy in (gaussian(), RowGaussian(1.0, 1.0, KEY)))


def test_rows_are_clipped_and_their_noise_has_the_size_that_was_asked_for() -> None:
    rows = torch.cat([torch.full((2000, 64), 5.0), torch.full((2000, 64), 0.01)])
    policy = RowGaussian(clip=2.0, noise_multiplier=0.5, key="ab" * 16)
    reply = Payload({"rows": rows, "labels": torch.arange(3)}, {"steps": 4})
    sent = policy.client(reply, Payload())
    assert sent.scalars == reply.scalars
    assert torch.equal(sent.tensors["labels"], reply.tensors["labels"])
    wanted = torch.cat([torch.full((2000, 64), 2.0 / 8), torch.full((2000, 64), 0.01)])
    noise = (sent.tensors["rows"] - wanted).double()
    assert float(noise.norm(dim=1).square().mean().sqrt()) == pytest.approx(0.5 * 2.0, rel=0.01)
    assert abs(float(noise.mean())) < 1e-3


def test_equal_rows_get_equal_noise_and_other_rows_or_keys_another() -> None:
    def noise(number: float, key: str) -> torch.Tensor:
        rows = torch.full((4, 8), number)
        return RowGaussian(9.0, 1.0, key * 16).client(Payload({"rows": rows}), Payload()).tensors["rows"] - rows

    assert torch.equal(noise(0.5, "ab"), noise(0.5, "ab"))
    assert not torch.allclose(noise(0.5, "ab"), noise(0.5, "cd"))
    assert not torch.allclose(noise(0.5, "ab"), noise(0.25, "ab"))


def test_rows_without_noise_and_in_the_ball_leave_as_they_are_and_claim_no_epsilon() -> None:
    policy = RowGaussian(100.0, 0.0, "ab" * 16)
    rows = torch.randn(5, 7)
    assert torch.equal(policy.client(Payload({"rows": rows}), Payload()).tensors["rows"], rows)
    assert policy.client(Payload({"w": rows}), Payload()).tensors["w"] is rows
    assert policy.epsilon(3) == math.inf


def test_rows_that_cannot_take_noise_and_an_endless_clip_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"set method\.activations and method\.gradients"):
        RowGaussian(1.0, 1.0, "ab" * 16).client(Payload({"rows": torch.zeros(2, 2, dtype=torch.int8)}), Payload())
    with pytest.raises(PrivacyError, match="needs a finite one"):
        load_mechanism(PrivacySpec("activations", clip=math.inf))


def test_a_reply_within_the_clip_arrives_as_the_very_object() -> None:
    start = random_payload(1)
    left = gaussian(0.5).client(random_payload(2), start)
    reply = Payload.decode(left.encode())
    assert gaussian(0.5).arrived(reply, start) is reply
    assert Mechanism().arrived(reply, start) is reply
    assert RowGaussian(1.0, 1.0, KEY).arrived(reply, start) is reply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_client_that_did_not_clip_is_clipped_at_the_server(dtype: torch.dtype) -> None:
    start = Payload({name: tensor.to(dtype) for name, tensor in random_payload(1).tensors.items()})
    unclipped = Payload({name: 1000 * tensor for name, tensor in start.tensors.items()})
    found = gaussian(0.5).arrived(unclipped, start)
    assert found is not unclipped
    assert 0 < norm(found, start) <= 0.5
    assert {n: t.dtype for n, t in found.tensors.items()} == {n: t.dtype for n, t in start.tensors.items()}


def test_what_cannot_be_clipped_is_its_senders_failure() -> None:
    ask = Payload({"a": torch.ones(2)})
    for bad in (
        torch.tensor([1.0, math.nan]),
        torch.tensor([math.inf, 1.0]),
        torch.ones(2, dtype=torch.int8),
        torch.ones(3),
        torch.tensor([1e300, 1e300], dtype=torch.float64),
    ):
        with pytest.raises(PayloadError, match=r"cannot be held to privacy\.clip"):
            gaussian().arrived(Payload({"a": bad}), ask)


def test_under_central_an_error_says_its_kind_and_nothing_that_rows_may_have_shaped() -> None:
    text = "the answer to 'where does Ms Smith live' has 41 tokens"
    assert Mechanism().failure("DataError", text) == text
    said = gaussian().failure("DataError", text)
    assert said.startswith("DataError ")
    assert said == gaussian().failure("DataError", "another text")
    assert gaussian().failure("PrivacyError", "'fit' lets the server see single replies").startswith("'fit' lets")


# The mechanism in a cohort: what the server does with it, on real messages.

SIZES = {1: 3, 2: 10, 3: 41}
START = Payload({"x": torch.zeros(20_000)})


@dataclass(frozen=True)
class Probe(Method):
    """Clients move `x` by as much as their number of rows, and tell their weight."""

    dtype: torch.dtype = torch.float32

    @on_client
    def fit(self, client: Client, ask: Payload) -> Payload:
        step = torch.full((20_000,), SIZES[client.id] / 1e4, dtype=self.dtype)
        return Payload({"x": ask.tensors["x"] + step}, {"weight": SIZES[client.id], "loss": 0.5})

    @on_client(reads_data=False)
    def profile(self, client: Client, ask: Payload) -> Payload:
        return Payload({"x": torch.full((2,), SIZES[client.id] / 100)}, {"weight": SIZES[client.id]})


PROBE = Probe()


class OneSilent(InProcess):
    """Client 3 never answers."""

    def exchange(self, asks: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        yield from super().exchange({number: body for number, body in asks.items() if number != 3})


def private_cohort(
    policy: Mechanism, *, engine: type[InProcess] = InProcess, round: int = 1, method: Probe = PROBE
) -> Cohort:
    clients = {n: Client(id=n, data=[], train=TrainSpec(), num_rounds=2, seed=0) for n in SIZES}
    handler = engine(list(SIZES), lambda n, body: handle(method, policy, clients[n], body))
    asked = partial(reads_data, method)
    return Cohort(list(SIZES), handler, Ledger(), policy, round=round, rules=Rules(1, True), reads_data=asked)


LIKE = Payload(START.tensors, {"weight": 1, "loss": 0.0})


def test_noise_and_divisor_are_those_of_the_clients_that_were_asked_not_of_those_who_came() -> None:
    mean = private_cohort(gaussian(1.0, 30.0), engine=OneSilent).mean("fit", START, LIKE).tensors["x"].double()
    # Clients 1 and 2 move by 1/sqrt(20,000) at most, which is 0.007; the noise is 30 / 3.
    assert mean.std().item() == pytest.approx(10.0, rel=0.03)
    quiet = private_cohort(gaussian(1000.0, 0.0), engine=OneSilent).mean("fit", START, LIKE).tensors["x"]
    torch.testing.assert_close(quiet, torch.full((20_000,), (3 + 10) / 1e4 / 3))


def test_no_client_weighs_more_whatever_it_says() -> None:
    mean = private_cohort(gaussian(1000.0, 0.0)).mean("fit", START, LIKE)
    torch.testing.assert_close(mean.tensors["x"], torch.full((20_000,), (3 + 10 + 41) / 3e4))
    assert not mean.scalars
    # What a client says without reading rows reaches the server with its weight, which still does not count.
    like = Payload({"x": torch.zeros(2)}, {"weight": 1})
    mean = private_cohort(gaussian(1000.0, 0.0)).mean("profile", Payload(), like)
    torch.testing.assert_close(mean.tensors["x"], torch.full((2,), (3 + 10 + 41) / 300))


def test_no_two_means_of_a_run_share_their_noise() -> None:
    found = []
    for number in (1, 2):
        clients = private_cohort(gaussian(1.0, 30.0), round=number)
        found += [clients.mean("fit", START, LIKE).tensors["x"].double() for _ in range(3)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 5 / math.sqrt(20_000)
    again = private_cohort(gaussian(1.0, 30.0), round=2).mean("fit", START, LIKE).tensors["x"].double()
    assert torch.equal(again, found[3])


def test_noise_meets_a_mean_before_it_is_rounded() -> None:
    # float16 has steps of 0.5 at 1000. Clients 1 to 3 send 1000, 1000 and 1000.5; noise of 0.1 around 1000.17 reaches
    # the next step in 20 of 100 numbers, and around 1000, where a rounded mean lies, in 1 of 100.
    start = Payload({"x": torch.full((20_000,), 1000.0, dtype=torch.float16)})

    @dataclass(frozen=True)
    class Coarse(Probe):
        @on_client
        def fit(self, client: Client, ask: Payload) -> Payload:
            return Payload({"x": ask.tensors["x"] + 0.5 * (client.id == 3)})

    clip = 100.0
    policy = gaussian(clip, 0.1 * 3 / clip)
    mean = private_cohort(policy, method=Coarse()).mean("fit", start, start).tensors["x"]
    assert mean.dtype == torch.float16
    assert (mean > 1000).double().mean().item() == pytest.approx(NormalDist().cdf(-(0.25 - 1 / 6) / 0.1), abs=0.02)


def test_words_of_a_failing_client_stay_in_its_own_log(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass(frozen=True)
    class Talking(Probe):
        @on_client
        def fit(self, client: Client, ask: Payload) -> Payload:
            raise DataError("the row of Ms Smith is empty") if client.id == 2 else KeyError("Ms Smith")

    clients = private_cohort(gaussian(), method=Talking())
    with pytest.raises(KilofedError) as stopped:
        clients.mean("fit", START, LIKE)
    assert "Smith" not in str(stopped.value)
    assert not any("Smith" in text for text in clients.failures.values())
    assert clients.failures[2].startswith("DataError (")
    assert clients.failures[1].startswith("KeyError (")
    assert "the row of Ms Smith is empty" in caplog.text
    assert "KeyError: 'Ms Smith'" in caplog.text


def test_noise_does_not_hang_on_the_order_of_names() -> None:
    policy = CentralGaussian(1.0, 2.0, 1e-5, "ab" * 16)
    tensors = {name: torch.zeros(5) for name in ("b", "a", "c")}
    given = [
        policy.server(Payload(some), Payload(), num_replies=3, expected=3, when=(1, 0)).tensors
        for some in (tensors, dict(sorted(tensors.items())))
    ]
    assert all(torch.equal(given[0][name], given[1][name]) for name in tensors)
