"""A run as frozen dataclasses: every setting with its bounds and what it does.

Imports nothing heavy, so that `kilofed ls` and `kilofed show` need no torch.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from kilofed.config.bounds import Or, Settings
from kilofed.config.fields import FormerName, FormerValue, Value
from kilofed.errors import RecipeError

Dtype = Literal["float32", "bfloat16", "float16"]
Baseline = Annotated[Literal["base", "local", "centralized"], FormerValue("central", "centralized")]


@dataclass(frozen=True)
class ModelSpec(Settings):
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
class AdapterSpec(Settings):
    """What is trained and sent."""

    kind: Literal["lora", "full"] = "lora"
    """lora: low-rank adapters (Hu et al. 2021, arXiv:2106.09685); full: every parameter."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank of each LoRA factor; raising it costs bytes and memory in proportion."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """LoRA scale numerator: the product is scaled by alpha / rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout in front of each LoRA product."""
    targets: Annotated[tuple[str, ...], MinLen(1)] = ("all-linear",)
    """Module names that get an adapter; all-linear takes every linear layer but the output head."""
    head: Literal["mean", "stock"] = "mean"
    """What data.task=classify puts on the model, trained and sent beside the adapter. mean: the mean of the last hidden
    states, at unit length, into one linear layer; stock: what transformers has for the architecture."""


@dataclass(frozen=True)
class ColumnsSpec(Settings):
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
class PartitionSpec(Settings):
    """Who holds which rows."""

    kind: Literal["auto", "column", "iid", "dirichlet", "size", "pathological"] = "auto"
    """column: a client per value; dirichlet: label skew; size: skewed sizes; pathological: few labels each;
    auto: column where the rows have that column, else iid."""
    num_clients: Annotated[int, Ge(1)] = 5
    """Number of clients; `column` takes one per value instead."""
    column: str = "client"
    """Column with the natural owner (column) or the label (dirichlet, pathological)."""
    alpha: Annotated[float, Gt(0)] = 0.5
    """Dirichlet concentration; smaller is more skewed."""
    classes: Annotated[int, Ge(1)] = 2
    """Labels per client (pathological)."""
    min_rows: Annotated[int, Ge(1)] = 1
    """Rows that every client must hold; a draw with fewer is repeated (dirichlet) or refused."""


@dataclass(frozen=True)
class DataSpec(Settings):
    """The rows, how they are read and how they become tokens."""

    source: str = "pydocs"
    """`pydocs`, `gazetteer`, a .jsonl, .jsonl.gz, .csv or .parquet file, a directory, or a hub id."""
    test: str = ""
    """A file with held-out rows; empty takes the source's own test split, else a share of each client's rows."""
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of each client's rows kept for testing where no test rows are given."""
    template: str = ""
    """Named prompt template; empty takes the tokeniser's chat template, else `plain`."""
    max_length: Annotated[int, Ge(8)] = 256
    """Longest example in tokens; the prompt is cut from the left, the response from the right."""
    max_rows: Annotated[int, Ge(0)] = 0
    """Most training rows read; 0 takes all."""
    max_test_rows: Annotated[int, Ge(0)] = 0
    """Most held-out rows per client; 0 takes all."""
    public: str = ""
    """Rows that the server holds and every party may see, for methods that learn from such: a file, directory or hub id."""
    public_share: Annotated[float, Interval(ge=0, lt=1)] = 0.0
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
class MethodSpec(Settings):
    """The federated method and its own fields (`kilofed show NAME` lists them)."""

    name: str = "fedavg"
    """A file of kilofed.methods, or my_package.my_file."""
    fields: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSpec(Settings):
    """How anything is trained by gradients: each client in its round, local-only and centralized alike."""

    steps: Annotated[int, Ge(1)] = 10
    """Optimiser steps per round and client; more means fewer rounds and more drift."""
    epochs: Annotated[int, Ge(0)] = 0
    """Passes over the client's rows per round; when above 0 it replaces steps."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Examples per optimiser step."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Parts that a batch is cut into; each part is one forward and backward, memory falls accordingly."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw and adam use betas 0.9, 0.999; sgd has no momentum."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled with adamw, L2 with adam and sgd."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over all rounds, after the warm-up; linear and cosine end at 0."""
    warmup: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of all steps in which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Ge(0)] = 0.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    autocast: Literal["", "bfloat16"] = ""
    """bfloat16 computes forward and backward in mixed precision."""


