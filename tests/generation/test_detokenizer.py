"""Token ids and text: names, text as it comes, stop strings, pieces of an answer."""

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kilofed.config.recipe import ModelSpec
from kilofed.generation.decoding import Token
from kilofed.generation.detokenizer import (
    BROKEN,
    RepeatedDecoder,
    StopStrings,
    StreamDecoder,
    TextCodec,
    detokenize,
    incremental_decoder,
)
from kilofed.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    """One token per byte."""
    return TextCodec(load_tokenizer(ModelSpec(str(tiny_model))))


@pytest.fixture(scope="module")
def fallback() -> TextCodec:
    """Words that begin with a space, and bytes for what is no word, as SentencePiece has them."""
    words = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


@pytest.fixture(scope="module")
def builtin() -> TextCodec:
    """Byte-level BPE: a token is any run of bytes, also part of a character."""
    return TextCodec(load_tokenizer(ModelSpec("builtin:small")))


@pytest.fixture(scope="module")
def metaspace() -> TextCodec:
    """Words that begin with a space, as Llama and T5 decode them."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁cat", "s", "▁▁", "é"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))


class Slow:
    """A tokeniser that the tokenizers library has not: one token per byte."""

    bos_token_id = eos_token_id = None
    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def __len__(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {str(byte): byte for byte in range(256)}

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


def ids_of(codec: TextCodec, content: bytes) -> list[int]:
    by_byte = {codec.bytes(token): token for token in range(3, 259)}
    return [by_byte[bytes([byte])] for byte in content]


def written(codec: TextCodec, ids: list[int]) -> list[str]:
    writer = incremental_decoder(codec)
    return [*(writer.add(token) for token in ids), writer.end()]


def placed(codec: TextCodec, content: bytes, **options: list[str] | set[int]) -> list[tuple[str, list[int], str]]:
    tokens = iter([Token(token, -1.0) for token in ids_of(codec, content)])
    return [(p.text, [s.token.id for s in p.tokens], p.finish_reason) for p in detokenize(tokens, codec, **options)]  # type: ignore[arg-type]


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_pieces_joined_are_the_text_of_all_tokens(codec: TextCodec, content: bytes) -> None:
    ids = ids_of(codec, content)
    assert "".join(written(codec, ids)) == codec.decode(ids) == content.decode("utf-8", "replace")


@given(st.text(max_size=30).filter(lambda text: BROKEN not in text))
@settings(deadline=None)
def test_a_character_is_never_given_out_half(codec: TextCodec, text: str) -> None:
    pieces = written(codec, ids_of(codec, text.encode()))
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(codec: TextCodec) -> None:
    assert written(codec, ids_of(codec, "a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_bytes_that_are_no_character_are_told_at_the_end(codec: TextCodec) -> None:
    assert written(codec, ids_of(codec, b"a\xe2\x82")) == ["a", "", "", BROKEN]


def test_pieces_of_words_with_spaces_in_front_are_the_whole_text(fallback: TextCodec) -> None:
    vocabulary = fallback.tokenizer.get_vocab()
    euro = [vocabulary[f"<0x{byte:02X}>"] for byte in "€".encode()]
    ids = [vocabulary[word] for word in ("▁the", "▁cat", "s")] * 5 + euro + [vocabulary["▁the"], *euro]
    pieces = written(fallback, ids)
    assert "".join(pieces) == fallback.decode(ids) == "the cats" + " the cats" * 4 + "€ the€"
    assert not any(BROKEN in piece for piece in pieces)


@given(st.lists(st.integers(0, 4095), max_size=60))
@settings(deadline=None)
def test_any_tokens_of_a_byte_level_model_join_to_their_text(builtin: TextCodec, ids: list[int]) -> None:
    assert "".join(written(builtin, ids)) == builtin.decode(ids)


@given(st.lists(st.integers(0, 8), max_size=30))
@settings(deadline=None)
def test_any_tokens_of_a_metaspace_model_join_to_their_text(metaspace: TextCodec, ids: list[int]) -> None:
    assert "".join(written(metaspace, ids)) == metaspace.decode(ids)


@given(st.text(max_size=12).filter(lambda text: BROKEN not in text), st.sampled_from(["▁the", "▁cat", "s", "</s>"]))
@settings(deadline=None)
def test_characters_in_fallback_bytes_come_whole(fallback: TextCodec, text: str, word: str) -> None:
    vocabulary = fallback.tokenizer.get_vocab()
    spelt = [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]
    ids = [vocabulary["s"], *spelt, vocabulary[word], *spelt]
    pieces = written(fallback, ids)
    assert "".join(pieces) == fallback.decode(ids)
    assert not any(BROKEN in piece for piece in pieces)


@given(st.lists(st.integers(0, 261), max_size=40))
@settings(deadline=None)
def test_bytes_that_stop_being_text_lose_no_later_token(fallback: TextCodec, ids: list[int]) -> None:
    the = fallback.tokenizer.get_vocab()["▁the"]
    assert "".join(written(fallback, [*ids, the])).endswith("the")


def test_a_run_of_bytes_that_ends_inside_a_character_keeps_what_was_given_out(fallback: TextCodec) -> None:
    vocabulary = fallback.tokenizer.get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in "é€".encode()[:-1]] + [vocabulary["▁the"]]
    assert fallback.decode(ids) == 4 * BROKEN + " the"
    pieces = written(fallback, ids)
    assert pieces[1] == "é"
    assert "".join(pieces) == "é" + 2 * BROKEN + " the"


def test_special_tokens_have_no_text_wherever_they_are(builtin: TextCodec) -> None:
    ids = builtin.tokenizer.encode("naïve façade", add_special_tokens=False)
    end = builtin.tokenizer.eos_token_id
    mixed = [end, *[one for number in ids for one in (number, end)], end]
    assert "".join(written(builtin, mixed)) == builtin.decode(ids)


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_a_tokeniser_of_another_library_gives_the_same_pieces(codec: TextCodec, content: bytes) -> None:
    slow = TextCodec(Slow())  # type: ignore[arg-type]
    assert isinstance(incremental_decoder(slow), RepeatedDecoder)
    assert isinstance(incremental_decoder(codec), StreamDecoder)
    assert "".join(written(slow, list(content))) == "".join(written(codec, ids_of(codec, content)))


def test_names_and_bytes_of_tokens(codec: TextCodec, fallback: TextCodec) -> None:
    space, part = ids_of(codec, b" \xe2")
    assert (codec.name(space), codec.bytes(space)) == (" ", b" ")
    assert (codec.name(part), codec.bytes(part)) == ("bytes:\\xe2", b"\xe2")
    assert codec.name(2) == "<eos>"
    vocabulary = fallback.tokenizer.get_vocab()
    assert fallback.name(vocabulary["▁the"]) == " the"
    assert fallback.bytes(vocabulary["<0xE2>"]) == b"\xe2"
    assert codec.name(100_000) == ""


def test_a_text_begins_with_the_first_token_once(codec: TextCodec) -> None:
    assert codec.encode("ab") == [1, *ids_of(codec, b"ab")]
    assert codec.encode("<bos>ab") == codec.encode("ab")
    assert codec.encode("") == [1]


@given(st.text("abc", max_size=20), st.text("abc", min_size=1, max_size=4), st.integers(1, 5))
def test_a_stop_string_is_found_wherever_the_text_is_cut(text: str, string: str, size: int) -> None:
    stops = StopStrings([string])
    given_out = "".join(stops.add(text[n : n + size]) for n in range(0, len(text), size)) + stops.end()
    assert given_out == text.partition(string)[0]
    assert stops.found == (string in text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nQ"])
    assert [stops.add(part) for part in ("a\n", "\n", "b", "\n\n", "Q", "c")] == ["a", "", "\n\nb", "", "", ""]
    assert stops.found


def test_an_answer_ends_at_its_end_token_which_has_no_text(codec: TextCodec) -> None:
    ids = [*ids_of(codec, b"ab"), 2]
    pieces = list(detokenize((Token(token, -1.0) for token in ids), codec, end_ids={2}))
    assert [(piece.text, piece.finish_reason, piece.num_new) for piece in pieces] == [
        ("a", "", 1),
        ("b", "", 1),
        ("", "stop", 1),
    ]
    assert [(s.token.id, s.start) for piece in pieces for s in piece.tokens] == list(zip(ids, [0, 1, 2], strict=True))


def test_an_answer_that_runs_out_of_room_says_so(codec: TextCodec) -> None:
    pieces = placed(codec, b"a\xe2")
    assert [(text, end) for text, _, end in pieces] == [("a", ""), ("", ""), (BROKEN, "length")]
    assert [token for _, tokens, _ in pieces for token in tokens] == ids_of(codec, b"a\xe2")


def test_tokens_behind_a_stop_string_are_left_out_and_no_more_are_asked_for(codec: TextCodec) -> None:
    asked: list[int] = []

    def tokens() -> object:
        for token in ids_of(codec, b"abXYcd"):
            asked.append(token)
            yield Token(token, -1.0)

    pieces = list(detokenize(tokens(), codec, stops=["XY"]))  # type: ignore[arg-type]
    assert "".join(piece.text for piece in pieces) == "ab"
    assert [s.token.id for piece in pieces for s in piece.tokens] == ids_of(codec, b"ab")
    assert pieces[-1].finish_reason == "stop"
    assert asked == ids_of(codec, b"abXY")


def test_a_token_comes_with_the_first_of_its_text(codec: TextCodec) -> None:
    pieces = placed(codec, "€X".encode(), stops=["Xx"])
    euro, x = ids_of(codec, "€".encode()), ids_of(codec, b"X")
    assert pieces == [("", [], ""), ("", [], ""), ("€", euro, ""), ("", [], ""), ("X", x, "length")]


@pytest.mark.parametrize("strings", [["late", "soon"], ["soon", "late"]])
def test_the_earliest_of_several_stop_strings_ends_the_text_whichever_is_listed_first(strings: list[str]) -> None:
    assert StopStrings(strings).add("a soon and a late one") == "a "
