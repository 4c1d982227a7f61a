"""KD-FedLLM: clients send logits on public rows, and the server distils their mean into the global model
(Yan et al. 2025, arXiv:2501.04436).

A round: the server sends its own log-probabilities on public rows; each client distils from them, fine-tunes its own model
on its own rows, and replies with its log-probabilities on the public rows; the server distils their weighted mean into the
global model. No parameters are sent, so clients may have different models. Earlier methods of this kind: FedMD (Li and
Wang 2019, arXiv:1910.03581) and FedDF (Lin et al. 2020, arXiv:2006.07242).

Differs from the paper: its last step, the global logits for the clients, is sent with the next round's request, so that a
round is one exchange. Log-probabilities at the method's temperature are averaged, not logits. With a language model's head
only the tokens that the server chooses at each position are sent, and the probability of all others as one number.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from kilofed.config.fields import FormerName
from kilofed.config.recipe import ModelSpec, Recipe, TrainSpec
from kilofed.data.examples import Example
from kilofed.distillation import ensemble
from kilofed.distillation.ensemble import Scores
from kilofed.distillation.passes import Distilled
from kilofed.errors import ClientError, PayloadError, RecipeError
from kilofed.federation import wire
from kilofed.federation.cohort import Cohort
from kilofed.federation.method import Method, on_client
from kilofed.federation.parties import Client, Server, generator
from kilofed.federation.workload import Costs, Message, Pass, RunPreview, Work, shape, shapes
from kilofed.models import loading, training
from kilofed.payload import Payload, Scalar

LOG_PROBS, TOKENS, COUNTS = "log_probs", "words", "counts"
NUM_WORDS, PUBLIC = "num_words", "public"


@dataclass(frozen=True)
class KD(Method):
    """Clients fine-tune their own models and send logits on public rows; the server distils their mean into its model."""

    sends: ClassVar[str] = "logits on public rows"

    steps: Annotated[int, Ge(1)] = 20
    """Distillation steps per round at the server."""
    client_distill_steps: Annotated[int, Ge(0), FormerName("guide_steps")] = 10
    """Distillation steps per round at a client before local training, from round 2 on; 0 for none."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Learning rate of distillation at server and clients."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Public rows per distillation step and per scoring forward."""
    temperature: Annotated[float, Gt(0)] = 2.0
    """Of the softmax; higher gives more weight to less probable tokens."""
    kl_direction: Annotated[Literal["forward", "reverse"], FormerName("direction")] = "forward"
    """Of the KL: forward is mode-covering, reverse is mode-seeking."""
    weighting: ensemble.Weighting = "uniform"
    """A client's weight at each position. uniform: 1; confidence: its largest probability; entropy: 1 - H / ln V."""
    client_weighting: Annotated[Literal["examples", "uniform"], FormerName("weights")] = "examples"
    """examples: clients are weighted by the number of examples they trained on; uniform: equally."""
    top_k: Annotated[int, Ge(0)] = 32
    """Tokens sent per position, chosen by the server; 0 sends all. Class logits are always sent in full."""
    wire: ensemble.Wire = "float16"
    """Format of log-probabilities; int8 has steps of 0.06 nats down to -16."""
    public_rows: Annotated[int, Ge(0)] = 0
    """Public rows per round, sampled every round; bytes and cost are proportional. 0 takes all."""
    score_share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of them that a client scores, sampled per client; saves forwards, not bytes."""
    models: dict[str, str] = field(default_factory=dict)
    """Models of clients that do not use model.path, by client id, such as {3: builtin:large}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [number for number in self.models if not number.isdecimal()]:
            raise RecipeError(f"method.models has {odd[0]!r}; expected client ids, such as 3")

    def client_model(self, recipe: Recipe, client: int) -> ModelSpec:
        path = self.models.get(str(client))
        return replace(recipe.model, path=path, revision="") if path else recipe.model

    def check(self, server: Server) -> None:
        if not len(server.public):
            raise RecipeError(
                "kd distils on public rows, and there are none; set data.public=FILE, or take some of the training rows with "
                "data.public_share=0.2"
            )

    def setup(self, server: Server) -> None:
        self.check(server)
        server.state.update(loading.read_trained(server.model))

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        rows = self.rows(server.public, server.seed, server.round)
        loading.write_trained(server.model, wire.shared(server.state))
        ask = self._ask(server.model, rows)
        reply = clients.mean("tune", ask, self._reply(ask.tensors[LOG_PROBS]), check=self._check_reply)
        teacher = self.teacher(ask, reply)
        loading.write_trained(server.model, wire.shared(server.state))  # In-process clients use the same model.
        fitted = self._distil(server.model, rows, teacher, server.train, self.steps, server.rng("distil"))
        server.state.update(loading.read_trained(server.model))
        return {**reply.scalars, "distill_loss": fitted.loss}

    def rows(self, public: Sequence[Example], seed: int, round: int) -> list[Example]:
        """The public rows of a round, the same at every party."""
        if not 0 < self.public_rows < len(public):
            return list(public)
        drawn = torch.randperm(len(public), generator=generator(seed, round, -1, "public rows")).tolist()
        return [public[i] for i in sorted(drawn[: self.public_rows])]

    def teacher(self, ask: Payload, reply: Payload) -> Scores:
        """The ensemble's scores, from the request and the mean of the replies."""
        global_NB = ensemble.decode(ask.tensors[LOG_PROBS], self.wire)
        mean_NB = ensemble.decode(reply.tensors[LOG_PROBS], self.wire) if LOG_PROBS in reply.tensors else global_NB
        ensemble_NB = ensemble.ensemble(global_NB, mean_NB, reply.tensors.get(COUNTS))
        return _as_scores(ask, ensemble_NB)

    def _check_reply(self, client: int, reply: Payload) -> None:
        """Raise PayloadError unless the reply has log-probabilities, and weights from 0 to 1."""
        sent = reply.tensors[LOG_PROBS]
        ensemble.read(sent, self.wire, (sent.shape[0], sent.shape[1]))
        if self.counts and not bool(((reply.tensors[COUNTS] >= 0) & (reply.tensors[COUNTS] <= 1)).all()):
            raise PayloadError("it sent weights of positions outside 0 to 1")

    @on_client
    def tune(self, client: Client, ask: Payload) -> Payload:
        """Distil from the global model's scores, train on local rows, reply with the local model's scores."""
        rows = self.rows(client.public, client.seed, client.round)
        loading.write_trained(client.model, client.state or client.start())
        self._check(client.model, rows, ask)
        global_NB = ensemble.decode(ask.tensors[LOG_PROBS], self.wire)
        global_loss = 0.0
        if client.round > 1 and self.client_distill_steps:
            teacher = _as_scores(ask, global_NB.log_softmax(1))
            spec, rng = client.train, client.rng("distil")
            global_loss = self._distil(client.model, rows, teacher, spec, self.client_distill_steps, rng).loss
        fitted = client.fit_round()
        client.state.update(loading.read_trained(client.model))
        own = self._own_scores(client, rows, ask)
        tensors = {LOG_PROBS: ensemble.encode(ensemble.contribution(global_NB, own), self.wire)}
        if self.counts:
            tensors[COUNTS] = own.weights_N.to(_float(self.wire))
        weight = fitted.num_examples if self.client_weighting == "examples" else 1
        return Payload(tensors, {"weight": weight, "train_loss": fitted.loss, "guide_loss": global_loss})

    @property
    def counts(self) -> bool:
        """Whether client weights differ between positions, so that they are sent."""
        return self.weighting != "uniform" or self.score_share < 1

    def deliver(self, server: Server) -> nn.Module:
        loading.write_trained(server.model, wire.shared(server.state))
        return server.model

    def costs(self) -> "KDCosts":
        return KDCosts(self)

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        model = preview.server.model
        rows = self.rows(preview.server.public, preview.recipe.seed, preview.round)
        num, num_outputs = sum(ensemble.num_positions(rows)), ensemble.num_outputs_of(model, rows)
        k = self.num_kept(rows, num_outputs)
        tokens = torch.zeros(num, k, dtype=torch.long) if k else None
        log_probs = torch.zeros(num, k + 1 if k else num_outputs)
        ask = self._packed(Scores(log_probs, tokens, num_outputs, torch.ones(num)), "0" * 16)
        return preview.alike(Message("tune", "mean", ask, self._reply(ask.tensors[LOG_PROBS])))

    def _reply(self, log_probs: Tensor) -> Payload:
        """What a client's reply is like where the server sent `log_probs`."""
        tensors = {LOG_PROBS: log_probs}
        if self.counts:
            tensors[COUNTS] = torch.zeros(len(log_probs), dtype=_float(self.wire))
        return Payload(tensors, {"weight": 1, "train_loss": 0.0, "guide_loss": 0.0})

    def _ask(self, model: nn.Module, rows: list[Example]) -> Payload:
        """The global model's scores and the tokens that clients score."""
        k = self.num_kept(rows, ensemble.num_outputs_of(model, rows))
        tokens = ensemble.choose_tokens(model, rows, k, self.batch_size) if k else None
        own = ensemble.score(model, rows, tokens, temperature=self.temperature, batch_size=self.batch_size)
        return self._packed(own, fingerprint(model, rows))

    def num_kept(self, rows: Sequence[Example], num_outputs: int) -> int:
        """K of the tokens sent; 0 if all are."""
        return self.top_k if rows[0].label is None and self.top_k < num_outputs else 0

    def _packed(self, own: Scores, public: str) -> Payload:
        tensors = {LOG_PROBS: ensemble.encode(own.log_probs_NB, self.wire)}
        if own.tokens_NK is not None:
            tensors[TOKENS] = own.tokens_NK.to(torch.int16 if own.num_outputs <= 2**15 else torch.int32)
        return Payload(tensors, {NUM_WORDS: own.num_outputs, PUBLIC: public})

    def _check(self, model: nn.Module, rows: list[Example], ask: Payload) -> None:
        """Raise ClientError unless public rows, vocabulary and label set are those of the server.

        Raise PayloadError unless the scores and tokens that came fit them.
        """
        if not rows:
            raise ClientError("it has no public rows; give it the file that data.public names at the server")
        num_outputs, expected = ensemble.num_outputs_of(model, rows), int(ask.scalars[NUM_WORDS])
        what = "tokens" if rows[0].label is None else "classes"
        if num_outputs != expected:
            raise ClientError(
                f"its model scores {num_outputs} {what}, the server's {expected}; "
                f"{'use models with one vocabulary' if what == 'tokens' else 'list all labels in data.labels'}"
            )
        if fingerprint(model, rows) != ask.scalars[PUBLIC]:
            raise ClientError(
                f"its public rows, or the names of its {what}, differ from the server's; give both the same data.public "
                "and data.labels"
            )
        num, k = sum(ensemble.num_positions(rows)), self.num_kept(rows, num_outputs)
        ensemble.read(ask.tensors.get(LOG_PROBS), self.wire, (num, k + 1 if k else num_outputs))
        if k:
            ensemble.read_tokens(ask.tensors.get(TOKENS), (num, k), num_outputs)

    def _own_scores(self, client: Client, rows: list[Example], ask: Payload) -> Scores:
        """The scores of the client's model; weight 0 on rows it does not score. Raises ClientError: not finite."""
        tokens = ask.tensors[TOKENS].long() if TOKENS in ask.tensors else None
        drawn = _drawn(len(rows), self.score_share, client.rng("scored rows"))
        sizes = ensemble.num_positions(rows)
        at_N = torch.repeat_interleave(drawn, torch.tensor(sizes))
        own = ensemble.score(
            client.model,
            [row for row, scored in zip(rows, drawn.tolist(), strict=True) if scored],
            None if tokens is None else tokens[at_N],
            temperature=self.temperature,
            batch_size=self.batch_size,
            weighting=self.weighting,
        )
        if bad := int((~own.log_probs_NB[:, 0].isfinite()).sum()):
            raise ClientError(
                f"its logits are NaN or infinite at {bad} of {len(own.weights_N)} positions of the public rows; "
                "lower train.lr or method.lr, or set model.dtype=float32"
            )
        log_probs_NB = torch.zeros(len(at_N), own.log_probs_NB.shape[1])
        log_probs_NB[at_N], weights_N = own.log_probs_NB, torch.zeros(len(at_N))
        weights_N[at_N] = own.weights_N
        return Scores(log_probs_NB, tokens, own.num_outputs, weights_N)

    def _distil(
        self,
        model: nn.Module,
        rows: list[Example],
        teacher: Scores,
        spec: TrainSpec,
        steps: int,
        rng: torch.Generator,
    ) -> training.Fit:
        spec = replace(spec, steps=steps, lr=self.lr, batch_size=self.batch_size)
        return ensemble.fit(
            model, rows, teacher, spec, temperature=self.temperature, direction=self.kl_direction, generator=rng
        )


