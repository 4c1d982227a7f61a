"""Models that stay in memory, each loaded once, with what one recipe trains on them."""

from collections.abc import Sequence

from torch import Tensor, nn

from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.models import loading


class ModelStore:
    """The models of one process, by what they are loaded from.

    Args:
        adapter: what is trained on each.
        seed: equal seeds give equal trained tensors before training.
        classes: names of the classes, for models that classify; empty for those that generate.
    """

    def __init__(self, adapter: AdapterSpec, seed: int, classes: Sequence[str] = ()) -> None:
        self._adapter, self._seed, self._classes = adapter, seed, tuple(classes)
        self._models: dict[ModelSpec, nn.Module] = {}
        self._starts: dict[ModelSpec, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """How many models are in memory."""
        return len(self._models)

    def model(self, spec: ModelSpec) -> nn.Module:
        """The resident model of `spec`; all who ask share it, so write into it before use. Raises ModelError."""
        if spec not in self._models:
            self._models[spec] = self._load(spec)
        return self._models[spec]

    def start(self, spec: ModelSpec) -> dict[str, Tensor]:
        """The trained tensors of the model of `spec` before any training, whatever the resident one holds.

        Raises:
            ModelError: it cannot be loaded.
        """
        if spec not in self._starts:
            self._starts[spec] = loading.read_trained(self._load(spec))
        return self._starts[spec]

    def _load(self, spec: ModelSpec) -> nn.Module:
        return loading.load_model(spec, self._adapter, self._seed, self._classes)
