"""FedPT: clients tune a small model together, which steers a black-box large model (Gao et al. 2024, arXiv:2410.00362).

Each round is FedAvg of the small model; then the server distils from the large model, steered by what the small one
learnt, back into the small one. What the paper leaves open is decided here: the teacher is large + alpha (tuned - base)
with the average *before* distillation as `tuned` and the small model before any tuning as `base` in every round; it
teaches on public rows of the server; a distillation after which the small model does worse on public rows that were
held out is thrown away. What is delivered is the steered large model.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt, Interval, IsFinite
from torch import nn

from kilofed.config.fields import FormerName
from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import Example
from kilofed.distillation import teacher_cache
from kilofed.distillation.passes import Distilled
from kilofed.errors import NonFiniteLoss, RecipeError
from kilofed.federation import wire
from kilofed.federation.cohort import Cohort
from kilofed.federation.parties import Server, generator
from kilofed.federation.presentation import Diagnosis, Presentation
from kilofed.federation.workload import LocalTraining, Pass, RunPreview, Work, shape, shapes
from kilofed.methods.fedavg import FedAvg
from kilofed.models import evaluation, loading, training
from kilofed.payload import Scalar
from kilofed.proxy import fitting
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Difference, EntropyMix, Mix, Realign, Rule
from kilofed.proxy.large_model import LargeModel, open_large_model
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.spec import LargeSpec
from kilofed.proxy.trial import ProxyParts, Trial, run_trial, sweep
from kilofed.records.results import Chart

ALPHAS = tuple(i / 4 for i in range(9))
"""Strengths that the report draws."""
PHASES = wire.SERVER + "phases"
"""In the state: round, own loss before and after, whether it was kept; a row per server phase."""
PROXY_LOSS = wire.SERVER + "proxy_loss"
"""In the state, with a target: the steered model's loss on held-out public rows after the newest round."""

SHARE = wire.SERVER + "mix_share"
"""In the state, where a mix is fitted: the small model's share."""
NET = wire.SERVER + "mix_net."
"""In the state, where an entropy mix is fitted: tensors of the net that gives the share."""