@dataclass(frozen=True)
class KDCosts(Costs):
    """Clients distil from the global model, train and score public rows; the server scores them and distils the mean."""

    method: KD

    def client(self, preview: RunPreview, client: int) -> Work:
        method, seed, round = self.method, preview.recipe.seed, preview.round
        public = method.rows(preview.public_of(method.client_model(preview.recipe, client)), seed, round)
        distilled = self._steps(public, method.client_distill_steps, generator(seed, round, client, "distil"))
        drawn = _drawn(len(public), method.score_share, generator(seed, round, client, "scored rows"))
        scored = self._scored([public[i] for i in drawn.nonzero()[:, 0].tolist()], method.top_k)
        return Work([*(distilled if round > 1 else ()), *preview.local_training(client), *scored])

    def server(self, preview: RunPreview) -> Work:
        method, seed = self.method, preview.recipe.seed
        public = method.rows(preview.server.public, seed, preview.round)
        chosen = method.num_kept(public, ensemble.num_outputs_of(preview.server.model, public)) > 0
        scored = self._scored(public, 0)
        distilled = self._steps(public, method.steps, generator(seed, preview.round, -1, "distil"))
        # Where tokens are chosen, rows are scored once more for the choice.
        return Work([*(replace(one, times=2.0 if chosen else 1.0) for one in scored), *distilled])

    def _scored(self, rows: Sequence[Example], num_tokens: int) -> list[Pass]:
        return [replace(one, kind=Distilled(num_tokens)) for one in shapes(rows, self.method.batch_size)]

    def _steps(self, public: Sequence[Example], steps: int, rng: torch.Generator) -> list[Pass]:
        """The batches of distillation."""
        spec = TrainSpec(steps=steps, batch_size=self.method.batch_size)
        batches = [shape([public[i] for i in batch]) for batch in ensemble.row_batches(len(public), spec, rng)]
        return [replace(one, learns=True, kind=Distilled(self.method.top_k)) for one in batches]


def fingerprint(model: nn.Module, rows: Sequence[Example]) -> str:
    """A hash (16 hex digits) of the public rows' token ids, or of their number and the class names."""
    if rows[0].label is None:
        seen: object = [row.input_ids for row in rows]
    else:
        names = getattr(getattr(model, "config", None), "id2label", {})
        seen = [len(rows), [str(names[number]) for number in sorted(names)]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _as_scores(ask: Payload, log_probs_NB: Tensor) -> Scores:
    tokens = ask.tensors[TOKENS].long() if TOKENS in ask.tensors else None
    return Scores(log_probs_NB, tokens, int(ask.scalars[NUM_WORDS]), torch.ones(len(log_probs_NB)))


def _drawn(num_rows: int, share: float, rng: torch.Generator) -> Tensor:
    """A mask of the rows that a client scores, at least one."""
    drawn = torch.zeros(num_rows, dtype=torch.bool)
    drawn[torch.randperm(num_rows, generator=rng)[: max(round(share * num_rows), 1)]] = True
    return drawn


def _float(sent: ensemble.Wire) -> torch.dtype:
    return torch.float32 if sent == "float32" else torch.float16
