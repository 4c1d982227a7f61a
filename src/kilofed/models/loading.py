"""Load a base model with its adapter; read and write its trained tensors."""

import contextlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
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
from kilofed.files import said
from kilofed.models.halves import Part, trim
from kilofed.models.heads import MeanClassifier

log = logging.getLogger("kilofed")


def locate(spec: ModelSpec) -> str:
    """The local directory or hub id of `spec.path`. Raises ModelError: no such directory."""
    path = spec.path
    if path.startswith("builtin:"):
        folder = resources.files("kilofed") / "assets" / path.removeprefix("builtin:")
        if not folder.is_dir():
            raise ModelError(f"{path} does not exist; expected builtin:small or builtin:large")
        return str(folder)
    if path.startswith("package:"):
        return _folder_in_package(path.removeprefix("package:"))
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(f"model directory {path} does not exist; check model.path")
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    hub.settle()
    return path


def find_device(name: str) -> torch.device:
    """The device of that name. Raises ModelError: not available."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device={name} is not a device; use cpu, cuda, cuda:1 or mps") from error
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_devices:
        raise ModelError(
            f"model.device={name} is not available; this machine has {num_devices} CUDA devices, use one of them or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("model.device=mps is not available; use cpu")
    return device


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokeniser with a padding token. Raises ModelError."""
    with _errors_named(spec, "tokeniser"):
        tokenizer = AutoTokenizer.from_pretrained(locate(spec), **_revision(spec))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokeniser of {spec.path} has neither a padding nor an end token; use one that has")
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_base(spec: ModelSpec) -> PreTrainedModel:
    """The base model in spec.dtype on spec.device, in eval mode. Raises ModelError."""
    device = find_device(spec.device)
    with _errors_named(spec, "model"), quiet():
        model = _pretrained(AutoModelForCausalLM, spec, {})
    module = cast(nn.Module, model).to(device).eval()
    return cast(PreTrainedModel, module)


def load_classifier(spec: ModelSpec, head: str, seed: int, classes: Sequence[str]) -> nn.Module:
    """The base model with a new head for `classes`, in eval mode; equal seeds give equal heads.

    Args:
        head: `mean` (`MeanClassifier`) or `stock` (the head of transformers for the architecture).

    Raises:
        ModelError: it cannot be loaded, or transformers has no such class for it.
    """
    device = find_device(spec.device)
    kind = AutoModel if head == "mean" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]), _errors_named(spec, "model"), quiet():
        torch.manual_seed(seed)
        model = _with_head(_pretrained(kind, spec, _label_options(classes)), head, len(classes))
        if isinstance(spec, Part):
            trim(model, spec.num_blocks, head=spec.head)
        return model.to(device).eval()


def load_model(spec: ModelSpec, adapter: AdapterSpec, seed: int, classes: Sequence[str] = ()) -> nn.Module:
    """The base model with the trained tensors of `adapter`; equal seeds give equal values.

    Args:
        classes: names of the classes of a classifier; empty for a language model.

    Raises:
        ModelError: the model cannot be loaded, or the adapter's targets match no module.
    """
    base = load_classifier(spec, adapter.head, seed, classes) if classes else load_base(spec)
    return add_adapter(base, adapter, seed)


def outline(spec: ModelSpec, adapter: AdapterSpec, classes: Sequence[str] = ()) -> PreTrainedModel:
    """The model of `load_model` on the meta device: names, shapes and dtypes without weights. Raises ModelError."""
    with _errors_named(spec, "config"), quiet():
        config = AutoConfig.from_pretrained(locate(spec), **_label_options(classes), **_revision(spec))
        kind = AutoModel if adapter.head == "mean" else AutoModelForSequenceClassification
        with torch.device("meta"):
            auto = kind if classes else AutoModelForCausalLM
            base = auto.from_config(config, dtype=getattr(torch, spec.dtype))  # type: ignore[no-untyped-call]
            if classes:
                base = _with_head(base, adapter.head, len(classes))
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

    linear_names = [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)
    ]
    choices = sorted({name.rsplit(".", 1)[-1] for name in linear_names})
    all_linear = adapter.targets == ("all-linear",)
    kind, modules_to_save = _peft_task(base)
    missing = [t for t in adapter.targets if not any(n == t or n.endswith("." + t) for n in linear_names)]
    if missing and not all_linear:
        raise ModelError(
            f"adapter.targets has {', '.join(missing)}, which match no module; choose from {', '.join(choices)}"
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if all_linear else list(adapter.targets),
        task_type=kind,
        modules_to_save=modules_to_save,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = get_peft_model(cast(PreTrainedModel, base), config)
    return cast(nn.Module, model.eval())


def classifies(model: nn.Module) -> bool:
    """Whether the model gives classes to rows, and no scores to tokens."""
    head = getattr(model, "get_output_embeddings", None)
    return head is None or head() is None


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their short name, which is used on the wire; tied ones once."""
    return {_short(name): p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def trained_names(model: nn.Module) -> dict[str, str]:
    """The trained parameters' names in `model`, by short name."""
    return {_short(name): name for name, p in sorted(model.named_parameters()) if p.requires_grad}


def read_trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained tensors, float32 on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trained(model).items()}


