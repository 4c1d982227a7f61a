"""Models with one recipe's adapter, each loaded once and kept in memory."""

from collections.abc import Sequence

from torch import Tensor, nn

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.models import loading


class ModelStore:
    """The models of one process by their ModelSpec.

    Args:
        adapter: adapter of each model.
        seed: equal seeds give equal trained tensors before training.
        classes: names of the classes of classifiers; empty for language models.
    """

    def __init__(self, adapter: AdapterSpec, seed: int, classes: Sequence[str] = ()) -> None:
        self._adapter, self._seed, self._classes = adapter, seed, tuple(classes)
        self._models: dict[ModelSpec, nn.Module] = {}
        self._starts: dict[ModelSpec, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Number of models in memory."""
        return len(self._models)

    def model(self, spec: ModelSpec) -> nn.Module:
        """The model of `spec`, shared by all callers, so write the trained tensors before use. Raises ModelError."""
        if spec not in self._models:
            self._models[spec] = self._load(spec)
        return self._models[spec]

    def start(self, spec: ModelSpec) -> dict[str, Tensor]:
        """The trained tensors of the model of `spec` before any training, from a separately loaded model.

        Raises:
            ModelError: it cannot be loaded.
        """
        if spec not in self._starts:
            self._starts[spec] = loading.read_trained(self._load(spec))
        return self._starts[spec]

    def _load(self, spec: ModelSpec) -> nn.Module:
        return loading.load_model(spec, self._adapter, self._seed, self._classes)
