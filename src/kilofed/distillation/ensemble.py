"""What several models say of the same rows: scored, kept to few words, averaged, taught to another model.

Shapes: N positions, V words or classes, K words kept of a position, B = V or K + 1 buckets. Log-probabilities are taken
at one temperature that all share; a mean of them, made to sum to 1 again, is the softmax of the mean logits (FedMD, Li
and Wang 2019, arXiv:1910.03581), so nothing but log-probabilities need travel.

Top-k: the words of a position are chosen by one party for all, so that replies are dense and can be averaged. The mass
of all other words is one more bucket. With K = V there is no such bucket, and nothing is lost.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kilofed.config.recipe import TrainSpec
from kilofed.data.examples import IGNORED, Example
from kilofed.distillation import losses
from kilofed.models import training

Wire = Literal["float32", "float16", "int8"]
Weighting = Literal["uniform", "confidence", "entropy"]

RANGE = 16.0
"""Nats that int8 codes span: a log-probability below -RANGE counts as that."""
STEP = RANGE / 254
LEAST_COUNT = 1e-3
"""Where noise leaves less weight than this, nobody is taken to have scored."""


@dataclass(frozen=True)
class Scores:
    """What one model says."""

    log_probs_NB: Tensor
    """Log-probabilities of the words kept, then of all others together; of all words where `words_NK` is None."""
    words_NK: Tensor | None
    num_words: int
    """V."""
    weights_N: Tensor
    """How much the model counts at each position, 0 to 1."""


def num_positions(rows: Sequence[Example]) -> list[int]:
    """How many positions each row has: one where rows are classified, else one per token that is learnt."""
    return [1 if row.label is not None else sum(label != IGNORED for label in row.labels[1:]) for row in rows]


def logits_of(model: nn.Module, batch: training.Batch) -> Tensor:
    """Logits (N, V) at the positions of a batch, row by row; the labels of rows to classify are not looked at."""
    if isinstance(batch, training.TokenBatch):
        return training.token_logits(model, batch)[0]
    return training.class_logits(model, batch)


def width(model: nn.Module, rows: Sequence[Example]) -> int:
    """V: how many words or classes the model scores."""
    config, head = model.config, getattr(model, "get_output_embeddings", None)
    if rows[0].label is not None:
        return int(config.num_labels)  # type: ignore[union-attr,arg-type]
    output = head() if head else None
    return int(config.vocab_size if output is None else output.weight.shape[0])  # type: ignore[union-attr,arg-type]


def choose(model: nn.Module, rows: Sequence[Example], k: int, batch_size: int) -> Tensor:
    """The words (N, K) that all models score: the model's `k` best at each position, the row's own next token first."""
    found = []
    for batch, logits_NV in _forward(model, rows, batch_size):
        if isinstance(batch, training.TokenBatch):
            logits_NV.scatter_(1, batch.targets_N[:, None], math.inf)
        found.append(logits_NV.topk(min(k, logits_NV.shape[1]), dim=1).indices.cpu())
    return torch.cat(found)


def score(
    model: nn.Module,
    rows: Sequence[Example],
    words_NK: Tensor | None,
    *,
    temperature: float,
    batch_size: int,
    weighting: Weighting = "uniform",
) -> Scores:
    """What `model` says of `rows`, at all words or at those chosen.

    Args:
        weighting: uniform counts 1; confidence the probability of the best word; entropy 1 - H / ln V.
    """
    log_probs, weights, start, num_words = [], [], 0, 0
    for _, logits_NV in _forward(model, rows, batch_size):
        words = None if words_NK is None else words_NK[start : start + len(logits_NV)].to(logits_NV.device)
        log_probs.append(kept((logits_NV / temperature).log_softmax(1), words).cpu())
        weights.append(_weights(logits_NV, weighting).cpu())
        start, num_words = start + len(logits_NV), logits_NV.shape[1]
    return Scores(torch.cat(log_probs), words_NK, num_words, torch.cat(weights))


def encode(log_probs_NB: Tensor, wire: Wire) -> Tensor:
    """Log-probabilities as they travel; int8 has one fixed scale, so that a mean of codes is the code of the mean."""
    clamped = log_probs_NB.clamp(min=losses.LEAST if wire != "int8" else -RANGE, max=0)
    if wire == "int8":
        return (clamped / STEP + 127).round().to(torch.int8)
    return clamped.to(torch.float16 if wire == "float16" else torch.float32)


def decode(sent_NB: Tensor, wire: Wire) -> Tensor:
    """The log-probabilities that were sent, or their mean, float64."""
    return (sent_NB.double() - 127) * STEP if wire == "int8" else sent_NB.double()


def share(guide_NB: Tensor, own: Scores) -> Tensor:
    """One client's part of the sum: its log-probabilities, drawn to the guide's where it counts less than 1.

    The mean of these and of `weights_N` give `ensemble` the weighted mean, whoever scored what.
    """
    log_probs_NB = own.log_probs_NB.double().clamp(min=losses.LEAST)
    return torch.lerp(guide_NB, log_probs_NB, own.weights_N.double()[:, None])


def ensemble(guide_NB: Tensor, mean_NB: Tensor, counts_N: Tensor | None) -> Tensor:
    """The weighted mean of those who scored, as log-probabilities that sum to 1; the guide where nobody did.

    Args:
        guide_NB: what all were sent, float64.
        mean_NB: mean of `share` over clients.
        counts_N: mean of their weights; None where all are 1.
    """
    if counts_N is not None:
        counts_N1 = counts_N.double()[:, None]
        moved_NB = guide_NB + (mean_NB - guide_NB) / counts_N1.clamp(min=LEAST_COUNT)
        mean_NB = torch.where(counts_N1 > LEAST_COUNT, moved_NB, guide_NB)
    return mean_NB.clamp(min=losses.LEAST, max=-losses.LEAST).log_softmax(1)


def fit(
    model: nn.Module,
    rows: Sequence[Example],
    teacher: Scores,
    spec: TrainSpec,
    *,
    temperature: float,
    direction: losses.Direction,
    generator: torch.Generator,
) -> training.Fit:
    """Teach `model` what `teacher` says of `rows`, `spec.steps` batches of rows long.

    Raises:
        NonFiniteLoss, ModelError: as in `train.fit` and `distill.forward_kl`.
    """
    ends = torch.tensor([0, *num_positions(rows)]).cumsum(0).tolist()
    in_hand: list[int] = []  # Which rows the batch has that `train.fit` is at.

    def stretch() -> Iterator[list[Example]]:
        for numbers in walk(len(rows), spec, generator):
            in_hand[:] = numbers
            yield [rows[i] for i in numbers]

    def objective(model: nn.Module, batch: training.Batch) -> Tensor:
        at = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in in_hand])
        student_NV = logits_of(model, batch)
        said = _teacher(teacher, at, temperature, student_NV.device)
        return losses.KL[direction](said, student_NV, temperature).mean()

    whole = replace(spec, epochs=0, accumulation=1, schedule="constant", warmup=0.0)
    return training.fit(model, stretch(), whole, first=0, total=spec.steps, dropout=generator, objective=objective)


def walk(num_rows: int, spec: TrainSpec, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers of the rows of each batch; each row once before any comes again."""
    waiting: list[int] = []
    for _ in range(spec.steps):
        waiting = waiting or torch.randperm(num_rows, generator=generator).tolist()
        batch, waiting = waiting[: spec.batch_size], waiting[spec.batch_size :]
        yield batch


