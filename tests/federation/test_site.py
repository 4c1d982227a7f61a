"""A site stands alone: with its own rows, disk and policy it answers what it would answer among all the others."""

import json
from pathlib import Path

import pytest
import torch

from kilofed.config.fields import Value
from kilofed.config.recipe import Recipe
from kilofed.config.tables import changed
from kilofed.data.corpus import Corpus
from kilofed.data.examples import Renderer
from kilofed.data.formats import Row
from kilofed.engines.inprocess import InProcess
from kilofed.errors import PayloadError, RecipeError
from kilofed.federation.address import Address
from kilofed.federation.ledger import Ledger
from kilofed.federation.site import Site, SiteData, open_site
from kilofed.methods.fedavg import FedAvg
from kilofed.models import loading
from kilofed.models.store import ModelStore
from kilofed.payload import Payload
from kilofed.runs.sites import Sites

SIZES = (3, 10, 41)
LABELS = ["even", "odd"]
Rows = dict[int, list[Row]]


@pytest.fixture
def rows() -> Rows:
    """Rows of three clients by number; they fit both tasks."""
    return {
        client: [
            {
                "client": f"site {client}",
                "instruction": f"add {n} and {client}",
                "response": f"is {n + client}",
                "text": f"{n} and {client}",
                "label": LABELS[(n + client) % 2],
            }
            for n in range(size)
        ]
        for client, size in enumerate(SIZES)
    }


@pytest.fixture
def recipe(tiny_recipe: Recipe, rows: Rows, tmp_path: Path) -> Recipe:
    """A run of the three clients, of which none holds rows out."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for own in rows.values() for row in own), "utf-8")
    return changed(tiny_recipe, {"data.source": str(path), "data.holdout": 0.0})


def alone(recipe: Recipe, number: int, own: list[Row], folder: Path | None = None) -> Site:
    """A site made by hand from its own rows; the run's rows are out of its reach."""
    recipe = changed(recipe, {"data.source": "/nowhere.jsonl"})
    classes = recipe.data.labels
    kind = "label" if classes else "response"
    renderer = Renderer(loading.load_tokenizer(recipe.model), recipe.data, kind, classes)
    store = ModelStore(recipe.adapter, recipe.seed, classes)
    return open_site(recipe, number, SiteData(renderer(own)), store=store, folder=folder)


def fit(state: dict[str, torch.Tensor], round: int) -> bytes:
    return Payload(state, Address("fit", "mean", round, 0).scalars).encode()


