"""KD-FedLLM: clients send logits on public rows, and the server distils their mean into the global model
(Yan et al. 2025, arXiv:2501.04436).

A round: the server sends its own log-probabilities on public rows; each client learns from them, tunes its own model on
its own rows, and answers with its log-probabilities on the public rows; the server teaches their weighted mean to the
global model. No parameter is ever sent, so clients may have different models. Kinds before it: FedMD (Li and Wang 2019,
arXiv:1910.03581) and FedDF (Lin et al. 2020, arXiv:2006.07242).

Differs from the paper: its last step, the global logits that guide the clients, rides on the next round's ask, so that a
round is one exchange. What is averaged are log-probabilities at the method's temperature. With a language model's head
only the words that the server chooses at each position travel, and the mass of all others as one number.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import Example
from kilofed.distillation import ensemble
from kilofed.distillation.ensemble import Scores
from kilofed.distillation.passes import Distilled
from kilofed.errors import ClientError, RecipeError
from kilofed.federation import wire
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server, generator
from kilofed.federation.workload import Costs, Message, Pass, RunPreview, Work, shape, shapes
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar

SAID, WORDS, COUNTS = "log_probs", "words", "counts"
NUM_WORDS, PUBLIC = "num_words", "public"


@dataclass(frozen=True)
class KD(Method):
    """Clients tune their own models and send logits on public rows; the server distils their mean into the global one."""

    sends: ClassVar[str] = "logits on public rows"

    steps: Annotated[int, Ge(1)] = 20
    """Distillation steps per round at the server."""
    guide_steps: Annotated[int, Ge(0)] = 10
    """Distillation steps per round at a client before it tunes, from round 2 on; 0 leaves clients on their own."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Learning rate of all distillation."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Public rows per distillation step, and per forward where rows are scored."""
    temperature: Annotated[float, Gt(0)] = 2.0
    """Softens what is said; higher shows more of what a model finds nearly as likely."""
    direction: Literal["forward", "reverse"] = "forward"
    """Of the KL: forward covers all that the teacher might say, reverse keeps to what it finds likely."""
    weighting: ensemble.Weighting = "uniform"
    """How a client counts at each position. uniform: 1; confidence: its best probability; entropy: 1 - H / ln V."""
    weights: Literal["examples", "uniform"] = "examples"
    """examples: a client counts by the examples it trained on; uniform: all count alike."""
    top_k: Annotated[int, Ge(0)] = 32
    """Words sent of each position of a language model's head, chosen by the server; 0 sends all. Classes are all sent."""
    wire: ensemble.Wire = "float16"
    """How log-probabilities travel; int8 has steps of 0.06 nats down to -16."""
    public_rows: Annotated[int, Ge(0)] = 0
    """Public rows used per round, drawn anew; bytes and cost grow in proportion. 0 takes all."""
    score_share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of them that a client scores, drawn anew for each; saves its forwards, not bytes."""
    models: dict[str, str] = field(default_factory=dict)
    """Models of clients that have another than model.path, by the client's number, such as {3: builtin:large}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [number for number in self.models if not number.isdecimal()]:
            raise RecipeError(f"method.models has {odd[0]!r}; expected numbers of clients, such as 3")

    def client_model(self, recipe: Recipe, client: int) -> ModelSpec:
        path = self.models.get(str(client))
        return replace(recipe.model, path=path, revision="") if path else recipe.model

    def check(self, server: Server) -> None:
        if not len(server.public):
            raise RecipeError(
                "kd learns from public rows, and there are none: name them with data.public=FILE, or take some of the "
                "training rows with data.public_share=0.2"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        rows = self.rows(server.public, server.seed, server.round)
        loading.write_trained(server.model, wire.shared(server.state))
        ask = self._ask(server.model, rows)
        reply = clients.mean("tune", ask)
        teacher = self.teacher(ask, reply)
        loading.write_trained(server.model, wire.shared(server.state))  # Clients of this process use the same model.
        done = self._learn(server.model, rows, teacher, server.train, self.steps, server.rng("distil"))
        server.state.update(loading.read_trained(server.model))
        return {**reply.scalars, "distill_loss": done.loss}

    def rows(self, public: Sequence[Example], seed: int, round: int) -> list[Example]:
        """The public rows of a round, the same at every party."""
        if not 0 < self.public_rows < len(public):
            return list(public)
        drawn = torch.randperm(len(public), generator=generator(seed, round, -1, "public rows")).tolist()
        return [public[i] for i in sorted(drawn[: self.public_rows])]

    def teacher(self, ask: Payload, reply: Payload) -> Scores:
        """What the clients say together, given what they were sent and the mean of their replies."""
        guide_NB = ensemble.decode(ask.tensors[SAID], self.wire)
        mean_NB = ensemble.decode(reply.tensors[SAID], self.wire) if SAID in reply.tensors else guide_NB
        said_NB = ensemble.ensemble(guide_NB, mean_NB, reply.tensors.get(COUNTS))
        return _as_scores(ask, said_NB)

    @on_client
    def tune(self, client: Client, ask: Payload) -> Payload:
        """Learn from the global model's scores, tune on the own rows, answer with the own scores."""
        rows = self.rows(client.public, client.seed, client.round)
        loading.write_trained(client.model, client.state or client.start())
        self._check(client.model, rows, ask)
        guide_NB = ensemble.decode(ask.tensors[SAID], self.wire)
        guided = 0.0
        if client.round > 1 and self.guide_steps:
            guide = _as_scores(ask, guide_NB.log_softmax(1))
            spec, draws = client.train, client.rng("distil")
            guided = self._learn(client.model, rows, guide, spec, self.guide_steps, draws).loss
        done = client.fit_round()
        client.state.update(loading.read_trained(client.model))
        own = self._own_scores(client, rows, ask)
        tensors = {SAID: ensemble.encode(ensemble.share(guide_NB, own), self.wire)}
        if self.counts:
            tensors[COUNTS] = own.weights_N.to(_float(self.wire))
        weight = done.num_examples if self.weights == "examples" else 1
        return Payload(tensors, {"weight": weight, "train_loss": done.loss, "guide_loss": guided})

    @property
    def counts(self) -> bool:
        """Whether clients count differently at different positions, so that counts are sent."""
        return self.weighting != "uniform" or self.score_share < 1

    def deliver(self, server: Server) -> nn.Module:
        loading.write_trained(server.model, wire.shared(server.state))
        return server.model

    def costs(self) -> "KDCosts":
        return KDCosts(self)

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        model = preview.server.model
        rows = self.rows(preview.server.public, preview.recipe.seed, preview.round)
        num, num_words = sum(ensemble.num_positions(rows)), ensemble.width(model, rows)
        k = self.num_kept(rows, num_words)
        words = torch.zeros(num, k, dtype=torch.long) if k else None
        said = torch.zeros(num, k + 1 if k else num_words)
        ask = self._packed(Scores(said, words, num_words, torch.ones(num)), "0" * 16)
        tensors = {SAID: ask.tensors[SAID]}
        if self.counts:
            tensors[COUNTS] = torch.zeros(num, dtype=_float(self.wire))
        reply = Payload(tensors, {"weight": 1, "train_loss": 0.0, "guide_loss": 0.0})
        return preview.alike(Message("tune", "mean", ask, reply))

    def _ask(self, model: nn.Module, rows: list[Example]) -> Payload:
        """What the global model says, and at which words clients are asked to score."""
        k = self.num_kept(rows, ensemble.width(model, rows))
        words = ensemble.choose(model, rows, k, self.batch_size) if k else None
        own = ensemble.score(model, rows, words, temperature=self.temperature, batch_size=self.batch_size)
        return self._packed(own, fingerprint(model, rows))

    def num_kept(self, rows: Sequence[Example], num_words: int) -> int:
        """K of the words sent; 0 where all are."""
        return self.top_k if rows[0].label is None and self.top_k < num_words else 0

    def _packed(self, own: Scores, public: str) -> Payload:
        tensors = {SAID: ensemble.encode(own.log_probs_NB, self.wire)}
        if own.words_NK is not None:
            tensors[WORDS] = own.words_NK.to(torch.int16 if own.num_words <= 2**15 else torch.int32)
        return Payload(tensors, {NUM_WORDS: own.num_words, PUBLIC: public})

    def _check(self, model: nn.Module, rows: list[Example], ask: Payload) -> None:
        """Raise ClientError: no public rows, or not those of the server, or another vocabulary or label set."""
        if not rows:
            raise ClientError("it has no public rows: give it the file that data.public names at the server")
        num_words, theirs = ensemble.width(model, rows), int(ask.scalars[NUM_WORDS])
        what = "words" if rows[0].label is None else "classes"
        if num_words != theirs:
            raise ClientError(
                f"its model scores {num_words} {what}, the server's {theirs}: "
                f"{'all models need one vocabulary' if what == 'words' else 'name all labels in data.labels'}"
            )
        if fingerprint(model, rows) != ask.scalars[PUBLIC]:
            raise ClientError(
                f"its public rows, or the names of its {what}, are not those of the server: give both one data.public "
                "and one data.labels"
            )

    def _own_scores(self, client: Client, rows: list[Example], ask: Payload) -> Scores:
        """What the client's model says; weight 0 where it does not score. Raises ClientError: not finite."""
        words = ask.tensors[WORDS].long() if WORDS in ask.tensors else None
        drawn = _drawn(len(rows), self.score_share, client.rng("scored rows"))
        sizes = ensemble.num_positions(rows)
        at_N = torch.repeat_interleave(drawn, torch.tensor(sizes))
        some = ensemble.score(
            client.model,
            [row for row, scored in zip(rows, drawn.tolist(), strict=True) if scored],
            None if words is None else words[at_N],
            temperature=self.temperature,
            batch_size=self.batch_size,
            weighting=self.weighting,
        )
        if bad := int((~some.log_probs_NB[:, 0].isfinite()).sum()):
            raise ClientError(
                f"its logits are NaN or infinite at {bad} of {len(some.weights_N)} positions of the public rows: "
                "try a smaller train.lr or method.lr, or model.dtype=float32"
            )
        log_probs_NB = torch.zeros(len(at_N), some.log_probs_NB.shape[1])
        log_probs_NB[at_N], weights_N = some.log_probs_NB, torch.zeros(len(at_N))
        weights_N[at_N] = some.weights_N
        return Scores(log_probs_NB, words, some.num_words, weights_N)

    def _learn(
        self,
        model: nn.Module,
        rows: list[Example],
        teacher: Scores,
        spec: TrainSpec,
        steps: int,
        draws: torch.Generator,
    ) -> training.Fit:
        spec = replace(spec, steps=steps, lr=self.lr, batch_size=self.batch_size)
        return ensemble.fit(
            model, rows, teacher, spec, temperature=self.temperature, direction=self.direction, generator=draws
        )


@dataclass(frozen=True)
class KDCosts(Costs):
    """Clients learn from the guide, train and score public rows; the server scores them and learns from the mean."""

    method: KD

    def client(self, preview: RunPreview, client: int) -> Work:
        method, seed, round = self.method, preview.recipe.seed, preview.round
        public = method.rows(preview.public_of(method.client_model(preview.recipe, client)), seed, round)
        guided = self._steps(public, method.guide_steps, generator(seed, round, client, "distil"))
        drawn = _drawn(len(public), method.score_share, generator(seed, round, client, "scored rows"))
        scored = self._scored([public[i] for i in drawn.nonzero()[:, 0].tolist()], method.top_k)
        return Work([*(guided if round > 1 else ()), *preview.local_training(client), *scored])

    def server(self, preview: RunPreview) -> Work:
        method, seed = self.method, preview.recipe.seed
        public = method.rows(preview.server.public, seed, preview.round)
        chosen = method.num_kept(public, ensemble.width(preview.server.model, public)) > 0
        scored = self._scored(public, 0)
        learnt = self._steps(public, method.steps, generator(seed, preview.round, -1, "distil"))
        # Where tokens are chosen, rows are scored once more for the choice.
        return Work([*(replace(one, times=2.0 if chosen else 1.0) for one in scored), *learnt])

    def _scored(self, rows: Sequence[Example], num_tokens: int) -> list[Pass]:
        return [replace(one, kind=Distilled(num_tokens)) for one in shapes(rows, self.method.batch_size)]

    def _steps(self, public: Sequence[Example], steps: int, draws: torch.Generator) -> list[Pass]:
        """The batches that are learnt from a teacher."""
        spec = TrainSpec(steps=steps, batch_size=self.method.batch_size)
        batches = [shape([public[i] for i in batch]) for batch in ensemble.walk(len(public), spec, draws)]
        return [replace(one, learns=True, kind=Distilled(self.method.top_k)) for one in batches]


def fingerprint(model: nn.Module, rows: Sequence[Example]) -> str:
    """16 hex digits that two parties share when they read the same public rows in the same words or classes."""
    if rows[0].label is None:
        seen: object = [row.input_ids for row in rows]
    else:
        names = getattr(getattr(model, "config", None), "id2label", {})
        seen = [len(rows), [str(names[number]) for number in sorted(names)]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _as_scores(ask: Payload, log_probs_NB: Tensor) -> Scores:
    words = ask.tensors[WORDS].long() if WORDS in ask.tensors else None
    return Scores(log_probs_NB, words, int(ask.scalars[NUM_WORDS]), torch.ones(len(log_probs_NB)))


def _drawn(num_rows: int, share: float, draws: torch.Generator) -> Tensor:
    """Which rows a client scores, at least one."""
    drawn = torch.zeros(num_rows, dtype=torch.bool)
    drawn[torch.randperm(num_rows, generator=draws)[: max(round(share * num_rows), 1)]] = True
    return drawn


def _float(sent: ensemble.Wire) -> torch.dtype:
    return torch.float32 if sent == "float32" else torch.float16