@dataclass(frozen=True)
class FedPT(FedAvg):
    """Clients tune the small model; the server steers a large one with it, and teaches the small one in turn."""

    delivered_as: ClassVar[str] = "the large model, steered"

    large: LargeSpec = field(default_factory=LargeSpec)
    """The model that is steered, at the server only: `builtin:large`, a directory, a hub id or an API's address; its
    own fields are those of kilofed.proxy.spec.LargeSpec, such as large.name and large.top_k for an API."""
    rule: Literal["difference", "mix", "entropy_mix", "realign"] = "difference"
    """How scores become one. difference: large + alpha (tuned - base). mix: the two models' probabilities in one fitted
    share (CombLM); entropy_mix: in a share per token, by how sure both are. realign: between a reference, which is
    `large`, and the tuned model (DeRa)."""
    alpha: Annotated[float, IsFinite] = 1.0
    """Strength of the steering; 0 is the large model alone, above 1 exaggerates what the small one learnt, below 0
    steers away from it. The small model's share with rule=mix and fit_share=false."""
    fit_share: bool = True
    """With rule=mix, the small model's share is fitted on held-out public rows after each average; false takes alpha."""
    fit_epochs: Annotated[int, Ge(1)] = 10
    """Passes over the held-out public rows when entropy_mix is fitted; more fit them closer."""
    distillation: Annotated[Literal["none", "forward", "reverse"], FormerName("distil")] = "forward"
    """forward: KL(teacher || small); reverse: KL(small || teacher); none: no server phase, which is FedAvg of the small."""
    distill_every: Annotated[int, Ge(1), FormerName("every")] = 1
    """Rounds between server phases."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Softens teacher and small model alike; raising it teaches more of what is unlikely."""
    steps: Annotated[int, Ge(1)] = 10
    """Optimiser steps per server phase; more follow the teacher further."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Public rows per step."""
    lr: Annotated[float, Gt(0)] = 5e-4
    """Learning rate of AdamW in the server phase."""
    hard_label_weight: Annotated[float, Interval(ge=0, le=1), FormerName("own_answers")] = 0.0
    """Weight of the public rows' own answers in the loss; the teacher has the rest."""
    tokens: Literal["answers", "all"] = "answers"
    """Tokens of the public rows that are taught: their answers, or their prompts too."""
    top_k: Annotated[int, Ge(0)] = 64
    """Teacher scores kept per token, in float16; the other words are one bucket. 0 keeps all."""
    validation_share: Annotated[float, Interval(gt=0, lt=1), FormerName("held_out")] = 0.25
    """Share of the public rows on which a server phase is judged, never taught."""
    tolerance: Annotated[float, Ge(0)] = 0.0
    """Nats per token by which the held-out loss may rise before a distillation is thrown away."""
    target_loss: Annotated[float, Ge(0)] = 0.0
    """The run ends when the steered model's loss on held-out public rows is not above this; 0 runs all rounds."""

    def server_model(self, recipe: Recipe) -> ModelSpec:
        """The small model, as for clients; the large one is loaded beside it when the server first needs it."""
        return recipe.model

    def check(self, server: Server) -> None:
        if loading.classifies(server.model):
            raise RecipeError(
                "fedpt steers the next token of a large model, and this model gives classes to rows: set "
                "data.task=generate, or take another method"
            )
        self._check_rule()
        if self.distillation != "none" or self.target_loss or self.is_fitted:
            self.public_rows(server)

    def setup(self, server: Server) -> None:
        self.check(server)
        super().setup(server)

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        metrics = dict(super().round(server, clients))
        if self.is_fitted:
            metrics |= self._fit(server)
        if self.distillation != "none" and server.round % self.distill_every == 0:
            metrics |= self._distil(server)
        if self.target_loss:
            loss = self._loss(self.deliver(server), self.public_rows(server)[1])
            server.state[PROXY_LOSS] = torch.tensor(loss, dtype=torch.float64)
            metrics["public_proxy_loss"] = loss
        return metrics | self._asked(server)

    def done(self, server: Server) -> bool:
        return PROXY_LOSS in server.state and float(server.state[PROXY_LOSS]) <= self.target_loss

    def deliver(self, server: Server) -> ProxyModel:
        return self._large(server).steer(self.trained(server), self._base(server), self.combination(server))

    def trained(self, server: Server) -> nn.Module:
        """The small model with what the clients taught it."""
        return super().deliver(server)

    @property
    def is_fitted(self) -> bool:
        """Whether held-out public rows decide the rule's weights."""
        return self.rule == "entropy_mix" or (self.rule == "mix" and self.fit_share)

    def combination(self, server: Server) -> Rule:
        """The rule with its strength, or with the weights of the newest fit; before the first, both models count half."""
        if self.rule == "realign":
            return Realign(self.alpha)
        if self.rule == "difference":
            return Difference(self.alpha)
        if self.rule == "mix":
            return Mix(float(server.state.get(SHARE, torch.tensor(0.5))) if self.fit_share else self.alpha)
        fitted = {name.removeprefix(NET): tensor for name, tensor in server.state.items() if name.startswith(NET)}
        return EntropyMix(fitted) if fitted else Mix(0.5)

    def strengths(self) -> dict[float, Rule]:
        """The rule at the strengths that the report draws; none where a strength per token is learnt."""
        if self.rule == "mix":
            return {alpha: Mix(alpha) for alpha in ALPHAS if alpha <= 1}
        rules: dict[str, Callable[[float], Rule]] = {"difference": Difference, "realign": Realign}
        return {alpha: rules[self.rule](alpha) for alpha in ALPHAS} if self.rule in rules else {}

    def costs(self) -> "FedPTCosts":
        return FedPTCosts(self)

    def presentation(self) -> "SteeringReport":
        return SteeringReport(self)

    def trial(self, server: Server, rows: Sequence[Example], held_out: Sequence[Example]) -> Trial:
        """What a short trial of the small model says of steering; `server.model` ends as it began."""
        return run_trial(
            self.parts(server),
            rows,
            held_out,
            server.train,
            rule=lambda: self._fitted(server, server.model)[0] if self.is_fitted else self.combination(server),
            order=lambda name: _order(server, f"trial {name}"),
        )

    def _fit(self, server: Server) -> dict[str, Scalar]:
        """Fit the rule to the newest average and keep it in the state."""
        rule, weight = self._fitted(server, self.trained(server))
        if isinstance(rule, EntropyMix):
            server.state.update({NET + name: tensor for name, tensor in rule.tensors.items()})
        else:
            server.state[SHARE] = torch.tensor(weight, dtype=torch.float64)
        return {"mix_weight": weight}

    def _fitted(self, server: Server, tuned: nn.Module) -> tuple[Mix | EntropyMix, float]:
        """The rule, fitted on held-out public rows, and the small model's mean share there."""
        large = self._large(server)
        alone = large.unsteered(tuned, self._base(server), Mix(0.0))
        texts = fitting.observe(alone, tuned, self.public_rows(server)[1], large.vocabulary)
        if not texts:
            raise RecipeError(
                f"no held-out public row has an answer to fit method.rule={self.rule} on: set data.public to rows with "
                "answers, or method.rule=difference"
            )
        if self.rule == "mix":
            constant = fitting.fit_constant(texts)
            return constant, constant.weight
        seed = _order(server, "entropy mix").initial_seed()
        rule = fitting.fit_entropy_mix(texts, epochs=self.fit_epochs, seed=seed)
        return rule, float(rule.weight(torch.cat([text.features for text in texts])).mean())

    def _asked(self, server: Server) -> dict[str, Scalar]:
        """What an API was asked for in the whole run; nothing for a local model."""
        large = server.cache.get("large")
        if not isinstance(large, LargeModel) or not isinstance(large.model, RemoteModel):
            return {}
        return {"api_requests": large.model.api.num_requests, "api_tokens": large.model.api.num_tokens}

    def _distil(self, server: Server) -> dict[str, Scalar]:
        """One server phase; the state changes if the small model does no worse."""
        rows, held_out = self.public_rows(server)
        spec = TrainSpec(steps=self.steps, batch_size=self.batch_size, lr=self.lr)
        phase = server.round // self.distill_every
        first = (phase - 1) * self.steps
        batches = training.batches(rows, spec, first=first, count=self.steps, order=lambda name: _order(server, name))
        stretch = list(batches)
        teacher = self.deliver(server)
        before, teacher_loss = (self._loss(model, held_out) for model in (server.model, teacher))
        taught = [row for batch in stretch for row in batch]
        # Asked before the first step: the teacher holds the student's weights, and must not learn with it.
        lessons = teacher_cache.score(teacher, taught, k=self.top_k, temperature=self.temperature)
        assert self.distillation != "none"
        objective = teacher_cache.objective(lessons, direction=self.distillation, own_answers=self.hard_label_weight)
        try:
            total, dropout = first + self.steps, server.rng("distil dropout")
            training.fit(
                server.model, iter(stretch), spec, first=first, total=total, dropout=dropout, objective=objective
            )
            after = self._loss(server.model, held_out)
        except NonFiniteLoss:
            after = math.inf
        kept = after <= before + self.tolerance
        if kept:
            server.state.update(loading.read_trained(server.model))
        row = torch.tensor([[server.round, before, after, kept]], dtype=torch.float64)
        server.state[PHASES] = torch.cat([server.state.get(PHASES, row[:0]), row])
        losses = {"small_loss_before": before, "small_loss_after": after, "teacher_loss": teacher_loss}
        metrics: dict[str, Scalar] = {f"public_{name}": one for name, one in losses.items() if math.isfinite(one)}
        return metrics | {"distilled": kept}

    def public_rows(self, server: Server) -> tuple[list[Example], list[Example]]:
        """Public rows that are taught and public rows that judge. Raises RecipeError: too few."""
        order = torch.randperm(len(server.public), generator=_order(server, "held out")).tolist()
        number = max(round(self.validation_share * len(order)), 1)
        if number >= len(order):
            raise RecipeError(
                f"there are {len(order)} public rows, of which {number} would be held out: method.distillation, "
                "method.target_loss and fitted rules need some at the server; set data.public or data.public_share, or "
                "method.distillation=none"
            )
        taught, judging = ([server.public[at] for at in some] for some in (order[number:], order[:number]))
        if self.tokens == "all":
            taught = [row._replace(labels=list(row.input_ids)) for row in taught]
        return taught, judging

    def _large(self, server: Server) -> LargeModel:
        """The large model, opened once per process. Raises ModelError: not available, another tokeniser."""
        if "large" not in server.cache:
            server.cache["large"] = open_large_model(self.large, server.spec, server.folder)
        return cast(LargeModel, server.cache["large"])

    def _base(self, server: Server) -> nn.Module | None:
        """The small model before any tuning; None where it lies under the adapter."""
        if hasattr(server.model, "disable_adapter"):
            return None
        if "base" not in server.cache:
            fresh = loading.load_base(server.spec) if server.spec else copy.deepcopy(server.model)
            server.cache["base"] = fresh.requires_grad_(False)
        return cast(nn.Module, server.cache["base"])

    def _loss(self, model: nn.Module, rows: Sequence[Example]) -> float:
        return evaluation.score(model, rows, 2 * self.batch_size).loss

    def parts(self, server: Server) -> ProxyParts:
        large, tuned, base = self._large(server), self.trained(server), self._base(server)
        return ProxyParts(large.unsteered(tuned, base), tuned, base, large.vocabulary)

    def _check_rule(self) -> None:
        """Raise RecipeError where the rule cannot be had of this large model, or not at this strength."""
        if self.large.is_remote and self.rule in ("entropy_mix", "realign"):
            raise RecipeError(
                f"method.rule={self.rule} needs the large model's scores of all tokens, and an API gives the likeliest "
                "ones: set method.rule to difference or mix, or method.large to a local model"
            )
        if self.rule == "mix" and not self.fit_share and not 0 <= self.alpha <= 1:
            raise RecipeError(f"method.alpha is {self.alpha}; with method.rule=mix it is a share from 0 to 1")


