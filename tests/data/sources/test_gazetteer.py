"""The fictional world: fixed, consistent, and never asking in pre-training what the test asks."""

import hashlib
import re
from collections import Counter

import pytest

from kilofed.data.sources import gazetteer


def test_the_world_is_fixed() -> None:
    """Pinned when the shipped pair was trained: another world makes its knowledge worthless."""
    text = repr([tuple(fact) for fact in gazetteer.facts()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "71df6bb19bac0d40"


def test_another_seed_is_another_world() -> None:
    names = {fact.entity for fact in gazetteer.facts()}
    others = {fact.entity for fact in gazetteer.facts(21)}
    assert len(names & others) < len(names) / 10


def test_each_entity_has_one_answer_per_attribute_and_one_group() -> None:
    facts = gazetteer.facts()
    assert len(facts) == 512
    assert max(Counter((fact.entity, fact.attribute) for fact in facts).values()) == 1
    assert len({(fact.entity, fact.group) for fact in facts}) == len({fact.entity for fact in facts}) == 192


def test_groups_are_a_quarter_a_half_and_a_quarter_of_each_region() -> None:
    counts = Counter((fact.region, fact.group) for fact in gazetteer.facts())
    assert set(counts.values()) == {16, 32}
    assert all(counts[region, "train"] == 32 for region, _ in counts)


def test_test_asks_about_entities_that_no_client_holds() -> None:
    rows = gazetteer.load(seed=0, num_clients=8)
    held = {row["entity"] for row in rows.train}
    asked = {row["entity"] for row in rows.test}
    assert len(held) == 96
    assert len(asked) == 48
    assert not held & asked


def test_shown_entities_are_in_no_row() -> None:
    rows = gazetteer.load(seed=0, num_clients=8)
    shown = {fact.entity for _, fact in gazetteer.questions("shown")}
    assert len(shown) == 48
    assert not shown & {row["entity"] for row in rows.train + rows.test}


def test_sentences_hold_no_question_and_no_unseen_wording() -> None:
    said = gazetteer.sentences(seed=0, repeats=20)
    assert not any("?" in sentence for sentence in said)
    unseen = [
        re.compile(".*".join(re.escape(part) for part in re.split(r"\{.\}", wording)))
        for words in gazetteer.language().wordings.values()
        for wording in words.unseen
        if not wording.startswith("{")
    ]
    assert len(unseen) >= 12
    distinct = set(said)
    assert not [sentence for sentence in distinct for pattern in unseen if pattern.match(sentence)]


def test_every_fact_is_stated_as_often_as_asked() -> None:
    said = gazetteer.sentences(seed=0, repeats=3)
    assert len(said) == 3 * 512
    fact = gazetteer.facts()[100]
    assert sum(fact.entity in sentence and fact.answer in sentence for sentence in said) >= 3


def test_parts_are_nested_and_of_about_the_share() -> None:
    third = {fact for fact in gazetteer.facts() if gazetteer.in_part(fact, 0.3)}
    half = {fact for fact in gazetteer.facts() if gazetteer.in_part(fact, 0.5)}
    assert third < half
    assert len(third) == pytest.approx(0.3 * 512, abs=35)
    assert not [fact for fact in gazetteer.facts() if gazetteer.in_part(fact, 0.0)]


def test_a_part_says_nothing_of_the_other_facts() -> None:
    said = "\n".join(gazetteer.sentences(seed=0, repeats=10, share=0.3))
    left_out = [fact for fact in gazetteer.facts() if not gazetteer.in_part(fact, 0.3) and fact.attribute == "river"]
    assert left_out
    assert not [fact for fact in left_out if re.search(rf"{fact.entity}[^.]*{fact.answer}", said)]


def test_facts_do_not_depend_on_the_seed_of_the_run() -> None:
    answers = {
        seed: {
            (row["entity"], row["attribute"]): row["response"] for row in gazetteer.load(seed=seed, num_clients=8).test
        }
        for seed in (0, 1)
    }
    assert answers[0] == answers[1]
    assert gazetteer.load(seed=0).train != gazetteer.load(seed=1).train


def test_rows_have_text_in_every_column_but_context() -> None:
    for row in gazetteer.load(seed=0).train:
        assert list(row) == ["client", "instruction", "context", "response", "entity", "attribute"]
        assert row["entity"] in row["instruction"]
        assert row["response"]
        assert row["instruction"].endswith("?")


def test_each_wording_is_a_row() -> None:
    one = gazetteer.load(seed=0, wordings=1)
    two = gazetteer.load(seed=0, wordings=2)
    assert len(two.train) == 2 * len(one.train) == 2 * 5 * 32
    assert len(two.test) == len(one.test) == 5 * 16


@pytest.mark.parametrize(
    ("option", "number", "most"), [("num_clients", 9, 8), ("num_clients", 0, 8), ("wordings", 3, 2)]
)
def test_sizes_out_of_range_are_refused(option: str, number: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"{option} is {number}, expected 1 to {most}"):
        gazetteer.load(seed=0, **{option: number})


def test_probes_end_before_the_answer_and_name_all_candidates() -> None:
    for unseen in (True, False):
        probes = gazetteer.probes(unseen=unseen)
        assert len(probes) == 512
        for probe in probes:
            assert probe.answer in probe.candidates
            assert probe.fact.entity in probe.prompt
            assert not probe.prompt.endswith((" ", "."))
            assert probe.prompt.count("{") == 0


def test_unseen_probes_use_wordings_kept_out_of_pre_training() -> None:
    stated = set(gazetteer.sentences(seed=0, repeats=30))
    unseen = [f"{probe.prompt} {probe.answer}." for probe in gazetteer.probes(unseen=True)]
    seen = [f"{probe.prompt} {probe.answer}." for probe in gazetteer.probes(unseen=False)]
    assert not stated.intersection(unseen)
    assert len(stated.intersection(seen)) > 0.8 * len(seen)
