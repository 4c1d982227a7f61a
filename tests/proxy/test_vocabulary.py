"""One tokeniser or two: compared by what is in them."""

import pytest
from tests.conftest import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kilofed.errors import ModelError
from kilofed.proxy.vocabulary import common_vocabulary, common_width


def tokenizer(
    words: dict[str, int], merges: list[tuple[str, str]], *, spaces: bool = False
) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(words, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaces)
    return PreTrainedTokenizerFast(tokenizer_object=made)


WORDS = {"a": 0, "b": 1, "ab": 2, "ba": 3}


def test_two_copies_are_one() -> None:
    assert common_vocabulary(byte_tokenizer(), byte_tokenizer()) == 259


def test_added_tokens_count_and_holes_do_too() -> None:
    large, small = tokenizer({"a": 0, "b": 7}, []), tokenizer({"a": 0, "b": 7}, [])
    assert common_vocabulary(large, small) == 8
    small.add_tokens(["c"])
    with pytest.raises(ModelError, match="has 2 tokens and the small one's 3: give"):
        common_vocabulary(large, small)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"a": 0, "b": 1, "ab": 3, "ba": 2},
            r"differ at 'ab' \(the large model has it at 2, the small one has it at 3\)",
        ),
        ({"a": 0, "c": 1, "ab": 2, "ba": 3}, r"differ at 'b' \(the large model has it at 1, the small one does not"),
    ],
)
def test_the_first_token_that_differs_is_named(other: dict[str, int], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        common_vocabulary(tokenizer(WORDS, []), tokenizer(other, []))


def test_equal_tokens_with_other_merges_or_spaces_are_refused() -> None:
    one = tokenizer(WORDS, [("a", "b"), ("b", "a")])
    for other in (tokenizer(WORDS, [("b", "a"), ("a", "b")]), tokenizer(WORDS, [("a", "b"), ("b", "a")], spaces=True)):
        with pytest.raises(ModelError, match="split text differently"):
            common_vocabulary(one, other)


def test_the_common_width_is_the_vocabulary_not_the_padding() -> None:
    assert common_width({"large": 64, "small": 48}, 45) == 45
    assert common_width({"large": 48, "small": 48}, None) == 48
