"""A run as frozen dataclasses, read from TOML and `key=value` words; unknown keys are refused with the nearest name.

Standard library only, so that `kilofed ls` and `kilofed show` need no torch.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal, cast

import tomli_w

from kilofed.config.fields import Table, Value, build
from kilofed.errors import RecipeError, nearest

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSpec:
    """The base model that every party starts from."""

    path: str = "builtin:small"
    """`builtin:small`, `builtin:large`, a local directory, or a hub id (needs the network)."""
    dtype: Dtype = "float32"
    """Dtype of the frozen weights; trained tensors are float32 unless adapter.kind is full."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1, mps."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty takes the default branch."""


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained and sent."""

    kind: Literal["lora", "full"] = "lora"
    """lora: low-rank adapters (Hu et al. 2021, arXiv:2106.09685); full: every parameter."""
    rank: int = 8
    """Rank of each LoRA factor; raising it costs bytes and memory in proportion."""
    alpha: float = 16.0
    """LoRA scale numerator: the product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout in front of each LoRA product, 0 to 1."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names that get an adapter; all-linear takes every linear layer but the output head."""
    head: Literal["mean", "stock"] = "mean"
    """What data.task=classify puts on the model, trained and sent beside the adapter. mean: the mean of the last hidden
    states, at unit length, into one linear layer; stock: what transformers has for the architecture."""


@dataclass(frozen=True)
class ColumnsSpec:
    """Which column holds what: the response column decides, else messages, else text; to classify, text and label."""

    instruction: str = "instruction"
    context: str = "context"
    response: str = "response"
    messages: str = "messages"
    """Column with a list of {role, content}; the assistant's turns are learnt."""
    text: str = "text"
    """Column with running text, of which every token is learnt; to classify, what is classified."""
    label: str = "label"
    """Column with the name of a row's class; read with data.task=classify only."""


@dataclass(frozen=True)
class PartitionSpec:
    """Who holds which rows."""

    kind: Literal["auto", "column", "iid", "dirichlet", "size", "pathological"] = "auto"
    """column: a client per value; dirichlet: label skew; size: skewed sizes; pathological: few labels each;
    auto: column where the rows have that column, else iid."""
    num_clients: int = 5
    """Number of clients; `column` takes one per value instead."""
    column: str = "client"
    """Column with the natural owner (column) or the label (dirichlet, pathological)."""
    alpha: float = 0.5
    """Dirichlet concentration; smaller is more skewed."""
    classes: int = 2
    """Labels per client (pathological)."""
    min_rows: int = 1
    """Rows that every client must hold; a draw with fewer is repeated (dirichlet) or refused."""


@dataclass(frozen=True)
class DataSpec:
    """The rows, how they are read and how they become tokens."""

    source: str = "pydocs"
    """`pydocs`, `gazetteer`, a .jsonl, .jsonl.gz, .csv or .parquet file, a directory, or a hub id."""
    test: str = ""
    """A file with held-out rows; empty takes the source's own test split, else a share of each client's rows."""
    holdout: float = 0.1
    """Share of each client's rows kept for testing where no test rows are given."""
    template: str = ""
    """Named prompt template; empty takes the tokeniser's chat template, else `plain`."""
    max_length: int = 256
    """Longest example in tokens; the prompt is cut from the left, the response from the right."""
    max_rows: int = 0
    """Most training rows read; 0 takes all."""
    max_test_rows: int = 0
    """Most held-out rows per client; 0 takes all."""
    public: str = ""
    """Rows that the server holds and every party may see, for methods that learn from such: a file, directory or hub id."""
    public_share: float = 0.0
    """Share of the training rows that goes to the server as public rows instead of to a client, where `public` is empty."""
    task: Literal["generate", "classify"] = "generate"
    """generate: tokens are learnt and written; classify: a row has one of a few labels."""
    labels: tuple[str, ...] = ()
    """The labels that all parties agreed on (classify); empty takes those of the training rows, sorted as text."""
    columns: ColumnsSpec = field(default_factory=ColumnsSpec)
    partition: PartitionSpec = field(default_factory=PartitionSpec)
    options: dict[str, Value] = field(default_factory=dict)
    """Options of an embedded source, such as train_rows."""


@dataclass(frozen=True)
class MethodSpec:
    """The federated method and its own fields (`kilofed show NAME` lists them)."""

    name: str = "fedavg"
    """A file of kilofed.methods, or my_package.my_file."""
    fields: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSpec:
    """How anything is trained by gradients: each client in its round, local-only and central alike."""

    steps: int = 10
    """Optimiser steps per round and client; more means fewer rounds and more drift."""
    epochs: int = 0
    """Passes over the client's rows per round; when above 0 it replaces steps."""
    batch_size: int = 8
    """Examples per optimiser step."""
    accumulation: int = 1
    """Parts that a batch is cut into; each part is one forward and backward, memory falls accordingly."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw and adam use betas 0.9, 0.999; sgd has no momentum."""
    weight_decay: float = 0.0
    """Decoupled with adamw, L2 with adam and sgd."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over all rounds, after the warm-up; linear and cosine end at 0."""
    warmup: float = 0.0
    """Share of all steps in which the learning rate rises from 0."""
    max_grad_norm: float = 0.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    autocast: Literal["", "bfloat16"] = ""
    """bfloat16 computes forward and backward in mixed precision."""