CASES: dict[str, dict[str, Value]] = {
    "fedavg": {},
    "full": {"adapter.kind": "full"},
    "fedprox": {"method": "fedprox", "method.mu": 0.5},
    "classify": {"data.task": "classify", "data.labels": LABELS},
    "central privacy": {"privacy.kind": "central", "privacy.clip": 0.01, "privacy.noise_key": "ab" * 16},
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
@pytest.mark.parametrize("number", range(3))
def test_a_site_with_its_own_rows_answers_the_bytes_of_the_simulated_client(
    recipe: Recipe, rows: Rows, words: dict[str, Value], number: int
) -> None:
    recipe = changed(recipe, words)
    simulated, own = Sites(recipe), alone(recipe, number, rows[number])
    server = simulated.server()
    simulated.method.setup(server)
    for round in (1, 2):
        body = fit(server.state, round)
        for other in range(3):  # The others train on the resident model before and after it.
            reply = simulated.handle(other, body)
            if other == number:
                assert own.handle(body) == reply
        moved = {name: tensor + 0.01 * round for name, tensor in server.state.items()}
        server.state.update(moved)


def test_a_corpus_of_one_client_is_all_that_a_site_needs(recipe: Recipe, rows: Rows, tmp_path: Path) -> None:
    """The data section that a deployed site writes for itself: its own file, not divided."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[2]), "utf-8")
    mine = {"data.source": str(path), "data.partition.kind": "iid", "data.partition.num_clients": 1}
    corpus = Corpus(changed(recipe, mine), loading.load_tokenizer)
    data = SiteData(corpus.train_examples(0), corpus.public_examples())
    site = open_site(recipe, 2, data, store=ModelStore(recipe.adapter, recipe.seed))
    simulated = Sites(recipe)
    simulated.method.setup(server := simulated.server())
    assert site.handle(fit(server.state, 1)) == simulated.handle(2, fit(server.state, 1))


def test_another_clients_number_gives_other_bytes(recipe: Recipe, rows: Rows) -> None:
    """What tells sites apart is the number and the rows: neither may be mixed up."""
    body = fit(alone(recipe, 2, rows[2]).client.start(), 1)  # type: ignore[arg-type]
    replies = {alone(recipe, number, rows[held]).handle(body) for number, held in ((2, 2), (1, 2), (2, 1))}
    assert len(replies) == 3


@pytest.fixture
def keeps_state(recipe: Recipe) -> Recipe:
    """A method whose clients keep what they learnt from round to round."""
    kd = {
        "method": "kd",
        "method.steps": 2,
        "method.client_distill_steps": 1,
        "method.batch_size": 4,
        "method.top_k": 8,
    }
    return changed(recipe, {**kd, "data.public_share": 0.2})


def test_a_new_process_goes_on_from_the_sites_own_disk(keeps_state: Recipe, tmp_path: Path) -> None:
    simulated = Sites(keeps_state)
    corpus = simulated.corpus

    def again() -> Site:
        data = SiteData(corpus.train_examples(2), corpus.public_examples())
        store = ModelStore(keeps_state.adapter, keeps_state.seed)
        return open_site(keeps_state, 2, data, store=store, folder=tmp_path / "own")

    talk = exchanged(simulated, 2)
    assert len(talk) >= 2
    for ask, reply in talk:
        assert again().handle(ask) == reply
    assert list((tmp_path / "own").glob("round-*.safetensors"))
    last, reply = talk[-1]
    assert again().handle(last) == reply  # A message that comes twice.


def exchanged(sites: Sites, client: int) -> list[tuple[bytes, bytes]]:
    """What one client was asked in two rounds, and what it answered."""
    found = []

    def answer(number: int, body: bytes) -> bytes:
        reply = sites.handle(number, body)
        if number == client:
            found.append((body, reply))
        return reply

    ids = sites.client_ids()
    sites.method.setup(server := sites.server())
    for server.round in (1, 2):
        cohort = sites.cohort(ids, InProcess(ids, answer), Ledger(), round=server.round)
        sites.method.round(server, cohort)
    return found


def test_the_sites_own_policy_decides_whatever_the_server_asks(recipe: Recipe, rows: Rows) -> None:
    private = changed(recipe, CASES["central privacy"])
    site = alone(private, 1, rows[1])
    body = Payload(dict(site.client.start()), Address("fit", "call", 1, 0).scalars).encode()
    reply = Payload.decode(site.handle(body))
    assert "lets the server see single replies" in str(reply.scalars["@error"])
    open_to_all = alone(recipe, 1, rows[1])
    assert "@error" not in Payload.decode(open_to_all.handle(body)).scalars


def test_a_method_without_a_client_model_has_a_site_without_one(
    recipe: Recipe, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FedAvg, "client_model", lambda *_: None)
    store = ModelStore(recipe.adapter, recipe.seed)
    site = open_site(recipe, 0, SiteData([]), store=store)
    assert isinstance(site.client.model, torch.nn.Identity)
    assert site.client.start() == {}
    assert len(store) == 0


def test_what_is_not_a_message_is_refused(recipe: Recipe, rows: Rows) -> None:
    with pytest.raises(PayloadError, match="not a whole kilofed payload"):
        alone(recipe, 0, rows[0]).handle(b"GET / HTTP/1.1")


def test_an_unknown_method_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="'fedavgg' does not exist"):
        open_site(changed(recipe, {"method": "fedavgg"}), 0, SiteData([]), store=ModelStore(recipe.adapter, 0))