@dataclass(frozen=True)
class PrivacySpec(Settings):
    """What happens to an update before the method may see it."""

    kind: Annotated[Literal["none", "central", "activations"], FormerValue("rows", "activations")] = "none"
    """central: clip at the client, Gaussian noise on the mean at a trusted server; activations: each hidden state of split
    learning is clipped and gets Gaussian noise at the client, which hides tokens a little and guarantees nothing."""
    clip: Annotated[float, Gt(0), Or(math.inf)] = 1.0
    """Largest L2 norm of one client's update, or of one hidden state; `inf` leaves updates as they are."""
    noise_multiplier: Annotated[float, Ge(0)] = 1.0
    """Standard deviation of the noise on the sum, or on the whole of a hidden state, in units of clip."""
    delta: Annotated[float, Interval(gt=0, lt=1)] = 1e-5
    """Delta at which the spent epsilon is reported."""
    noise_key: str = ""
    """32 hex digits that fix the noise, for tests; empty draws a secret that stays in the run folder."""


@dataclass(frozen=True)
class EngineSpec(Settings):
    """What moves bytes between the server and the clients."""

    name: Literal["inprocess", "pool", "stream", "flower"] = "inprocess"
    """inprocess: one after the other; pool: worker processes; stream: a process per client on an open connection (extra
    `stream`); flower: Flower's simulation (extra `flower`)."""
    workers: Annotated[int, Ge(1)] = 2
    """Worker processes of pool and flower."""
    threads: Annotated[int, Ge(0)] = 0
    """Threads that torch may use in each process; 0 leaves torch's own choice."""
    timeout: Annotated[float, Gt(0)] = 3600.0
    """Seconds after which a client that has not answered is left out of an exchange."""


@dataclass(frozen=True)
class EvaluateSpec(Settings):
    """What is measured on held-out rows."""

    every: Annotated[int, Ge(1)] = 1
    """Rounds between evaluations; the last round is always evaluated."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Examples per forward."""
    generate: Annotated[int, Ge(0)] = 8
    """Held-out rows per client that are answered in full for ROUGE-L and exact match; 0 skips both."""
    max_new_tokens: Annotated[int, Ge(1)] = 32
    """Longest generated answer, in tokens."""
    max_local: Annotated[int, Ge(1)] = 16
    """Most clients that are trained alone for the local-only row."""
    costs: bool = False
    """Count floating-point operations and memory of clients and server in the first round, which slows that round and
    may change last bits."""
    baselines: Annotated[tuple[Baseline, ...], FormerName("controls")] = ("base", "local", "centralized")
    """Rows next to the federated one: base (untouched), local (each client alone), centralized (all rows in one place)."""


@dataclass(frozen=True)
class Recipe(Settings):
    """One run: what is tuned, on whose rows, by which method, moved and measured how."""

    name: str = "recipe"
    """Shown in reports and in the run folder's name."""
    about: str = ""
    """One sentence for `kilofed ls recipes`."""
    rounds: Annotated[int, Ge(1)] = 5
    """Rounds of the method."""
    cohort: Annotated[int, Ge(0)] = 0
    """Clients drawn per round; 0 takes all."""
    quorum: Annotated[int, Ge(1)] = 1
    """Fewest replies with which a round goes on."""
    on_failure: Literal["stop", "skip"] = "stop"
    """stop: a client's failure, of whatever kind, ends the run, state kept; skip: the round goes on without that client."""
    max_weight: Annotated[float, Ge(0)] = 0.0
    """Weights of clients above it are lowered to it; 0 lowers none. More than its rows allow no client may claim."""
    outliers: Literal["warn", "clip", "leave_out"] = "warn"
    """An update whose norm is far above the cohort's median. warn: it is named and taken; clip: scaled down to the largest
    norm that passes; leave_out: its client is left out of the round. The last two hold all updates of a round in memory."""
    outlier_ratio: Annotated[float, Gt(1)] = 10.0
    """How many times the cohort's median norm an update may have."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Root of every random draw."""
    seeds: Annotated[int, Ge(1)] = 1
    """Repeats with seed, seed + 1, ...; intervals are then over repeats."""
    model: ModelSpec = field(default_factory=ModelSpec)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    data: DataSpec = field(default_factory=DataSpec)
    method: MethodSpec = field(default_factory=MethodSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cohort and self.quorum > self.cohort:
            raise RecipeError(f"quorum is {self.quorum} but only {self.cohort} clients are drawn per round")
