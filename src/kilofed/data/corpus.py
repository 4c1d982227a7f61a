"""The rows of one source: read, partitioned over clients, and tokenised for each model.

Everything is loaded at its first use and kept. A corpus of one client needs no other client's rows, so a site that has
only its own can make one too.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from kilofed.config.recipe import ModelSpec, Recipe
from kilofed.data import public
from kilofed.data.examples import Example, Renderer, class_names
from kilofed.data.formats import Row
from kilofed.data.notices import Warn, log_warning
from kilofed.data.partition import Share, divide
from kilofed.data.readers import Rows, layout, read, set_aside
from kilofed.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Corpus:
    """Rows, shares and examples of the clients that `recipe.data` describes.

    Args:
        recipe: its data, its seed, and its model for the tokeniser.
        tokenizer_of: loads the tokeniser of a model; called once per model.
        warn: is told of rows, columns and files that are skipped.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer_of: "Callable[[ModelSpec], PreTrainedTokenizerBase]",
        *,
        warn: Warn = log_warning,
    ) -> None:
        self._warn = warn
        self._data, self._seed, self._model = recipe.data, recipe.seed, recipe.model
        self._tokenizer_of = tokenizer_of
        self._renderers: dict[tuple[str, str], Renderer] = {}
        self._train: dict[tuple[int, int], list[Example]] = {}
        self._test: dict[int, list[Example]] = {}
        self._public: dict[int, list[Example]] = {}

    @property
    def rows(self) -> Rows:
        """The rows of all clients, before the partition. Raises DataError."""
        return self._rows[0]

    @property
    def public_rows(self) -> list[Row]:
        """The public rows; empty if the recipe has none. Raises DataError."""
        return self._rows[1]

    @cached_property
    def _rows(self) -> tuple[Rows, list[Row]]:
        return set_aside(read(self._data, self._seed, warn=self._warn), self._data, self._seed, warn=self._warn)

    @cached_property
    def shares(self) -> list[Share]:
        """Each client's rows, by client id. Raises DataError."""
        return divide(self.rows, self._data, self._seed, warn=self._warn)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices; empty for language models. Raises DataError."""
        spec = self._data
        return class_names(spec, self.rows) if spec.task == "classify" or spec.labels else ()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokeniser of the recipe's model. Raises ModelError."""
        return self._tokenizer_of(self._model)

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer for the recipe's model. Raises DataError, ModelError."""
        return Renderer(self.tokenizer, self._data, self.layout, self.classes, warn=self._warn)

    @cached_property
    def layout(self) -> str:
        """The layout of the rows: `response`, `messages`, `text` or `label`. Raises DataError."""
        return layout(self._data.columns, self.rows.train, self._data.task)

    def renderer_of(self, spec: ModelSpec) -> Renderer:
        """The renderer for the model of `spec`, which in classification may have another tokeniser than the recipe's.

        Raises:
            ModelError: a language model's vocabulary is not that of the recipe's model.
        """
        key = spec.path, spec.revision
        if key == (self._model.path, self._model.revision):
            return self.renderer
        if key not in self._renderers:
            self._renderers[key] = self._other_renderer(spec)
        return self._renderers[key]

    def train_examples(self, client: int, spec: ModelSpec | None = None) -> list[Example]:
        """Training examples of client `client` for the model of `spec`, by default the recipe's.

        Raises:
            DataError: none of its rows has a target.
        """
        renderer = self.renderer_of(spec or self._model)
        if (client, id(renderer)) not in self._train:
            examples = renderer(self.shares[client].train)
            if not examples:
                raise DataError(
                    f"client {self.shares[client].name:.80}: no row has an answer within data.max_length="
                    f"{self._data.max_length} tokens; raise it, or check data.columns"
                )
            self._train[client, id(renderer)] = examples
        return self._train[client, id(renderer)]

    def test_examples(self, client: int) -> list[Example]:
        """Held-out examples of client `client`; empty if it has none."""
        if client not in self._test:
            self._test[client] = self.renderer(self.shares[client].test)
        return self._test[client]

    def public_examples(self, spec: ModelSpec | None = None) -> list[Example]:
        """Public examples for the model of `spec`, by default the recipe's; empty if the recipe has none.

        Raises:
            DataError: they have other columns or labels than the private ones.
        """
        renderer = self.renderer_of(spec or self._model)
        if id(renderer) not in self._public:
            self._public[id(renderer)] = public.examples(self.public_rows, self._data, renderer, self.classes)
        return self._public[id(renderer)]

    def tokenize(self) -> None:
        """Read and tokenise the training rows of all clients now instead of at their first use."""
        for client in range(len(self.shares)):
            self.train_examples(client)

    def _other_renderer(self, spec: ModelSpec) -> Renderer:
        tokenizer = self._tokenizer_of(spec)
        if tokenizer.get_vocab() == self.tokenizer.get_vocab():
            return self.renderer
        if not self.classes:
            raise ModelError(
                f"{spec.path} has another vocabulary than {self._model.path} ({len(tokenizer)} and "
                f"{len(self.tokenizer)} tokens); use language models with one tokeniser"
            )
        return Renderer(tokenizer, self._data, self.layout, self.classes, warn=self._warn)
