"""A large model behind an API as a logit source: texts in, log-probabilities of the likeliest tokens out.

An API has no cache to roll back and is asked for whole texts, so what stands in the cache is the text itself.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kilofed.errors import ModelError, RemoteError
from kilofed.generation.decoding import UNBOUNDED
from kilofed.generation.detokenizer import TextCodec
from kilofed.proxy.api import Api, Json
from kilofed.proxy.api_cache import LogprobCache, TopLogprobs, prefix_keys
from kilofed.proxy.logit_sources import ForwardInputs
from kilofed.proxy.spec import LargeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RemoteModel:
    """The `large` of a ProxyModel that is reached through an API.

    Args:
        spec: where it is and what may be asked.
        tokenizer: the small model's; the API's must be the same, which cannot be looked into and is taken on trust
            but for what comes back: names of unknown tokens and echoes of another length are refused.
        folder: gets `remote.jsonl` (the ledger) and `remote.sqlite` (the scores); None keeps both in memory.

    Raises:
        RunError: the folder cannot be written.
    """

    copies = 1

    def __init__(
        self,
        spec: LargeSpec,
        tokenizer: "PreTrainedTokenizerBase",
        folder: Path | None = None,
    ) -> None:
        self.spec = spec
        self.width = max(tokenizer.get_vocab().values()) + 1
        # One token of the context is the one that is asked for.
        self.context = spec.context - 1 if spec.context else UNBOUNDED
        self.has_all_logits = False
        self.checks_several = spec.scoring == "echo"
        """Whether one request scores several positions, which speculation needs."""
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self.api = Api(spec, folder / "remote.jsonl" if folder else None)
        self._cache = LogprobCache(folder / "remote.sqlite" if folder else None)
        self._tokenizer = tokenizer
        self._names = _names(tokenizer, self.width) if spec.names == "text" else {}

    def new_cache(self) -> Cache:
        """An empty text per row: ids stand where a model keeps keys, the mask where it keeps values."""
        return Cache(layers=[DynamicLayer()])  # type: ignore[no-untyped-call]

    def logits(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, ...]:
        """See LogitSource: log-probabilities (B, K, width), -inf where the API gave none, 0 at padding.

        Raises:
            RemoteError, BudgetSpent: see Api. What was answered before is kept.
        """
        ids_BT, mask_BT = self._whole(inputs, cache)
        first = ids_BT.shape[1] - inputs.input_ids.shape[1]
        places = torch.arange(first, ids_BT.shape[1])
        if isinstance(inputs.keep, Tensor):
            places = places[inputs.keep.cpu()]
        elif inputs.keep:
            places = places[-inputs.keep :]
        counts_BT = mask_BT.cumsum(1)
        texts = [row[keep.bool()].tolist() for row, keep in zip(ids_BT, mask_BT, strict=True)]
        wanted = [
            [int(counts[p]) if keep[p] else 0 for p in places.tolist()]
            for counts, keep in zip(counts_BT, mask_BT, strict=True)
        ]
        scores = self.top_logprobs(texts, wanted)
        out = torch.full((len(texts), len(places), self.width), -torch.inf)
        for row, lengths in enumerate(wanted):
            for place, length in enumerate(lengths):
                if length == 0:
                    out[row, place] = 0.0
                    continue
                one = scores[row][length]
                out[row, place, torch.from_numpy(one.ids.astype(np.int64))] = torch.from_numpy(one.logprobs.copy())
        return (out,)

    def top_logprobs(
        self, texts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]
    ) -> list[dict[int, TopLogprobs]]:
        """What the large model says after the first `n` tokens of each text, for the n in `lengths`; 0 is left out.

        Raises:
            RemoteError, BudgetSpent: see Api.
        """
        keys = [prefix_keys(self.spec.name, self.spec.top_k, text) for text in texts]
        wanted = [sorted({n for n in row if n}) for row in lengths]
        known = self._cache.get([keys[row][n - 1] for row, some in enumerate(wanted) for n in some])
        missing = [[n for n in some if keys[row][n - 1] not in known] for row, some in enumerate(wanted)]
        steps: dict[tuple[int, ...], None] = {}
        whole: dict[tuple[int, ...], None] = {}
        for row, some in enumerate(missing):
            if len(some) > 1 and self.checks_several:
                whole[tuple(texts[row][: some[-1]])] = None
            else:
                steps.update({tuple(texts[row][:n]): None for n in some})
        for prompts, echo in ((list(steps), False), (list(whole), True)):
            for start in range(0, len(prompts), self.spec.batch_size):
                known |= self._ask(prompts[start : start + self.spec.batch_size], echo=echo)
        return [{n: known[keys[row][n - 1]] for n in some} for row, some in enumerate(wanted)]

    def close(self) -> None:
        """End connections and close the file of scores."""
        self.api.close()
        self._cache.close()

    def _ask(self, prompts: Sequence[tuple[int, ...]], *, echo: bool) -> dict[bytes, TopLogprobs]:
        """Send prompts, keep and give what came, by key."""
        sent = [self._text(prompt) for prompt in prompts] if self.spec.prompts == "text" else prompts
        answers = self.api.complete(sent, sum(map(len, prompts)), echo=echo)
        found: dict[bytes, TopLogprobs] = {}
        for prompt, answer in zip(prompts, answers, strict=True):
            keys = prefix_keys(self.spec.name, self.spec.top_k, prompt)
            tops = self._read_positions(answer, len(prompt), echo=echo)
            found |= dict(zip(keys[len(keys) - len(tops) :], tops, strict=True))
        self._cache.put(found)
        return found

    def _read_positions(self, answer: Json, length: int, *, echo: bool) -> list[TopLogprobs]:
        """The scores of the positions after 1 ... `length` tokens, or of the last alone."""
        tops = answer["top_logprobs"]
        if not isinstance(tops, list):
            raise RemoteError(f"{self.spec.path} answers with log-probabilities in another form than OpenAI's")
        if not echo:
            return [self._read_position(tops[0])]
        if len(tops) != length + 1:
            raise RemoteError(
                f"{self.spec.path} was sent {length} tokens to echo and scored {len(tops) - 1}: its tokeniser differs, "
                "or it does not echo; for the latter set scoring to steps"
            )
        return [self._read_position(top) for top in tops[1:]]

    def _read_position(self, top: object) -> TopLogprobs:
        if not isinstance(top, Mapping) or not top:
            raise RemoteError(f"{self.spec.path} left log-probabilities out at a position that was asked for")
        ids, logprobs = [], []
        for name, logprob in top.items():
            number = self._id(str(name))
            if number is not None and isinstance(logprob, int | float) and math.isfinite(logprob):
                ids.append(number)
                logprobs.append(min(float(logprob), 0.0))
        if not ids:
            raise RemoteError(
                f"{self.spec.path} names tokens that the small model's tokeniser does not know, such as "
                f"{next(iter(top))!r}: the models need the same tokeniser"
            )
        # Some APIs return the sampled token too, likely or not; what is kept are the likeliest, whatever came.
        order = np.argsort(-np.array(logprobs), kind="stable")[: self.spec.top_k]
        return TopLogprobs(np.array(ids, np.int32)[order], np.array(logprobs, np.float32)[order])

    def _id(self, name: str) -> int | None:
        if self.spec.names == "text":
            return self._names.get(name)
        found = re.fullmatch(r"token_id:(\d+)", name)
        if not found:
            raise RemoteError(f"{self.spec.path} names tokens by text ({name!r}), not as token_id: set names to text")
        if int(found[1]) >= self.width:
            raise RemoteError(
                f"{self.spec.path} names token {found[1]}, and the small model's tokeniser has {self.width}: "
                "the models need the same tokeniser"
            )
        return int(found[1])

    def _text(self, ids: Sequence[int]) -> str:
        """The prompt as text; ModelError where it would not come back as these tokens."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if list(self._tokenizer.encode(text, add_special_tokens=False)) != list(ids):
            raise ModelError("a prompt does not survive as text: set prompts to ids, if the API takes them")
        return text

    def _whole(self, inputs: ForwardInputs, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Ids and mask of all that was read, (B, P + T) each."""
        ids = inputs.input_ids.cpu()
        past = cache.get_seq_length() if cache is not None else 0
        mask = (
            inputs.attention_mask.cpu()
            if inputs.attention_mask is not None
            else torch.ones(len(ids), past + ids.shape[1])
        )
        mask = mask[:, past:].long()
        if cache is None:
            return ids, mask
        whole, kept = cache.update(ids[:, None, :, None], mask[:, None, :, None], 0)
        return whole[:, 0, :, 0].long(), kept[:, 0, :, 0].long()


def _names(tokenizer: "PreTrainedTokenizerBase", width: int) -> dict[str, int]:
    """Token by its text; texts that several tokens share are left out, and those tokens count as unseen."""
    codec = TextCodec(tokenizer)
    found: dict[str, int] = {}
    shared: set[str] = set()
    for number in range(width):
        name = codec.name(number)
        if name in found:
            shared.add(name)
        found[name] = number
    return {name: number for name, number in found.items() if name not in shared and name}
