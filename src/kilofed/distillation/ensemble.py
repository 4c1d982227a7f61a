"""Ensemble distillation: several models score the same rows; the mean of their log-probabilities teaches one model.

Shapes: N positions, V tokens or classes, K tokens kept of a position, B = V or K + 1 buckets. All log-probabilities are
at one temperature; their mean, renormalized, is the softmax of the mean logits (FedMD, Li and Wang 2019,
arXiv:1910.03581), so only log-probabilities are sent.

Top-k: one party chooses the tokens of a position for all, so that replies are dense and can be averaged. The probability
of all other tokens is one more bucket. With K = V there is no such bucket, and nothing is lost.
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
from kilofed.errors import PayloadError
from kilofed.models import training

Wire = Literal["float32", "float16", "int8"]
Weighting = Literal["uniform", "confidence", "entropy"]

RANGE = 16.0
"""Nats that int8 codes span; log-probabilities below -RANGE are clamped."""
STEP = RANGE / 254
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
MIN_WEIGHT = 1e-3
"""Positions whose mean weight is below this, which noise can cause, count as scored by no client."""


@dataclass(frozen=True)
class Scores:
    """One model's log-probabilities at N positions."""

    log_probs_NB: Tensor
    """Log-probabilities of `tokens_NK`, then of all others together; of all V where `tokens_NK` is None."""
    tokens_NK: Tensor | None
    num_outputs: int
    """V."""
    weights_N: Tensor
    """The model's weight at each position, 0 to 1."""


def num_positions(rows: Sequence[Example]) -> list[int]:
    """Positions of each row: 1 in classification, else the number of target tokens."""
    return [1 if row.label is not None else sum(label != IGNORED for label in row.labels[1:]) for row in rows]


def logits_of(model: nn.Module, batch: training.Batch) -> Tensor:
    """Logits (N, V) at the positions of a batch, row by row; class labels are not used."""
    if isinstance(batch, training.TokenBatch):
        return training.token_logits(model, batch)[0]
    return training.class_logits(model, batch)


def num_outputs_of(model: nn.Module, rows: Sequence[Example]) -> int:
    """V: the size of the model's output layer, tokens or classes."""
    config, head = model.config, getattr(model, "get_output_embeddings", None)
    if rows[0].label is not None:
        return int(config.num_labels)  # type: ignore[union-attr,arg-type]
    output = head() if head else None
    return int(config.vocab_size if output is None else output.weight.shape[0])  # type: ignore[union-attr,arg-type]


def choose_tokens(model: nn.Module, rows: Sequence[Example], k: int, batch_size: int) -> Tensor:
    """The tokens (N, K) that all models score: at each position the target, then the model's most probable ones."""
    chosen = []
    for batch, logits_NV in _forward(model, rows, batch_size):
        if isinstance(batch, training.TokenBatch):
            logits_NV.scatter_(1, batch.targets_N[:, None], math.inf)
        chosen.append(logits_NV.topk(min(k, logits_NV.shape[1]), dim=1).indices.cpu())
    return torch.cat(chosen)


def score(
    model: nn.Module,
    rows: Sequence[Example],
    tokens_NK: Tensor | None,
    *,
    temperature: float,
    batch_size: int,
    weighting: Weighting = "uniform",
) -> Scores:
    """Score `rows` with `model`, over all outputs or `tokens_NK` and the rest.

    Args:
        weighting: uniform is 1; confidence is the largest probability; entropy is 1 - H / ln V.
    """
    log_probs, weights, start, num_outputs = [], [], 0, 0
    for _, logits_NV in _forward(model, rows, batch_size):
        tokens = None if tokens_NK is None else tokens_NK[start : start + len(logits_NV)].to(logits_NV.device)
        log_probs.append(to_buckets((logits_NV / temperature).log_softmax(1), tokens).cpu())
        weights.append(_weights(logits_NV, weighting).cpu())
        start, num_outputs = start + len(logits_NV), logits_NV.shape[1]
    return Scores(torch.cat(log_probs), tokens_NK, num_outputs, torch.cat(weights))


def encode(log_probs_NB: Tensor, wire: Wire) -> Tensor:
    """Encode log-probabilities; int8 has one fixed scale, so that the mean of codes is the code of the mean."""
    clamped = log_probs_NB.clamp(min=losses.MIN_LOG_PROB if wire != "int8" else -RANGE, max=0)
    if wire == "int8":
        return (clamped / STEP + 127).round().to(_DTYPES[wire])
    return clamped.to(_DTYPES[wire])


def decode(sent_NB: Tensor, wire: Wire) -> Tensor:
    """Decode log-probabilities, or a mean of encoded ones, to float64."""
    return (sent_NB.double() - 127) * STEP if wire == "int8" else sent_NB.double()


def read(sent_NB: Tensor | None, wire: Wire, shape: tuple[int, int]) -> Tensor:
    """Decode a message of `encode`, (N, B), to float64.

    Raises:
        PayloadError: it is missing, of another dtype or shape, or has numbers that `encode` does not write.
    """
    dtype = _DTYPES[wire]
    if sent_NB is None or sent_NB.dtype != dtype or sent_NB.shape != shape:
        got = "none" if sent_NB is None else f"{sent_NB.dtype} {tuple(sent_NB.shape)}"
        raise PayloadError(f"the message has log-probabilities of {got}; expected {dtype} {shape}")
    least, most = (-127, 127) if wire == "int8" else (losses.MIN_LOG_PROB, 0)
    # NaN is neither.
    if sent_NB.numel() and not (float(sent_NB.min()) >= least and float(sent_NB.max()) <= most):
        raise PayloadError(
            f"the message has log-probabilities from {float(sent_NB.min()):g} to {float(sent_NB.max()):g}; "
            f"expected {least:g} to {most:g}"
        )
    return decode(sent_NB, wire)


