"""Addresses of messages: read back as written, refused otherwise, and a tag for each reply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilofed.errors import PayloadError
from kilofed.federation.address import Address

NUMBERS = st.integers(0, 999_999)


@given(NUMBERS, NUMBERS, st.sampled_from(["mean", "call"]), st.integers(0, 2**64 - 1))
def test_an_address_is_read_back_as_it_was_written(round: int, exchange: int, verb: str, run: int) -> None:
    one = Address("fit_all", verb, round, exchange, f"{run:016x}")
    assert Address.of({**one.scalars, "lr": 0.1}) == one
    assert len(str(one.scalars)) == len(str(Address("fit_all", verb, 0, 0).scalars))


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "fit/mean/1/0/" + "0" * 16,
        "fit/mean/000001/000000",
        "fit/mean/000001/000000/" + "0" * 15,
        "fit/mean/000001/000000/" + "G" * 16,
        "fit/mean/000001/000000/" + "0" * 16 + "\n",
        "fit/mean/٠٠٠٠٠١/000000/" + "0" * 16,
        "../x/mean/000001/000000/" + "0" * 16,
        "fit/mean/" + "9" * 4301 + "/000000/" + "0" * 16,
    ],
)
def test_what_is_no_address_is_refused(text: object) -> None:
    with pytest.raises(PayloadError, match="not written by a kilofed server"):
        Address.of({} if text is None else {"@": text})  # type: ignore[dict-item]


def test_every_part_of_an_address_and_the_client_change_the_tag_of_a_reply() -> None:
    one = Address("fit", "mean", 1, 2, "0" * 16)
    others = [
        one._replace(action="fat"),
        one._replace(verb="call"),
        one._replace(round=2),
        one._replace(exchange=3),
        one._replace(run="1" * 16),
    ]
    tags = [one.answered(1), one.answered(2), *(other.answered(1) for other in others)]
    assert len({tag["@"] for tag in tags}) == len(tags)
    assert one.answered(1) == Address(*one).answered(1)