@dataclass(frozen=True)
class PrivacySpec:
    """What happens to an update before the method may see it."""

    kind: Literal["none", "central", "rows"] = "none"
    """central: clip at the client, Gaussian noise on the mean at a trusted server; rows: each hidden state of split
    learning is clipped and gets Gaussian noise at the client, which hides tokens a little and guarantees nothing."""
    clip: float = 1.0
    """Largest L2 norm of one client's update, or of one hidden state; `inf` leaves updates as they are."""
    noise_multiplier: float = 1.0
    """Standard deviation of the noise on the sum, or on the whole of a hidden state, in units of clip."""
    delta: float = 1e-5
    """Delta at which the spent epsilon is reported."""
    noise_key: str = ""
    """32 hex digits that fix the noise, for tests; empty draws a secret that stays in the run folder."""


@dataclass(frozen=True)
class EngineSpec:
    """What moves bytes between the server and the clients."""

    name: Literal["inprocess", "pool", "stream", "flower"] = "inprocess"
    """inprocess: one after the other; pool: worker processes; stream: a process per client on an open connection (extra
    `stream`); flower: Flower's simulation (extra `flower`)."""
    workers: int = 2
    """Worker processes of pool and flower."""
    threads: int = 0
    """Threads that torch may use in each process; 0 leaves torch's own choice."""
    timeout: float = 3600.0
    """Seconds after which a client that has not answered is left out of an exchange."""


@dataclass(frozen=True)
class EvaluateSpec:
    """What is measured on held-out rows."""

    every: int = 1
    """Rounds between evaluations; the last round is always evaluated."""
    batch_size: int = 32
    """Examples per forward."""
    generate: int = 8
    """Held-out rows per client that are answered in full for ROUGE-L and exact match; 0 skips both."""
    max_new_tokens: int = 32
    """Longest generated answer, in tokens."""
    max_local: int = 16
    """Most clients that are trained alone for the local-only row."""
    costs: bool = False
    """Count floating-point operations and memory of clients and server in the first round, which slows that round and
    may change last bits."""
    controls: tuple[str, ...] = ("base", "local", "central")
    """Rows beside the federated one: base (untouched), local (each client alone), central (all data)."""


