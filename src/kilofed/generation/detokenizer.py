"""Token ids and text: what a token is called, text out of tokens as they come, and strings at which an answer ends."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kilofed.generation.decoding import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""

FinishReason = Literal["", "stop", "length"]


class TextCodec:
    """The text of one tokeniser's tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.num_tokens = len(tokenizer)
        """Ids from here on are no tokens."""
        self._added = {number: str(word) for number, word in tokenizer.added_tokens_decoder.items()}
        known = tokenizer.get_vocab()
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        # A tokeniser over bytes has a token for each of them, under these letters.
        self._letters = letters if all(letter in known for letter in letters) else {}

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, behind the tokeniser's first token if it has one: how texts are tokenised in training."""
        ids = [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]
        first = self.tokenizer.bos_token_id
        if first is None:
            # A model must be given something.
            return ids or [i for i in [self.tokenizer.eos_token_id] if i is not None]
        return ids if ids[:1] == [first] else [first, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; special ones are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def bytes(self, token: int) -> bytes:
        """What a token stands for, special ones by their name; some tokens are part of a character only."""
        if token in self._added:
            return self._added[token].encode()
        word = self.tokenizer.convert_ids_to_tokens(token) if token < self.num_tokens else None
        if not isinstance(word, str):
            return b""
        if self._letters and all(letter in self._letters for letter in word):
            return bytes(self._letters[letter] for letter in word)
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return word.replace("▁", " ").encode()

    def name(self, token: int) -> str:
        """A token as text; `bytes:\\xe2\\x82` for one that is no whole character, as OpenAI writes them."""
        known = self.bytes(token)
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)


class StreamDecoder:
    """Text out of tokens as they come, by tokenizers' DecodeStream; a character is given out when it is whole.

    The pieces joined are the text of all tokens. The one exception are tokenisers that fall back to bytes for what they
    do not know and decode a run of such bytes as one: where a run turns out to be no UTF-8, what was given out stays.
    """

    def __init__(self, codec: TextCodec, backend: Tokenizer) -> None:
        self._codec, self._backend = codec, backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []  # Tokens of which no text was given out.

    def add(self, token: int) -> str:
        """What one more token adds; empty while a character is not whole."""
        self._held.append(token)
        try:
            text = self._stream.step(self._backend, token)
        # The library has no other: what was given out no longer begins the text of its run of bytes.
        except Exception:
            held, self._held = self._held, []
            self._stream = DecodeStream(skip_special_tokens=True)
            return "".join(self.add(one) for one in held)
        if text:
            self._held.clear()
        return text or ""

    def end(self) -> str:
        """What was held back; no more tokens come."""
        held, self._held = self._held, []
        return self._codec.decode(held)


class RepeatedDecoder:
    """Text out of tokens as they come, for tokenisers that the tokenizers library has not: all is decoded each time."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._sent = 0  # Characters that were given out.

    def add(self, token: int) -> str:
        """As `StreamDecoder.add`."""
        self._ids.append(token)
        text = self._codec.decode(self._ids)
        return "" if text.endswith(BROKEN) else self._rest(text)

    def end(self) -> str:
        """As `StreamDecoder.end`."""
        return self._rest(self._codec.decode(self._ids))

    def _rest(self, text: str) -> str:
        new, self._sent = text[self._sent :], len(text)
        return new


def incremental_decoder(codec: TextCodec) -> StreamDecoder | RepeatedDecoder:
    """A decoder for one text, as fast as the tokeniser allows."""
    backend = getattr(codec.tokenizer, "backend_tokenizer", None)
    return StreamDecoder(codec, backend) if isinstance(backend, Tokenizer) else RepeatedDecoder(codec)


class StopStrings:
    """Strings that end a text, found also where they lie across pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(string for string in strings if string)
        self.found = False
        """Whether one has been seen; nothing is given out after it."""
        self._held = ""

    def add(self, text: str) -> str:
        """What can be given out: all but what may yet become a stop string, or what stands before the first of them."""
        if self.found:
            return ""
        self._held += text
        starts = [start for string in self.strings if (start := self._held.find(string)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        keep = max((_overlap(self._held, string) for string in self.strings), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def end(self) -> str:
        """What was held back; no more text comes."""
        held, self._held = self._held, ""
        return "" if self.found else held


class PlacedToken(NamedTuple):
    """A token and where it begins in the answer, in characters."""

    token: Token
    start: int


@dataclass(frozen=True)
class Piece:
    """What one more token brought; the pieces of an answer, joined, are the answer."""

    text: str
    tokens: tuple[PlacedToken, ...]
    """The tokens whose text is given out by now; an end token has no text and comes with the last piece."""
    finish_reason: FinishReason = ""
    """Set in the last piece: stop for an end token or a stop string, length for no more room."""
    num_new: int = 1
    """Tokens that the model gave for it: 1, or 0 in a last piece that only says that there is no more room."""


def detokenize(
    tokens: Iterable[Token], codec: TextCodec, *, stops: Sequence[str] = (), end_ids: Iterable[int] = ()
) -> Iterator[Piece]:
    """An answer in pieces, one per token and one at the end; closes `tokens` where a stop string is found.

    Tokens that begin at or behind a stop string are left out, as the string itself is.
    """
    writer, stop, ends = incremental_decoder(codec), StopStrings(stops), frozenset(end_ids)
    waiting: list[PlacedToken] = []
    seen = sent = 0  # Characters written, and given out.
    for token in tokens:
        waiting.append(PlacedToken(token, seen))
        if token.id in ends:
            ready = stop.add(writer.end()) + stop.end()
            last = _before(waiting, sent + len(ready)) if stop.found else waiting
            yield Piece(ready, tuple(last), "stop")
            return
        new = writer.add(token.id)
        seen += len(new)
        ready = stop.add(new)
        sent += len(ready)
        released = _before(waiting, sent)
        del waiting[: len(released)]
        yield Piece(ready, tuple(released), "stop" if stop.found else "")
        if stop.found:
            return
    ready = stop.add(writer.end()) + stop.end()
    last = _before(waiting, sent + len(ready)) if stop.found else waiting
    yield Piece(ready, tuple(last), "stop" if stop.found else "length", 0)


def _before(tokens: Sequence[PlacedToken], end: int) -> list[PlacedToken]:
    """The leading tokens that begin before character number `end`."""
    return [placed for placed in tokens if placed.start < end]


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string` without being all of it."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)
