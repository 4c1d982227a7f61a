"""The contract: a method is one class with a server side (`round`) and client functions (`@on_client`).

    class Mine(Method):
        def round(self, server, clients):
            like = Payload(server.state, {"weight": 1, "loss": 0.0})
            reply = clients.mean("fit", Payload(server.state), like)
            server.state.update(reply.tensors)
            return dict(reply.scalars)

        @on_client
        def fit(self, client, ask):
            ...
            return Payload(tensors, {"weight": client.num_examples, "loss": loss})

The two verbs are the privacy statement. `mean` gives the method the weighted mean of the replies and nothing else;
`call` gives it every reply. With both a method says what a reply is like, and a reply that is not like that is refused.
"""

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, TypeVar, cast, overload

from torch import nn

from kilofed.config import fields, trust
from kilofed.config.bounds import Settings
from kilofed.config.fields import Table, Value
from kilofed.config.recipe import MethodSpec, ModelSpec, Recipe, TrainSpec
from kilofed.errors import KilofedError, PayloadError, PrivacyError, RecipeError, nearest
from kilofed.federation.address import ADDRESS, Address
from kilofed.federation.cohort import ERROR, MAX_ERROR_TEXT, Cohort, log
from kilofed.federation.parties import Client, Server
from kilofed.federation.presentation import Presentation
from kilofed.federation.workload import Costs, Message, RunPreview
from kilofed.models import training
from kilofed.payload import Payload, Scalar
from kilofed.privacy.mechanisms import Mechanism

F = TypeVar("F", bound=Callable[..., Payload])


@dataclass(frozen=True)
class Sent:
    """Bytes that one client moves per round."""

    action: str
    down: int
    up: int
    exchanges: int


@dataclass(frozen=True)
class Method(Settings):
    """One federated method; its fields are its hyperparameters.

    `setup`, `round` and `deliver` must be written, and the functions that clients run (`@on_client`); all else has a
    default.
    """

    sends: ClassVar[str] = "trained tensors"
    """What leaves a client, in a few words."""
    delivered_as: ClassVar[str] = "the tuned model"
    """What is delivered and scored, in a few words."""
    exact_bytes: ClassVar[bool] = True
    """Whether messages are as long as `messages` says, whatever their numbers."""

    def setup(self, server: Server) -> None:
        """Fill `server.state` before round 1."""
        raise NotImplementedError

    def round(self, server: Server, clients: Cohort) -> Mapping[str, Scalar]:
        """One round; changes `server.state` and returns metrics."""
        raise NotImplementedError

    def deliver(self, server: Server) -> nn.Module:
        """The model that the run delivers, put together in `server.model`."""
        raise NotImplementedError

    def client_model(self, recipe: Recipe, client: int) -> ModelSpec | None:
        """The model that client number `client` loads; None for no model at all."""
        return recipe.model

    def server_model(self, recipe: Recipe) -> ModelSpec | None:
        """The model that the server loads."""
        return recipe.model

    def check(self, server: Server) -> None:
        """Refuse what could not run; `server.model` may be an outline, without numbers. Raises RecipeError."""

    def done(self, server: Server) -> bool:
        """Whether no further round is wanted; read from `server.state` before each."""
        return False

    def max_weight(self, train: TrainSpec, num_rows: int) -> float:
        """The largest weight that a client of `num_rows` training rows may claim for a round.

        By default the number of examples that a round of local training takes it through, and 1 where clients are
        weighted uniformly.
        """
        if getattr(self, "client_weighting", "examples") == "uniform":
            return 1.0
        return max(1.0, training.num_seen(train, num_rows))

    def messages(self, preview: RunPreview) -> Mapping[int, Sequence[Message]]:
        """The messages of a round by client, numbers made up; no client where nobody can tell."""
        return {}

    def costs(self) -> Costs:
        """What its parties compute in a round."""
        return Costs()

    def presentation(self) -> Presentation:
        """What it adds to check, the table of results and the report."""
        return Presentation()

    def trained(self, server: Server) -> nn.Module:
        """The model whose adapter the run folder keeps: what is delivered, or the part of it that was trained."""
        return self.deliver(server)


@dataclass(frozen=True)
class Action:
    """What `@on_client` knows of a function."""

    reads_data: bool


@overload
def on_client(function: F) -> F: ...


@overload
def on_client(*, reads_data: bool = True) -> Callable[[F], F]: ...


def on_client(function: F | None = None, *, reads_data: bool = True) -> F | Callable[[F], F]:
    """Mark a method's function as one that clients run: `(self, client, ask: Payload) -> Payload`.

    Args:
        reads_data: False promises that the reply holds nothing of the client's rows; such an action may be
            called under every privacy policy.
    """

    def mark(marked: F) -> F:
        marked.__on_client__ = Action(reads_data)  # type: ignore[attr-defined]
        return marked

    return mark(function) if function else mark


def load_method(spec: MethodSpec) -> Method:
    """The method that `spec` names, with its fields set; of two names of one field the later counts, as it was laid over.

    Raises:
        RecipeError: no such file, no Method in it, unknown or wrong field.
    """
    cls = find_method(spec.name)
    return fields.build(cls, fields.without_earlier_names(cls, spec.fields), "method.")


def with_present_names(table: Table, method: str) -> dict[str, Value]:
    """A recipe's `table` with its own keys and those of the method called `method` as they are named now.

    Raises:
        RecipeError: no such method, or a field is given under both names.
    """
    found = fields.with_present_names(Recipe, table)
    if isinstance(own := found.get("method"), dict):
        cls = find_method(method)
        found["method"] = fields.with_present_names(cls, fields.without_earlier_names(cls, own), "method.")
    return found


