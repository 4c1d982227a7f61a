"""Token ids and text: names, text as it comes, stop strings, pieces of an answer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kilofed.config.recipe import ModelSpec
from kilofed.generation.decoding import Token
from kilofed.generation.detokenizer import BROKEN, IncrementalDecoder, StopStrings, TextCodec, detokenize
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


def ids_of(codec: TextCodec, content: bytes) -> list[int]:
    by_byte = {codec.bytes(token): token for token in range(3, 259)}
    return [by_byte[bytes([byte])] for byte in content]


def written(codec: TextCodec, ids: list[int]) -> list[str]:
    writer = IncrementalDecoder(codec.decode)
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