@dataclass(frozen=True)
class Recipe:
    """One run: what is tuned, on whose rows, by which method, moved and measured how."""

    name: str = "recipe"
    """Shown in reports and in the run folder's name."""
    about: str = ""
    """One sentence for `kilofed ls recipes`."""
    rounds: int = 5
    """Rounds of the method."""
    cohort: int = 0
    """Clients drawn per round; 0 takes all."""
    quorum: int = 1
    """Fewest replies with which a round goes on."""
    on_failure: Literal["stop", "skip"] = "stop"
    """stop: a client's failure ends the run, state kept; skip: the round goes on without that client."""
    seed: int = 0
    """Root of every random draw."""
    seeds: int = 1
    """Repeats with seed, seed + 1, ...; intervals are then over repeats."""
    model: ModelSpec = field(default_factory=ModelSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    data: DataSpec = field(default_factory=DataSpec)
    method: MethodSpec = field(default_factory=MethodSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)


def load(source: str | Path, overrides: Mapping[str, Value] | None = None) -> Recipe:
    """The recipe named or stored at `source`, with `overrides` such as {"train.lr": 1e-3} laid over it.

    Args:
        source: name of a shipped recipe, or path of a TOML file.
        overrides: dotted keys; a table given as one word sets its first field (`model=DIR`, `data=FILE`).

    Raises:
        RecipeError: no such recipe, unknown key, wrong type, value out of range.
    """
    table = read_table(source)
    lay_over(table, overrides or {})
    return from_table(table)


def from_table(table: Table) -> Recipe:
    """The recipe that `table` (nested, as TOML gives it) describes; raises RecipeError."""
    recipe = build(Recipe, _method_fields(table))
    _check_ranges(recipe)
    return recipe


def changed(recipe: Recipe, overrides: Mapping[str, Value]) -> Recipe:
    """`recipe` with `overrides` laid over it; raises RecipeError."""
    table = to_table(recipe)
    lay_over(table, overrides)
    return from_table(table)


def to_table(recipe: Recipe) -> dict[str, Value]:
    """Every field as plain nested values; `from_table` gives the same recipe back."""
    table = cast(dict[str, Value], _plain(recipe))
    method = cast(dict[str, Value], table["method"])
    table["method"] = {"name": method["name"], **cast(dict[str, Value], method["fields"])}
    return table


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML text."""
    return tomli_w.dumps(to_table(recipe))


def parse_words(words: Sequence[str]) -> dict[str, Value]:
    """`key=value` words as overrides; a value that is no TOML value is text. Raises RecipeError."""
    overrides: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"{word!r} is not key=value, such as train.lr=0.001")
        try:
            overrides[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key] = text
    return overrides


def shipped() -> dict[str, str]:
    """Names of the shipped recipes and their sentence."""
    folder = resources.files("kilofed") / "recipes"
    found = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    tables = {name[:-5]: tomllib.loads((folder / name).read_text("utf-8")) for name in found}
    return {name: str(table.get("about", "")) for name, table in tables.items()}


def text_of(source: str | Path) -> str:
    """The TOML text of a shipped recipe or a recipe file. Raises RecipeError: there is none."""
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {path}; check the path, or see `kilofed ls recipes`")
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if str(source) not in shipped():
        raise RecipeError(f"{source} is neither a shipped recipe nor a .toml file{nearest(str(source), shipped())}")
    return (resources.files("kilofed") / "recipes" / f"{source}.toml").read_text("utf-8")


def read_table(source: str | Path) -> dict[str, Value]:
    """A recipe as its file has it, nested; raises RecipeError: there is none, or it is not TOML."""
    try:
        return tomllib.loads(text_of(source))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not valid TOML: {error}") from error


def lay_over(table: dict[str, Value], overrides: Mapping[str, Value]) -> None:
    """Write dotted keys and their values into `table`; raises RecipeError: no such key."""
    data = table.get("data")
    if isinstance(data, dict) and overrides.keys() & {"data", "data.source"}:
        data.pop("options", None)  # They were those of the source that is laid over.
    for key, value in overrides.items():
        _lay_over(table, key, value)


def _lay_over(table: dict[str, Value], key: str, value: Value) -> None:
    *path, last = key.split(".")
    here = table
    below: Value | None
    for name in path:
        below = here.setdefault(name, {})
        if not isinstance(below, dict):  # `model = "x"` in the file, `model.dtype=...` on top
            below = here[name] = {_first_field(key.split(".")[: path.index(name) + 1]): below}
        here = below
    below = here.get(last)
    if isinstance(below, dict) and not isinstance(value, dict) and path != ["method"]:
        below[_first_field(key.split("."))] = value
    else:
        here[last] = value


def _first_field(path: Sequence[str]) -> str:
    if path[0] == "method" and len(path) > 1:  # Its tables are known to the method alone.
        raise RecipeError(
            f"{'.'.join(path)} is a single word here: give it as a table, [{'.'.join(path)}], in a recipe"
        )
    cls: object = Recipe
    for name in path:
        hints = typing.get_type_hints(cls)
        if name not in hints:
            raise RecipeError(f"{'.'.join(path)} is not a key of a recipe{nearest(name, hints)}")
        cls = hints[name]
    if not dataclasses.is_dataclass(cls):
        raise RecipeError(f"{'.'.join(path)} takes a table, such as {path[-1]}.name=value")
    return dataclasses.fields(cls)[0].name


def _method_fields(table: Table) -> Table:
    method = table.get("method")
    if not isinstance(method, dict):
        return table
    fields = {key: value for key, value in method.items() if key != "name"}
    return {**table, "method": {"name": method.get("name", "fedavg"), "fields": fields}}


def _plain(value: object) -> Value:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    assert isinstance(value, str | int | float | bool)
    return value


def _check_ranges(recipe: Recipe) -> None:
    least: dict[str, tuple[float, float]] = {
        "rounds": (recipe.rounds, 1),
        "seeds": (recipe.seeds, 1),
        "cohort": (recipe.cohort, 0),
        "quorum": (recipe.quorum, 1),
        "adapter.rank": (recipe.adapter.rank, 1),
        "data.max_length": (recipe.data.max_length, 8),
        "data.partition.num_clients": (recipe.data.partition.num_clients, 0),
        "train.steps": (recipe.train.steps, 1),
        "train.epochs": (recipe.train.epochs, 0),
        "train.batch_size": (recipe.train.batch_size, 1),
        "train.accumulation": (recipe.train.accumulation, 1),
        "train.lr": (recipe.train.lr, 0),
        "privacy.clip": (recipe.privacy.clip, 0),
        "privacy.noise_multiplier": (recipe.privacy.noise_multiplier, 0),
        "engine.workers": (recipe.engine.workers, 1),
        "evaluate.every": (recipe.evaluate.every, 1),
        "evaluate.generate": (recipe.evaluate.generate, 0),
    }
    for key, (value, lowest) in least.items():
        if not value >= lowest:
            raise RecipeError(f"{key} is {value}; expected at least {lowest}")
    if not 0 <= recipe.data.holdout < 1:
        raise RecipeError(f"data.holdout is {recipe.data.holdout}; expected a share from 0 to below 1")
    if not 0 <= recipe.data.public_share < 1:
        raise RecipeError(f"data.public_share is {recipe.data.public_share}; expected a share from 0 to below 1")
    if recipe.cohort and recipe.quorum > recipe.cohort:
        raise RecipeError(f"quorum is {recipe.quorum} but only {recipe.cohort} clients are drawn per round")
    if unknown := set(recipe.evaluate.controls) - {"base", "local", "central"}:
        raise RecipeError(f"evaluate.controls has {sorted(unknown)}; expected base, local, central")