def find_method(name: str) -> type[Method]:
    """The Method class of `kilofed.methods.<name>`, or of the module `name` when it has a dot.

    Raises:
        RecipeError: there is none; or the module is not kilofed's own, not imported yet, and nobody has trusted it.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(f"method is {name!r}; expected a name such as fedavg or my_package.my_method")
    path = name if "." in name else f"kilofed.methods.{name}"
    trust.allow(path)
    module = _imported(path, name)
    own = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise RecipeError(f"{path} defines {len(own)} Method classes; expected one")
    return own[0]


def _imported(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except KilofedError:
        raise
    except Exception as error:  # Somebody else's code may raise anything.
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise RecipeError(f"method {name!r} does not exist{nearest(name, method_names())}") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"method {name!r} cannot be imported ({type(error).__name__}: {error}, at {last.filename} line {last.lineno}); "
            "correct its code or install what it needs"
        ) from error


def method_names() -> list[str]:
    """Names of the methods that kilofed ships: its files in methods/."""
    package = importlib.import_module("kilofed.methods")
    return sorted(item.name for item in pkgutil.iter_modules(package.__path__))


def forecast(method: Method, preview: RunPreview, policy: Mechanism) -> dict[int, list[Sent]]:
    """Bytes of the round in `preview` by client and message; empty where nobody can tell.

    The ledger counts these very bytes where `method.exact_bytes` is set.
    """
    found: dict[int, list[Sent]] = {}
    known: dict[int, list[Sent]] = {}  # Clients with the same messages share one list of them.
    for client, messages in method.messages(preview).items():
        if id(messages) not in known:
            known[id(messages)] = [sent(method, message, policy) for message in messages]
        found[client] = known[id(messages)]
    return found


def sent(method: Method, message: Message, policy: Mechanism) -> Sent:
    """Bytes of one message, which one client takes part in."""
    address = Address(message.action, message.verb, 0, 0)
    ask = Payload(message.ask.tensors, {**message.ask.scalars, **address.scalars})
    left = leaving(method, message, policy)
    reply = Payload(left.tensors, {**left.scalars, **address.answered(0)})
    return Sent(message.action, ask.num_bytes * message.times, reply.num_bytes * message.times, message.times)


def leaving(method: Method, message: Message, policy: Mechanism) -> Payload:
    """What leaves a client in answer to `message`: names, shapes and dtypes, whatever the numbers."""
    return policy.outline(message.reply) if reads_data(method, message.action) else message.reply


def reads_data(method: Method, action: str) -> bool:
    """Whether the replies to `action` come from clients' rows. Raises PayloadError: clients do no such thing."""
    return _function(method, action)[1].reads_data


def handle(method: Method, policy: Mechanism, client: Client, body: bytes) -> bytes:
    """The whole client side of every engine: bytes in, bytes out.

    Only functions marked `@on_client` run; the client's own policy decides what may leave; whatever goes wrong becomes
    a reply that says so.

    Raises:
        PayloadError: `body` is not a message for a client.
    """
    ask = Payload.decode(body)
    address = Address.of(ask.scalars)
    try:
        before = client.states.before(when := (address.round, address.exchange), address.run)
        client.round, client.state = address.round, dict(before)
        reply = _answer(method, policy, client, address, ask)
        answer = Payload(reply.tensors, {**reply.scalars, **address.answered(client.id)}).encode()
        if client.state or before:
            client.states.keep(when, client.state, address.run)
    except Exception as error:
        return _failed(policy, client.id, address, error)
    return answer


def failed(policy: Mechanism, client: int, body: bytes, error: Exception) -> bytes:
    """The reply of a client that met `error` before it could so much as look at `body`.

    Raises:
        PayloadError: `body` is not a message for a client.
    """
    return _failed(policy, client, Address.of(Payload.peek(body)), error)


def _answer(method: Method, policy: Mechanism, client: Client, address: Address, ask: Payload) -> Payload:
    """What leaves the client's walls. Raises KilofedError, or whatever the method's function raises."""
    function, about = _function(method, address.action)
    if address.verb == "call" and about.reads_data and policy.needs_aggregate:
        raise PrivacyError(
            f"{address.action!r} in {type(method).__name__} lets the server see single replies; "
            f"privacy.{policy.kind} allows means only\n  hint: use a method that asks for means, such as fedavg"
        )
    ask = Payload(ask.tensors, {name: value for name, value in ask.scalars.items() if name != ADDRESS})
    reply = function(client, ask)
    return policy.client(reply, ask) if about.reads_data else reply


def _failed(policy: Mechanism, client: int, address: Address, error: Exception) -> bytes:
    kind = type(error).__name__
    if not isinstance(error, KilofedError):
        log.error("client %d failed in %r", client, address.action, exc_info=error)
    text = str(error) if isinstance(error, KilofedError) else f"{kind}: {error}"
    told = policy.failure(kind, text)
    if told != text and isinstance(error, KilofedError):
        log.error("client %d failed in %r, which the server is not told: %s", client, address.action, text)
    told = told[:MAX_ERROR_TEXT].encode("utf-8", "replace").decode("utf-8")
    return Payload(scalars={ERROR: told, **address.answered(client)}).encode()


def _function(method: Method, action: str) -> tuple[Callable[[Client, Payload], Payload], Action]:
    about = getattr(getattr(type(method), action, None), "__on_client__", None)
    if not isinstance(about, Action):
        marked = [name for name, item in inspect.getmembers(type(method)) if hasattr(item, "__on_client__")]
        raise PayloadError(
            f"{action!r} is not something that clients of {type(method).__name__} do{nearest(action, marked)}"
        )
    return cast(Callable[[Client, Payload], Payload], getattr(method, action)), about
