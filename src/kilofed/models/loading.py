"""Load a base model with its adapter, and take its trained tensors out and put them back."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kilofed import hub
from kilofed.config.recipe import AdapterSpec, ModelSpec
from kilofed.errors import ModelError
from kilofed.models.halves import Part, trim
from kilofed.models.heads import MeanClassifier

log = logging.getLogger("kilofed")


def locate(spec: ModelSpec) -> str:
    """The local directory or hub id that `spec.path` means. Raises ModelError: no such directory."""
    path = spec.path
    if path.startswith("builtin:"):
        folder = resources.files("kilofed") / "assets" / path.removeprefix("builtin:")
        if not folder.is_dir():
            raise ModelError(f"{path} is not shipped; there is builtin:small and builtin:large")
        return str(folder)
    if path.startswith("package:"):
        return _in_package(path.removeprefix("package:"))
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(f"there is no model directory {path}; check model.path")
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    hub.settle()
    return path


def find_device(name: str) -> torch.device:
    """The device of that name. Raises ModelError: there is none here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device={name} is no device: use cpu, cuda, cuda:1 or mps") from error
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise ModelError(f"model.device={name}, but there are {cards} CUDA devices here: use cpu or another")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("model.device=mps is not to be had here: use cpu")
    return device


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokeniser with a padding token. Raises ModelError."""
    with _said(spec, "tokeniser"):
        tokenizer = AutoTokenizer.from_pretrained(locate(spec), **_revision(spec))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokeniser of {spec.path} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_base(spec: ModelSpec) -> PreTrainedModel:
    """The base model in spec.dtype on spec.device, in eval mode. Raises ModelError."""
    device = find_device(spec.device)
    with _said(spec, "model"), quiet():
        model = _pretrained(AutoModelForCausalLM, spec, {})
    module = cast(nn.Module, model).to(device).eval()
    return cast(PreTrainedModel, module)


def load_classifier(spec: ModelSpec, head: str, seed: int, classes: Sequence[str]) -> nn.Module:
    """The base model with a fresh head for `classes`, in eval mode; equal seeds give equal heads.

    Args:
        head: `mean` (`MeanClassifier`) or `stock` (what transformers has for the architecture).

    Raises:
        ModelError: it cannot be loaded, or transformers has no such class for it.
    """
    device = find_device(spec.device)
    kind = AutoModel if head == "mean" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), _said(spec, "model"), quiet():
        torch.manual_seed(seed)
        model = _headed(_pretrained(kind, spec, _numbered(classes)), head, len(classes))
        if isinstance(spec, Part):
            trim(model, spec.num_blocks, head=spec.head)
        return model.to(device).eval()


def load_model(spec: ModelSpec, adapter: AdapterSpec, seed: int, classes: Sequence[str] = ()) -> nn.Module:
    """The base model with what `adapter` trains; equal seeds give equal trained tensors.

    Args:
        classes: names of the classes, for a model that classifies; empty for one that generates.

    Raises:
        ModelError: the model cannot be loaded, or the adapter's targets match nothing (with the names that exist).
    """
    base = load_classifier(spec, adapter.head, seed, classes) if classes else load_base(spec)
    return add_adapter(base, adapter, seed)


def outline(spec: ModelSpec, adapter: AdapterSpec, classes: Sequence[str] = ()) -> PreTrainedModel:
    """The model of `load_model` without its weights: names, shapes, sizes, for the price of its config. Raises ModelError."""
    with _said(spec, "config"), quiet():
        config = AutoConfig.from_pretrained(locate(spec), **_numbered(classes), **_revision(spec))
        kind = AutoModel if adapter.head == "mean" else AutoModelForSequenceClassification
        with torch.device("meta"):
            auto = kind if classes else AutoModelForCausalLM
            base = auto.from_config(config, dtype=getattr(torch, spec.dtype))  # type: ignore[no-untyped-call]
            if classes:
                base = _headed(base, adapter.head, len(classes))
            if isinstance(spec, Part):
                trim(base, spec.num_blocks, head=spec.head)
    return cast(PreTrainedModel, add_adapter(base, adapter, 0))


def add_adapter(base: nn.Module, adapter: AdapterSpec, seed: int) -> nn.Module:
    """`base` with the trained tensors of `adapter` marked by requires_grad; changes `base`. Raises ModelError."""
    if adapter.kind == "full":
        for parameter in base.parameters():
            parameter.requires_grad_(True)
        return base
    from peft import LoraConfig, get_peft_model

    named = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in named})
    everything = adapter.targets == ("all-linear",)
    kind, own_head = _kind_of(base)
    missing = [t for t in adapter.targets if not any(n == t or n.endswith("." + t) for n in named)]
    if missing and not everything:
        raise ModelError(
            f"adapter.targets has {', '.join(missing)}, which match nothing; there is {', '.join(leaves)}"
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if everything else list(adapter.targets),
        task_type=kind,
        modules_to_save=own_head,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = get_peft_model(cast(PreTrainedModel, base), config)
    return cast(nn.Module, model.eval())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained and sent, by the short name that travels; tied ones once."""
    return {_short(name): p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def trained_names(model: nn.Module) -> dict[str, str]:
    """Where the trained parameters stand in `model`, by the short name that travels."""
    return {_short(name): name for name, p in sorted(model.named_parameters()) if p.requires_grad}


def read_trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained tensors, float32 on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained(model).items()}