def _teacher(teacher: Scores, at: Tensor, temperature: float, device: torch.device) -> Tensor | losses.TopK:
    log_probs_NB = teacher.log_probs_NB[at].float().to(device)
    if teacher.words_NK is None:
        return log_probs_NB * temperature  # Logits whose softmax at this temperature it is.
    kept, rest = log_probs_NB[:, :-1], log_probs_NB[:, -1]
    return losses.TopK(teacher.words_NK[at].to(device), kept, rest, teacher.num_words, temperature)


def _forward(model: nn.Module, rows: Sequence[Example], batch_size: int) -> Iterator[tuple[training.Batch, Tensor]]:
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = training.collate(rows[start : start + batch_size], device)
            yield batch, logits_of(model, batch)


def kept(log_probs_NV: Tensor, words_NK: Tensor | None) -> Tensor:
    """Log-probabilities of the chosen words and of all others together."""
    if words_NK is None:
        return log_probs_NV
    others_N = log_probs_NV.scatter(1, words_NK, -math.inf).logsumexp(1)
    return torch.cat([log_probs_NV.gather(1, words_NK), others_N[:, None]], 1)


def _weights(logits_NV: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "uniform":
        return torch.ones(len(logits_NV))
    if weighting == "confidence":
        return logits_NV.softmax(1).amax(1)
    return (1 - losses.entropy(logits_NV) / math.log(logits_NV.shape[1])).clamp(0, 1)
