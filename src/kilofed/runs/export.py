"""Take a result out of a run folder: the adapter in PEFT's format, or a model that plain transformers loads."""

import shutil
from pathlib import Path

from kilofed.errors import RunError
from kilofed.files import said
from kilofed.models import loading
from kilofed.records import results
from kilofed.reports.reading import hold_to_files
from kilofed.runs.folder import first_seed
from kilofed.runs.restore import delivered


def adapter(run: Path, out: Path) -> Path:
    """Copy the run's adapter (or whole model, where every parameter was trained) to the new folder `out`.

    Raises:
        RunError: the run is not finished, a file of it is not as it was then, or `out` exists.
    """
    source = first_seed(run) / "adapter"
    known = results.read(source.parent) if (run / results.FILE).exists() else None
    if known is None:
        raise RunError(f"{run} has no adapter yet: finish it with `kilofed resume {run}`")
    hold_to_files(source.parent, {n: digest for n, digest in known.files.items() if n.startswith("adapter/")})
    _refuse_existing(out)
    with said(f"cannot write {out}"):
        shutil.copytree(source, out)
    return out


def merged(run: Path, out: Path) -> Path:
    """Write base and adapter as one model directory with its tokeniser to the new folder `out`.

    Raises:
        RunError: no state in the run, or `out` exists.
    """
    _refuse_existing(out)
    model, tokenizer = delivered(run)
    part = out.with_name(f".{out.name}.part")
    with said(f"cannot write {out}"), loading.quiet():
        shutil.rmtree(part, ignore_errors=True)
        loading.merged(model).save_pretrained(str(part), safe_serialization=True)
        tokenizer.save_pretrained(str(part))
        part.rename(out)
    return out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise RunError(f"{out} already exists; choose another folder")
    with said(f"cannot make {out.parent}"):
        out.parent.mkdir(parents=True, exist_ok=True)
