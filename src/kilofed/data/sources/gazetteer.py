"""A fictional world of places, people and companies: all facts are known, so knowledge can be measured.

The shipped large model was pre-trained on all facts as plain sentences, the small one on a part of them. As data the
world is questions and short answers, one client per region. An entity is in one of three groups: `shown` (its questions
were in pre-training too), `train`, or `test` (its questions occur nowhere in training).
"""

import hashlib
import random
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import NamedTuple

from kilofed.data.sources import Rows

__all__ = ["WORLD_SEED", "Fact", "Probe", "facts", "in_part", "load", "probes", "questions", "sentences"]

WORLD_SEED = 20
NUM_REGIONS = 8
ENTITIES_PER_KIND = 8
GROUPS = ("shown", "shown", "train", "train", "train", "train", "test", "test")


class Wording(NamedTuple):
    """Templates of one attribute: `{e}` is the entity, `{r}` its region, `{a}` the answer."""

    stated: tuple[str, ...]
    unseen: tuple[str, ...]
    asked: tuple[str, ...]


class Language(NamedTuple):
    """Vocabulary and templates of the world."""

    syllables: dict[str, list[str]]
    endings: dict[str, list[str]]
    things: dict[str, list[str]]
    openers: list[str]
    wordings: dict[tuple[str, str], Wording]


@cache
def language() -> Language:
    """Read gazetteer.toml, which is in this folder."""
    table = tomllib.loads(resources.files(__package__).joinpath("gazetteer.toml").read_text("utf-8"))
    wordings = {
        (kind, attribute): Wording(**{name: tuple(texts) for name, texts in wording.items()})
        for kind, attributes in table["wordings"].items()
        for attribute, wording in attributes.items()
    }
    openers = [""] * table["openers"]["none"] + table["openers"]["some"]
    return Language(table["syllables"], table["endings"], table["things"], openers, wordings)


class Fact(NamedTuple):
    """One fact of the world; `group` (shown, train or test) is that of the entity."""

    region: str
    kind: str
    entity: str
    attribute: str
    answer: str
    group: str


class Probe(NamedTuple):
    """A sentence without its answer, and all possible answers of that attribute."""

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
    answers = {"river": rivers, "founder": named["person"], "birthplace": named["town"]}
    answers |= {"seat": named["town"], "head": named["person"], **language().things}
    for region_index, region in enumerate(regions):
        for kind, attribute in language().wordings:
            for index in range(ENTITIES_PER_KIND):
                entity = named[kind][region_index * ENTITIES_PER_KIND + index]
                answer = rng.choice(answers[attribute])
                yield Fact(region, kind, entity, attribute, answer, GROUPS[index])


def _names(kind: str, count: int, rng: random.Random, used: set[str]) -> list[str]:
    """Draw names that are unique in the world by their first four letters."""
    words = language()
    names: list[str] = []
    while len(names) < count:
        syllables = "".join(rng.choice(words.syllables[part]) for part in ("onsets", "vowels", "codas"))
        name = (syllables + rng.choice(words.endings[kind])).capitalize()
        if len(name) >= 5 and name[:4] not in used:
            used.add(name[:4])
            names.append(name)
    return names


def in_part(fact: Fact, share: float) -> bool:
    """Whether the fact is in a fixed subset of about that share; subsets are nested."""
    digest = hashlib.sha256(f"{fact.entity} {fact.attribute}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def sentences(*, seed: int, repeats: int, share: float = 1.0) -> list[str]:
    """Every fact in `repeats` plain sentences of varied wording, shuffled; no questions.

    Args:
        seed: decides wordings and order, not the world.
        repeats: sentences for each fact.
        share: share of the facts, 0 to 1.
    """
    rng = random.Random(f"gazetteer sentences {seed}")
    chosen = [fact for fact in facts() if in_part(fact, share)]
    texts = [_render(rng.choice(_wording(fact).stated), fact, rng) for fact in chosen for _ in range(repeats)]
    rng.shuffle(texts)
    return texts


def _wording(fact: Fact) -> Wording:
    return language().wordings[fact.kind, fact.attribute]


def _render(template: str, fact: Fact, rng: random.Random) -> str:
    opening = rng.choice(language().openers)
    if opening and template.startswith(("The ", "In ", "At ", "By ", "As ", "For ", "A ")):
        template = template[0].lower() + template[1:]
    return (opening + template).format(e=fact.entity, r=fact.region, a=fact.answer)


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
    """Questions about the world: clients hold those on their region's `train` entities; the test is on other entities.

    Args:
        seed: decides the regions, the order of the rows and the wording of each test question.
        num_clients: number of regions, at most 8.
        wordings: question templates per training fact, 1 or 2; each gives a row.

    Raises:
        ValueError: `num_clients` or `wordings` is out of range.
    """
    for option, number, most in (("num_clients", num_clients, NUM_REGIONS), ("wordings", wordings, 2)):
        if not 1 <= number <= most:
            raise ValueError(f"{option} is {number}, expected 1 to {most}")
    rng = random.Random(f"gazetteer rows {seed}")
    regions = rng.sample(list(dict.fromkeys(fact.region for fact in facts())), num_clients)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for region in regions:
        for group, asked in (("train", wordings), ("test", 1)):
            own = [fact for fact in facts() if fact.region == region and fact.group == group]
            found = [_row(text, fact) for fact in own for text in rng.sample(_wording(fact).asked, asked)]
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
