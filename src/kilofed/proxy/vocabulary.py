"""Whether two tokenisers are one: models can be added token by token only where a token id means the same to both."""

import json

from transformers import PreTrainedTokenizerBase

from kilofed.errors import ModelError


def common_vocabulary(large: PreTrainedTokenizerBase, small: PreTrainedTokenizerBase) -> int:
    """How many token ids the two tokenisers share: the real vocabulary, without the rows that models pad to.

    Compared by content: every token and its id, added tokens too, and what turns text into tokens (merges,
    normaliser, pre-tokeniser) where the tokenisers let one look.

    Returns:
        One more than the largest id that is a token. Models are cut to this width before they are combined, so no
        padding row is ever given probability.

    Raises:
        ModelError: they differ; the message names the first token that does.
    """
    ours, theirs = small.get_vocab(), large.get_vocab()
    if ours != theirs:
        raise ModelError(f"{_difference(theirs, ours)}: give a large and a small model with the same tokeniser")
    if _rules(large) != _rules(small):
        raise ModelError(
            "the large and the small model have the same tokens but split text differently (merges, normaliser or "
            "pre-tokeniser): give a large and a small model with the same tokeniser"
        )
    return max(ours.values()) + 1


def common_width(widths: dict[str, int], vocabulary: int | None) -> int:
    """The width that logits are cut to: `vocabulary`, else the one width that all models have.

    Args:
        widths: model's name to the width of its logits.
        vocabulary: what `common_vocabulary` gave, if the tokenisers were at hand.

    Raises:
        ModelError: a model is narrower than the vocabulary, or the widths differ and nobody said what is padding.
    """
    if vocabulary is None:
        if len(set(widths.values())) > 1:
            seen = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ModelError(f"the models' vocabularies have different widths ({seen}): say how many tokens are real")
        return next(iter(widths.values()))
    for name, width in widths.items():
        if width < vocabulary:
            raise ModelError(f"the tokeniser has {vocabulary} tokens, but the {name} model knows {width}: wrong pair?")
    return vocabulary


def _difference(large: dict[str, int], small: dict[str, int]) -> str:
    if len(large) != len(small):
        return f"the large model's tokeniser has {len(large)} tokens and the small one's {len(small)}"
    token = min(t for t in large.keys() | small.keys() if large.get(t) != small.get(t))
    seen = [
        f"{who} {'does not know it' if (at := known.get(token)) is None else f'has it at {at}'}"
        for who, known in (("the large model", large), ("the small one", small))
    ]
    return f"the tokenisers differ at {token!r} ({', '.join(seen)})"


def _rules(tokenizer: PreTrainedTokenizerBase) -> object:
    """What turns text into tokens, for comparison; None where it cannot be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    whole = json.loads(backend.to_str())
    model = {name: value for name, value in whole["model"].items() if name != "vocab"}
    return model, whole.get("normalizer"), whole.get("pre_tokenizer")
