"""What the parts of `kilofed check` look at, made once, and what they find."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from transformers import PreTrainedModel

from kilofed.config.recipe import DataSpec, Recipe
from kilofed.costs import environment
from kilofed.costs.counter import CostCounter
from kilofed.data.examples import Example, Renderer
from kilofed.data.formats import Row
from kilofed.data.notices import Warn, log_warning
from kilofed.errors import ModelError
from kilofed.federation.workload import RunPreview
from kilofed.models import loading
from kilofed.runs.preview import bench_of, preview_of, run_memory
from kilofed.runs.sites import Sites

Level = Literal["good", "warn", "bad"]

SAMPLE = 512
"""Most rows that are tokenised to look at masks and lengths."""
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the preflight."""

    level: Level
    name: str
    """What was looked at, such as `truncation`."""
    text: str
    """What was seen and, unless it is good, what to do."""


class Look:
    """What several parts look at, made once.

    Args:
        warn: is told of rows, columns and files that are skipped.
    """

    def __init__(self, recipe: Recipe, *, warn: Warn = log_warning) -> None:
        self.recipe, self._warn = recipe, warn
        self.sites = Sites(recipe, warn=warn)
        self.corpus = self.sites.corpus

    @cached_property
    def sample(self) -> list[Row]:
        """Training rows, evenly over clients, at most about SAMPLE."""
        shares = self.corpus.shares
        each = max(SAMPLE // len(shares), 1)
        return [row for share in shares[:SAMPLE] for row in share.train[:: max(len(share.train) // each, 1)][:each]]

    @cached_property
    def whole(self) -> list[Example]:
        """The sample's examples, not cut."""
        spec = replace(self.recipe.data, max_length=NO_LIMIT)
        return self.examples(spec)

    def examples(self, spec: DataSpec) -> list[Example]:
        """The sample's examples, cut and rendered as `spec` says."""
        corpus = self.corpus
        render = Renderer(corpus.tokenizer, spec, corpus.renderer.kind, corpus.classes, warn=self._warn)
        return render(self.sample)

    @cached_property
    def outline(self) -> PreTrainedModel:
        """The model with its adapter, without weights."""
        return loading.outline(self.recipe.model, self.recipe.adapter, self.corpus.classes)

    @cached_property
    def bench(self) -> CostCounter:
        """What counts the run's passes."""
        return bench_of(self.sites)

    @cached_property
    def preview(self) -> RunPreview:
        """The run's first round, on a model without numbers."""
        preview = preview_of(self.sites, self.bench)
        self.sites.method.check(preview.server)
        return preview

    @cached_property
    def needed(self) -> int | None:
        """Bytes of memory that the run needs beside the libraries; None where nobody can tell."""
        try:
            return run_memory(self.sites, self.preview, self.bench)
        except ModelError:  # Its own code looks at numbers, which are not there.
            return None

    @property
    def fits(self) -> bool:
        """Whether the model may be loaded."""
        return self.needed is None or self.needed <= self.free

    @cached_property
    def free(self) -> int:
        """Bytes of memory that it can have."""
        return environment.free_memory(loading.find_device(self.recipe.model.device))


def some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