def write_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` into `model`, by name; names that the model does not train are ignored.

    Raises:
        ModelError: a trained tensor is missing or of another shape.
    """
    with torch.no_grad():
        for name, parameter in trained(model).items():
            value = tensors.get(name)
            if value is None or value.shape != parameter.shape:
                seen = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ModelError(f"{name} {seen}; this model trains it with shape {tuple(parameter.shape)}")
            parameter.copy_(value)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The untouched base inside `model`, for as long as the block runs; a full model is returned as it is."""
    disable = getattr(model, "disable_adapter", None)
    with disable() if disable else contextlib.nullcontext():
        yield model


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write what was trained in PEFT's format; a full model as a whole model directory."""
    with quiet():
        cast(PreTrainedModel, model).save_pretrained(str(folder), safe_serialization=True)


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain transformers model with the adapter folded in; uses up `model`."""
    fold = getattr(model, "merge_and_unload", None)
    return cast(PreTrainedModel, fold() if fold else model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars and notices of transformers and peft."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


Auto = type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]
Numbered = dict[str, dict[int, str] | dict[str, int]]


def _pretrained(kind: Auto, spec: ModelSpec, numbered: Numbered) -> PreTrainedModel:
    """The model of `spec`; of a Part only that part is read from a safetensors file."""
    place, options = locate(spec), {**numbered, **_revision(spec)}
    dtype = getattr(torch, spec.dtype)
    if not isinstance(spec, Part):
        return cast(PreTrainedModel, kind.from_pretrained(place, dtype=dtype, **options))
    config = AutoConfig.from_pretrained(place, **options)
    with torch.device("meta"):
        trimmed = _trimmed(type(kind.from_config(config)), spec)  # type: ignore[no-untyped-call]
    return trimmed.from_pretrained(place, config=config, dtype=dtype, revision=spec.revision or "main")


def _trimmed(whole: type[PreTrainedModel], part: Part) -> type[PreTrainedModel]:
    """`whole` that has lost all but `part` before its weights are read."""

    def begin(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        if not part.head:
            config.tie_word_embeddings = False  # There is no output head to tie.
        whole.__init__(self, config)
        trim(self, part.num_blocks, head=part.head)

    # Under the name and module of `whole`: transformers finds the names that its weights had in older files by them.
    return type(whole.__name__, (whole,), {"__init__": begin, "__module__": whole.__module__})


def _headed(base: nn.Module, head: str, num_classes: int) -> nn.Module:
    if head == "mean":
        return MeanClassifier(cast(PreTrainedModel, base), num_classes)
    # Decoders look for the last token that is no padding, and `train.collate` pads with 0.
    cast(PreTrainedModel, base).config.pad_token_id = 0
    return base


def _numbered(classes: Sequence[str]) -> Numbered:
    """The classes as a config keeps them."""
    if not classes:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _kind_of(base: nn.Module) -> tuple[str | None, list[str] | None]:
    """PEFT's name for what the model does, and the head that is trained whole."""
    if isinstance(base, MeanClassifier):
        return None, ["score"]
    classifies = type(base).__name__.endswith("ForSequenceClassification")
    return ("SEQ_CLS" if classifies else "CAUSAL_LM"), None


def _in_package(path: str) -> str:
    """The directory NAME/FOLDER of an installed Python package, which is not imported."""
    name, _, below = path.partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0], below) if places else None
    if folder is None or not folder.is_dir():
        seen = f"which has no folder {below}" if places else "which is not installed"
        raise ModelError(f"model.path=package:{path} names the Python package {name!r}, {seen}: check both")
    return str(folder)


def _short(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return name.replace(".default.", ".")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _revision(spec: ModelSpec) -> dict[str, str]:
    return {"revision": spec.revision} if spec.revision else {}


@contextlib.contextmanager
def _said(spec: ModelSpec, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().splitlines()[0][:300]
        raise ModelError(
            f"cannot load the {what} of {spec.path} ({first}): expected a local model directory, "
            "or a hub id with the network up or the model in the cache"
        ) from error