def read_tokens(sent_NK: Tensor | None, shape: tuple[int, int], num_outputs: int) -> Tensor:
    """The tokens (N, K) of a message, int64.

    Raises:
        PayloadError: they are missing, of another dtype or shape, not in the vocabulary, or not distinct at a position.
    """
    if sent_NK is None or sent_NK.shape != shape:
        got = "none" if sent_NK is None else f"shape {tuple(sent_NK.shape)}"
        raise PayloadError(f"the message has tokens of {got}; expected {shape}")
    try:
        losses.check_tokens(sent_NK, num_outputs)
    except ValueError as error:
        raise PayloadError(f"the message's {error}") from error
    return sent_NK.long()


def contribution(global_NB: Tensor, own: Scores) -> Tensor:
    """One client's term of the mean: its log-probabilities, interpolated to the global ones where its weight is below 1.

    From the means of these and of `weights_N`, `ensemble` computes the weighted mean at each position.
    """
    log_probs_NB = own.log_probs_NB.double().clamp(min=losses.MIN_LOG_PROB)
    return torch.lerp(global_NB, log_probs_NB, own.weights_N.double()[:, None])


def ensemble(global_NB: Tensor, mean_NB: Tensor, weights_N: Tensor | None) -> Tensor:
    """The clients' weighted mean as normalized log-probabilities; the global model's where no client scored.

    Args:
        global_NB: the global model's log-probabilities, float64.
        mean_NB: mean of `contribution` over clients.
        weights_N: mean of the clients' weights; None if all are 1.
    """
    if weights_N is not None:
        weights_N1 = weights_N.double()[:, None]
        weighted_NB = global_NB + (mean_NB - global_NB) / weights_N1.clamp(min=MIN_WEIGHT)
        mean_NB = torch.where(weights_N1 > MIN_WEIGHT, weighted_NB, global_NB)
    return mean_NB.clamp(min=losses.MIN_LOG_PROB, max=-losses.MIN_LOG_PROB).log_softmax(1)


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
    """Train `model` to match `teacher` on `rows` for `spec.steps` batches.

    Raises:
        NonFiniteLoss, ModelError: as in `training.fit` and `losses.forward_kl`.
    """
    ends = torch.tensor([0, *num_positions(rows)]).cumsum(0).tolist()
    current: list[int] = []  # Numbers of the rows of the batch that `training.fit` is at.

    def batches() -> Iterator[list[Example]]:
        for numbers in row_batches(len(rows), spec, generator):
            current[:] = numbers
            yield [rows[i] for i in numbers]

    def objective(model: nn.Module, batch: training.Batch) -> Tensor:
        at = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in current])
        student_NV = logits_of(model, batch)
        targets = _teacher(teacher, at, temperature, student_NV.device)
        return losses.KL[direction](targets, student_NV, temperature).mean()

    distillation = replace(spec, epochs=0, accumulation=1, schedule="constant", warmup=0.0)
    return training.fit(
        model, batches(), distillation, first=0, total=spec.steps, dropout=generator, objective=objective
    )


def row_batches(num_rows: int, spec: TrainSpec, generator: torch.Generator) -> Iterator[list[int]]:
    """Row numbers of each batch: shuffled epochs, the last batch of an epoch may be short."""
    remaining: list[int] = []
    for _ in range(spec.steps):
        remaining = remaining or torch.randperm(num_rows, generator=generator).tolist()
        batch, remaining = remaining[: spec.batch_size], remaining[spec.batch_size :]
        yield batch


def _teacher(teacher: Scores, at: Tensor, temperature: float, device: torch.device) -> Tensor | losses.TopK:
    log_probs_NB = teacher.log_probs_NB[at].float().to(device)
    if teacher.tokens_NK is None:
        return log_probs_NB * temperature  # Logits whose softmax at this temperature are these probabilities.
    top_NK, rest_N = log_probs_NB[:, :-1], log_probs_NB[:, -1]
    return losses.TopK(teacher.tokens_NK[at].to(device), top_NK, rest_N, teacher.num_outputs, temperature)


def _forward(model: nn.Module, rows: Sequence[Example], batch_size: int) -> Iterator[tuple[training.Batch, Tensor]]:
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = training.collate(rows[start : start + batch_size], device)
            yield batch, logits_of(model, batch)


def to_buckets(log_probs_NV: Tensor, tokens_NK: Tensor | None) -> Tensor:
    """Log-probabilities of the chosen tokens, then of all others together."""
    if tokens_NK is None:
        return log_probs_NV
    others_N = log_probs_NV.scatter(1, tokens_NK, -math.inf).logsumexp(1)
    return torch.cat([log_probs_NV.gather(1, tokens_NK), others_N[:, None]], 1)


def _weights(logits_NV: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "uniform":
        return torch.ones(len(logits_NV))
    if weighting == "confidence":
        return logits_NV.softmax(1).amax(1)
    return (1 - losses.entropy(logits_NV) / math.log(logits_NV.shape[1])).clamp(0, 1)
