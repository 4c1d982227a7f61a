"""Evaluation on held-out rows: loss, accuracy, perplexity, ROUGE-L, exact match, macro-F1 and intervals."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kilofed.config.recipe import EvaluateSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.models import loading
from kilofed.models.training import class_logits, collate_classes, collate_tokens, token_losses
from kilofed.records.results import ClientScore, ScoreRow


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one client's held-out rows."""

    loss: float
    """Mean over response tokens, nats; over rows in classification."""
    accuracy: float
    """Top-1 accuracy over response tokens; over rows in classification."""
    num_tokens: int
    """Number of response tokens; of rows in classification."""
    rouge_l: float | None = None
    """Mean ROUGE-L F of greedy answers, best over references, with stemming (rouge-score)."""
    exact_match: float | None = None
    """Share of greedy answers that equal a reference up to case and surrounding white space."""
    macro_f1: float | None = None
    """Mean F1 over the classes that occur as labels or predictions; None for language models."""

    @property
    def perplexity(self) -> float | None:
        """exp(loss) per token; None in classification."""
        return math.exp(min(self.loss, 700.0)) if self.macro_f1 is None else None


def score(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Scores:
    """Loss and accuracy over target tokens, or over rows that have classes; independent of the order of `examples`."""
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda e: (len(e.input_ids), e.input_ids))
    if ordered and ordered[0].label is not None:
        return _score_classes(model, ordered, batch_size)
    total, num_correct, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            losses, correct = token_losses(model, collate_tokens(ordered[start : start + batch_size], device))
            total += float(losses.double().sum())
            num_correct += int(correct.sum())
            tokens += len(losses)
    return Scores(total / max(tokens, 1), num_correct / max(tokens, 1), tokens)


def _score_classes(model: nn.Module, examples: Sequence[Example], batch_size: int) -> Scores:
    device = next(model.parameters()).device
    total, pairs = 0.0, Counter[tuple[int, int]]()
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            batch = collate_classes(examples[start : start + batch_size], device)
            logits_BC = class_logits(model, batch)
            losses = nn.functional.cross_entropy(logits_BC, batch.classes, reduction="none", ignore_index=IGNORED)
            total += float(losses.double().sum())
            pairs.update(zip(batch.classes.tolist(), logits_BC.argmax(-1).tolist(), strict=True))
    pairs = Counter({(true, prediction): n for (true, prediction), n in pairs.items() if true != IGNORED})
    rows, num_correct = (
        pairs.total(),
        sum(number for (true, prediction), number in pairs.items() if true == prediction),
    )
    return Scores(total / max(rows, 1), num_correct / max(rows, 1), rows, macro_f1=macro_f1(pairs))


def macro_f1(pairs: Counter[tuple[int, int]]) -> float:
    """Mean F1 over classes, 0 to 1.

    Args:
        pairs: number of rows by (class, prediction); classes that occur as neither are left out of the mean.
    """
    labels, predictions = Counter[int](), Counter[int]()
    for (true, prediction), number in pairs.items():
        labels[true] += number
        predictions[prediction] += number
    classes = sorted(labels.keys() | predictions.keys())
    return statistics.fmean(2 * pairs[c, c] / (labels[c] + predictions[c]) for c in classes) if classes else 0.0


def answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Greedy continuations of `prompts` (token ids), padded on the left into one batch."""
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with torch.inference_mode(), loading.quiet():  # It warns of lengths in the model's own generation config.
        out = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    return [str(text) for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def score_all(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], spec: EvaluateSpec
) -> Scores:
    """`score` with ROUGE-L and exact match of greedy answers to the first `spec.generate` rows that have references."""
    scores = score(model, examples, spec.batch_size)
    with_references = [e for e in examples if e.references and e.prompt_ids][: spec.generate]
    if not with_references:
        return scores
    answers = answer(model, tokenizer, [e.prompt_ids for e in with_references], spec.max_new_tokens)
    rouge = statistics.fmean(rouge_l(a, e.references) for a, e in zip(answers, with_references, strict=True))
    exact = statistics.fmean(exact_match(a, e.references) for a, e in zip(answers, with_references, strict=True))
    return Scores(scores.loss, scores.accuracy, scores.num_tokens, rouge, float(exact))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F over references, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in references)


def exact_match(text: str, references: Sequence[str]) -> bool:
    """Whether `text` equals a reference up to case and surrounding white space."""
    return text.strip().casefold() in {reference.strip().casefold() for reference in references}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def summarise(clients: Sequence[Scores], ids: Sequence[int]) -> ScoreRow:
    """One row of the results: means over clients, the 95 % interval of the loss, and each client's scores by id."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    loss = mean(s.loss for s in clients)
    written = loss is not None and any(s.perplexity is not None for s in clients)
    return ScoreRow(
        loss=loss,
        accuracy=mean(s.accuracy for s in clients),
        perplexity=math.exp(min(loss, 700.0)) if loss is not None and written else None,
        rouge_l=mean(s.rouge_l for s in clients),
        exact_match=mean(s.exact_match for s in clients),
        macro_f1=mean(s.macro_f1 for s in clients),
        interval=interval([s.loss for s in clients]),
        clients=tuple(
            ClientScore(client, **asdict(s), perplexity=s.perplexity) for client, s in zip(ids, clients, strict=True)
        ),
    )