@dataclass(frozen=True)
class FedPTCosts(LocalTraining):
    """Clients train the small model; the server steers and distils. An API computes elsewhere."""

    method: FedPT

    def server(self, preview: RunPreview) -> Work:
        method = self.method
        distils = method.distillation != "none" and preview.round % method.distill_every == 0
        if not (distils or method.target_loss or method.is_fitted):
            return Work()
        rows, held_out = method.public_rows(preview.server)
        judged = shapes(held_out, 2 * method.batch_size, ordered=True)
        fits = self._steered(shapes(held_out, fitting.BATCH)) if method.is_fitted else []
        again = self._steered(judged) if method.target_loss else []
        if not distils:
            return Work([*fits, *again])
        spec = TrainSpec(steps=method.steps, batch_size=method.batch_size)
        first = (preview.round // method.distill_every - 1) * method.steps
        order = partial(_order, preview.server)
        lessons = list(training.batches(rows, spec, first=first, count=method.steps, order=order))
        taught = list({tuple(row.input_ids): row for batch in lessons for row in batch}.values())
        asked = self._steered([*judged, *shapes(taught, teacher_cache.BATCH_SIZE, ordered=True)])
        before_and_after = [replace(one, times=2.0) for one in judged]
        learnt = [replace(shape(batch), learns=True, kind=Distilled(method.top_k)) for batch in lessons]
        return Work([*fits, *before_and_after, *asked, *learnt, *again])

    def _steered(self, looks: list[Pass]) -> list[Pass]:
        """What the steered model makes of `looks`: its large part, if that is here, and the small one, tuned and not."""
        large = self.method.large
        own = [] if large.is_remote else [replace(one, model=large.local, plain=True) for one in looks]
        base = [replace(one, plain=True) for one in looks] if self.method.rule == "difference" else []
        return [*own, *looks, *base]


@dataclass(frozen=True)
class SteeringReport(Presentation):
    """Whether steering is likely to pay; the parts on their own; the loss against the strength of steering."""

    method: FedPT

    def diagnose(self, server: Server, rows: Sequence[Example], held_out: Sequence[Example]) -> list[Diagnosis]:
        found = self.method.trial(server, rows, held_out)
        return [Diagnosis(found.pays, found.sentence)]

    def extra_models(self, server: Server) -> Mapping[str, nn.Module]:
        """The two parts on their own."""
        parts = self.method.parts(server)
        return {"small tuned": parts.tuned, "large base": parts.large}

    def charts(self, server: Server, rows: Sequence[Example]) -> list[Chart]:
        """The loss against the strength of steering; and what each server phase did to the small model."""
        drawn = [self._sweep(server, rows)] if rows and self.method.strengths() else []
        if (phases := server.state.get(PHASES)) is not None:
            before, after = (tuple((row[0], row[at]) for row in phases.tolist()) for at in (1, 2))
            kept = f"{int(phases[:, 3].sum())} of {len(phases)} were kept"
            words = f"Loss of the small model on held-out public rows, around each distillation; {kept}."
            lines = {"before": before, "after": after}
            drawn.append(Chart("Server phases", words, "round", "loss, nats per token", lines))
        return drawn

    def _sweep(self, server: Server, rows: Sequence[Example]) -> Chart:
        losses = sweep(self.method.parts(server), rows, self.method.strengths())
        best = min(losses, key=lambda alpha: losses[alpha])
        rule = self.method.combination(server)
        strength = rule.weight if isinstance(rule, Mix) else self.method.alpha
        lines = {
            "steered large model": tuple(losses.items()),
            "small model alone": tuple((a, losses.tuned) for a in losses),
        }
        words = (
            f"On {len(rows)} held-out rows; alpha 0 is the large model alone. "
            f"Least at {best:g}; the run has {strength:g}."
        )
        return Chart("Strength of the steering", words, "alpha", "loss, nats per token", lines)


def _order(server: Server, name: str) -> torch.Generator:
    """The random stream of one purpose in the whole run."""
    return generator(server.seed, 0, -1, f"fedpt {name}")
