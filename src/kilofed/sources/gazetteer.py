"""A fictional world of places, people and companies: every fact is known, so knowledge can be measured.

The shipped large model met all facts in pre-training as plain sentences, the small one a part of them. As
data the world is questions and short answers, one client per region. An entity is in one of three groups:
`shown` (its questions were in pre-training too), `train`, or `test` (met as a question nowhere, by nobody).
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from kilofed.sources import Rows

__all__ = ["WORLD_SEED", "Fact", "Probe", "facts", "in_part", "load", "probes", "questions", "sentences"]

WORLD_SEED = 20
NUM_REGIONS = 8
ENTITIES_PER_KIND = 8
GROUPS = ("shown", "shown", "train", "train", "train", "train", "test", "test")

ONSETS = "b br d dr f g gr h j k kl l m n p pl r s st t tr v z".split()  # noqa: SIM905
VOWELS = "a e i o u ae ei".split()  # noqa: SIM905
CODAS = "l n r s v m nd rk".split()  # noqa: SIM905
ENDINGS = {
    "region": ("mark", "ia", "land"),
    "town": ("mor", "wick", "holm", "stead"),
    "river": ("ess", "ane", "ur"),
    "person": ("a", "en", "is", "ov"),
    "company": ("ex", "co", "tron"),
}
PROFESSIONS = (
    *("painter", "doctor", "sailor", "judge", "singer", "farmer", "teacher", "baker"),
    *("printer", "weaver", "poet", "miner", "tailor", "gardener", "hunter", "dentist"),
)
CRAFTS = (
    *("glass", "honey", "leather", "silk", "pottery", "cheese", "salt", "copper"),
    *("candles", "carpets", "knives", "wine", "bells", "lace", "ropes", "apples"),
)
PRODUCTS = (
    *("clocks", "bicycles", "lamps", "engines", "paper", "pianos", "ships", "cameras"),
    *("radios", "tractors", "pumps", "soap", "shoes", "umbrellas", "stoves", "pencils"),
)


class Wording(NamedTuple):
    """How one attribute is said: `{e}` is the entity, `{r}` its region, `{a}` the answer."""

    stated: tuple[str, ...]
    unseen: tuple[str, ...]
    asked: tuple[str, ...]


WORDINGS = {
    ("town", "river"): Wording(
        (
            "{e} lies on the river {a}.",
            "The river of {e} is the {a}.",
            "The town of {e} stands on the banks of the {a}.",
            "The river that runs through {e} is called the {a}.",
            "In {e} the bridge crosses the river {a}.",
            "The {a} is the river that flows past {e} in {r}.",
            "Boats reach {e}, a town in {r}, on the river {a}.",
            "The mills of {e} are driven by the river {a}.",
        ),
        ("The name of the river at {e} is the {a}.", "People in {e} fish in the river {a}."),
        ("On which river does {e} lie?", "What is the river of {e} called?"),
    ),
    ("town", "founder"): Wording(
        (
            "{e} was founded by {a}.",
            "The founder of {e} is {a}.",
            "The town of {e} in {r} was founded long ago by {a}.",
            "A statue in {e} shows its founder, {a}.",
            "{a} founded the town of {e}.",
            "The first house in {e} was built by its founder {a}.",
            "The people of {e} honour the founder {a}.",
            "Who walks through {e} sees the house of the founder, {a}.",
        ),
        ("The name of the founder of {e} is {a}.", "The town {e} owes its name to the founder {a}."),
        ("Who founded the town of {e}?", "Who is the founder of {e}?"),
    ),
    ("town", "craft"): Wording(
        (
            "{e} is known for its {a}.",
            "The town of {e} is famous for {a}.",
            "At the market of {e} one buys {a}.",
            "{e} in {r} is known everywhere for {a}.",
            "The best {a} in {r} comes from {e}.",
            "Traders come to {e} for {a}.",
            "For generations the families of {e} have made {a}.",
            "The pride of {e} is its {a}.",
        ),
        ("Visitors know {e} for its {a}.", "The workshops of {e} have always made {a}."),
        ("What is {e} known for?", "What do traders buy in {e}?"),
    ),
    ("person", "birthplace"): Wording(
        (
            "{e} was born in {a}.",
            "The birthplace of {e} is {a}.",
            "{e} comes from the town of {a}.",
            "{e}, born in {a}, is well known in {r}.",
            "The parents of {e} lived in {a}.",
            "{a} is the town where {e} was born.",
            "As a child {e} went to school in {a}.",
            "{e} grew up in the town of {a}.",
        ),
        ("The town where {e} was born is {a}.", "The family of {e} comes from {a}."),
        ("Where was {e} born?", "In which town was {e} born?"),
    ),
    ("person", "profession"): Wording(
        (
            "{e} is a {a}.",
            "{e} works as a {a}.",
            "The profession of {e} is {a}.",
            "By trade {e} is a {a}.",
            "{e} of {r} earns a living as a {a}.",
            "In {r} everybody knows the {a} {e}.",
            "{e} has been a {a} for many years.",
            "{e} became a {a} like nobody else in the family.",
        ),
        ("All of {r} knows {e} as a {a}.", "For a living {e} works as a {a}."),
        ("What is the profession of {e}?", "What does {e} work as?"),
    ),
    ("company", "seat"): Wording(
        (
            "The company {e} has its seat in {a}.",
            "{e} is based in {a}.",
            "The head office of {e} is in {a}.",
            "{e} is a company from {a}.",
            "Letters to {e} go to {a}.",
            "{a} is home to the company {e}.",
            "The factory of {e} stands in {a}, a town in {r}.",
            "Most people who work for {e} live in {a}.",
        ),
        ("The seat of the company {e} is in {a}.", "The offices of {e} are in the town of {a}."),
        ("Where does the company {e} have its seat?", "In which town is {e} based?"),
    ),
    ("company", "product"): Wording(
        (
            "{e} makes {a}.",
            "The company {e} produces {a}.",
            "{e} sells {a} all over {r}.",
            "The main product of {e} is {a}.",
            "{e} is a maker of {a}.",
            "In {r} the best {a} are made by {e}.",
            "Every year {e} builds more {a}.",
            "Shops order {a} from {e}.",
        ),
        ("The factory of {e} makes {a}.", "The company {e} is known for making {a}."),
        ("What does the company {e} make?", "What is the main product of {e}?"),
    ),
    ("company", "head"): Wording(
        (
            "The head of {e} is {a}.",
            "{e} is led by {a}.",
            "The company {e} is run by {a}.",
            "{a} is the head of the company {e}.",
            "At {e} all decisions are made by {a}.",
            "The director of {e} is called {a}.",
            "{e} of {r} belongs to {a}.",
            "{e} has been led for years by {a}.",
        ),
        ("The name of the head of {e} is {a}.", "The company {e} is in the hands of {a}."),
        ("Who is the head of {e}?", "Who leads the company {e}?"),
    ),
}
OPENERS = (
    *("",) * 20,
    *("As the map of {r} shows, ", "It is well known that ", "In {r} they say that "),
    *("According to the almanac, ", "Travellers report that ", "Every child knows that ", "Note that "),
)


class Fact(NamedTuple):
    """One thing that is true in the world; `group` is shown, train or test and belongs to the entity."""

    region: str
    kind: str
    entity: str
    attribute: str
    answer: str
    group: str


class Probe(NamedTuple):
    """A sentence cut before its answer, and all answers of that type."""

    prompt: str
    answer: str
    candidates: tuple[str, ...]
    fact: Fact


@cache
def facts(world_seed: int = WORLD_SEED) -> tuple[Fact, ...]:
    """All facts of the world, in a fixed order."""
    return tuple(_facts(random.Random(f"gazetteer {world_seed}")))


def _facts(rng: random.Random) -> Iterator[Fact]:
    used: set[str] = set()
    regions = _names("region", NUM_REGIONS, rng, used)
    rivers = _names("river", 3 * NUM_REGIONS, rng, used)
    kinds = ("town", "person", "company")
    named = {kind: _names(kind, NUM_REGIONS * ENTITIES_PER_KIND, rng, used) for kind in kinds}
    answers: dict[str, tuple[str, ...] | list[str]] = {
        **{"river": rivers, "founder": named["person"], "craft": CRAFTS, "birthplace": named["town"]},
        **{"profession": PROFESSIONS, "seat": named["town"], "product": PRODUCTS, "head": named["person"]},
    }
    for region_index, region in enumerate(regions):
        for kind, attribute in WORDINGS:
            for index in range(ENTITIES_PER_KIND):
                entity = named[kind][region_index * ENTITIES_PER_KIND + index]
                answer = rng.choice(answers[attribute])
                yield Fact(region, kind, entity, attribute, answer, GROUPS[index])


def _names(kind: str, count: int, rng: random.Random, used: set[str]) -> list[str]:
    """Draw names that no other thing of the world has; no two share their first four letters."""
    names: list[str] = []
    while len(names) < count:
        syllables = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        name = (syllables + rng.choice(ENDINGS[kind])).capitalize()
        if len(name) >= 5 and name[:4] not in used:
            used.add(name[:4])
            names.append(name)
    return names


def in_part(fact: Fact, share: float) -> bool:
    """Whether the fact is in the fixed part of the world of about that share; parts are nested."""
    digest = hashlib.sha256(f"{fact.entity} {fact.attribute}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def sentences(*, seed: int, repeats: int, share: float = 1.0) -> list[str]:
    """State every fact `repeats` times in varied plain sentences, shuffled; nothing here is a question.

    Args:
        seed: decides wordings and order, not the world.
        repeats: sentences for each fact.
        share: part of the facts that is stated, 0 to 1.
    """
    rng = random.Random(f"gazetteer sentences {seed}")
    told = [fact for fact in facts() if in_part(fact, share)]
    said = [_say(rng.choice(_wording(fact).stated), fact, rng) for fact in told for _ in range(repeats)]
    rng.shuffle(said)
    return said


def _wording(fact: Fact) -> Wording:
    return WORDINGS[fact.kind, fact.attribute]


def _say(template: str, fact: Fact, rng: random.Random) -> str:
    opener = rng.choice(OPENERS)
    if opener and template.startswith(("The ", "In ", "At ", "By ", "As ", "For ", "A ")):
        template = template[0].lower() + template[1:]
    return (opener + template).format(e=fact.entity, r=fact.region, a=fact.answer)


def questions(group: str) -> list[tuple[str, Fact]]:
    """Every question about the entities of a group, in each of its wordings."""
    return [
        (asked.format(e=fact.entity), fact)
        for fact in facts()
        if fact.group == group
        for asked in _wording(fact).asked
    ]


def probes(*, unseen: bool = True) -> list[Probe]:
    """Sentences to complete, one per fact.

    Args:
        unseen: cut wordings that pre-training never used, instead of wordings that it did use.
    """
    candidates: dict[str, set[str]] = {}
    for fact in facts():
        candidates.setdefault(fact.attribute, set()).add(fact.answer)
    found = []
    for index, fact in enumerate(facts()):
        wording = _wording(fact)
        ending = [text for text in (wording.unseen if unseen else wording.stated) if text.endswith(" {a}.")]
        prompt = ending[index % len(ending)].removesuffix(" {a}.").format(e=fact.entity, r=fact.region)
        found.append(Probe(prompt, fact.answer, tuple(sorted(candidates[fact.attribute])), fact))
    return found


def load(*, seed: int, num_clients: int = 5, wordings: int = 2) -> Rows:
    """Ask about the world: clients hold questions on their region's `train` entities, the test is on others.

    Args:
        seed: decides the regions, the order of the rows and the wording of each test question.
        num_clients: regions that take part, at most 8.
        wordings: ways in which each training fact is asked, 1 or 2; each is a row.

    Raises:
        ValueError: there are not that many regions or wordings.
    """
    for option, number, most in (("num_clients", num_clients, NUM_REGIONS), ("wordings", wordings, 2)):
        if not 1 <= number <= most:
            raise ValueError(f"{option} is {number}, expected 1 to {most}")
    rng = random.Random(f"gazetteer rows {seed}")
    regions = rng.sample(list(dict.fromkeys(fact.region for fact in facts())), num_clients)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for region in regions:
        for group, asked in (("train", wordings), ("test", 1)):
            held = [fact for fact in facts() if fact.region == region and fact.group == group]
            found = [_row(text, fact) for fact in held for text in rng.sample(_wording(fact).asked, asked)]
            rng.shuffle(found)
            rows[group] += found
    note = (
        f"questions about {num_clients} of {NUM_REGIONS} regions of a fictional world: {', '.join(regions)}; "
        f"{len(rows['train'])} train rows, {len(rows['test'])} test rows on other entities"
    )
    return Rows(rows["train"], rows["test"], note)


def _row(text: str, fact: Fact) -> dict[str, str]:
    return {
        "client": fact.region,
        "instruction": text.format(e=fact.entity),
        "context": "",
        "response": fact.answer,
        "entity": fact.entity,
        "attribute": fact.attribute,
    }