def write_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `model` by short name; names of tensors that are not trained are ignored.

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
    """`model` with its adapter disabled inside the block; a model without an adapter is returned as it is."""
    disable = getattr(model, "disable_adapter", None)
    with disable() if disable else contextlib.nullcontext():
        yield model


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter in PEFT's format, a fully trained model as a model directory, in the place of what is there.

    Raises:
        RunError: no room for it.
    """
    part = folder.with_name(f".{folder.name}.part")
    with said(f"cannot write {folder}"), quiet():
        shutil.rmtree(part, ignore_errors=True)
        try:
            cast(PreTrainedModel, model).save_pretrained(str(part), safe_serialization=True)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # PEFT would read a README that lies there, whoever wrote it.
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain transformers model with the adapter merged; `model` must not be used afterwards."""
    fold = getattr(model, "merge_and_unload", None)
    return cast(PreTrainedModel, fold() if fold else model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers and peft."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


Auto = type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]
LabelOptions = dict[str, dict[int, str] | dict[str, int]]


def _pretrained(kind: Auto, spec: ModelSpec, labels: LabelOptions) -> PreTrainedModel:
    """The model of `spec`; for a Part, only its tensors are read from a safetensors file."""
    location, options = locate(spec), {**labels, **_revision(spec)}
    dtype = getattr(torch, spec.dtype)
    if not isinstance(spec, Part):
        return cast(PreTrainedModel, kind.from_pretrained(location, dtype=dtype, **options))
    config = AutoConfig.from_pretrained(location, **options)
    with torch.device("meta"):
        trimmed = _trimmed(type(kind.from_config(config)), spec)  # type: ignore[no-untyped-call]
    return trimmed.from_pretrained(location, config=config, dtype=dtype, revision=spec.revision or "main")


def _trimmed(whole: type[PreTrainedModel], part: Part) -> type[PreTrainedModel]:
    """A subclass of `whole` that is trimmed to `part` before its weights are read."""

    def begin(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        if not part.head:
            config.tie_word_embeddings = False  # There is no output head to tie.
        whole.__init__(self, config)
        trim(self, part.num_blocks, head=part.head)

    # Same name and module: transformers uses them to look up renamed weights of older files.
    return type(whole.__name__, (whole,), {"__init__": begin, "__module__": whole.__module__})


def _with_head(base: nn.Module, head: str, num_classes: int) -> nn.Module:
    if head == "mean":
        return MeanClassifier(cast(PreTrainedModel, base), num_classes)
    # Decoders look for the last token that is not padding, and `training.collate` pads with 0.
    cast(PreTrainedModel, base).config.pad_token_id = 0
    return base


def _label_options(classes: Sequence[str]) -> LabelOptions:
    """The classes as options of a config."""
    if not classes:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _peft_task(base: nn.Module) -> tuple[str | None, list[str] | None]:
    """PEFT's task type, and the modules that are trained in full."""
    if isinstance(base, MeanClassifier):
        return None, ["score"]
    classifies = type(base).__name__.endswith("ForSequenceClassification")
    return ("SEQ_CLS" if classifies else "CAUSAL_LM"), None


def _folder_in_package(path: str) -> str:
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
def _errors_named(spec: ModelSpec, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().splitlines()[0][:300]
        raise ModelError(
            f"cannot load the {what} of {spec.path} ({first}); expected a local model directory, "
            "or a hub id with a network connection or the model in the cache"
        ) from error
