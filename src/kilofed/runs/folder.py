"""A run folder: made for a recipe, read again, and the files in it that are not of one round.

What it holds is written so that a run killed at any instant can be resumed.
"""

import hashlib
import json
import logging
import re
import shutil
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from kilofed.config.fields import Table
from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table, to_table, to_toml
from kilofed.errors import RunError
from kilofed.federation.method import with_present_names
from kilofed.files import replace_file, said
from kilofed.privacy.mechanisms import key_of_seed, new_key
from kilofed.records import facts
from kilofed.records.codec import to_json
from kilofed.records.facts import RunFacts
from kilofed.runs import commit, lock

log = logging.getLogger("kilofed")

_NO_NUMBERS = {"engine", "name", "about", "seeds"}
"""Keys of a recipe that do not change what one seed's run comes to."""


def new_folder(recipe: Recipe, out: Path | None) -> Path:
    """Make `out`, or runs/NAME-N with the first free N. Raises RunError: `out` holds something else, or cannot be made."""
    if out is not None:
        _refuse_begun(out)
        with said(f"cannot make {out}"):
            out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        folder = Path("runs") / f"{recipe.name}-{number}"
        with said(f"cannot make {folder}"):
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1


def begin(folder: Path, recipe: Recipe) -> None:
    """Write what a run begins with; from here on `folder` can be resumed.

    Raises:
        RunError: a run has begun there, or it holds something else.
    """
    _refuse_begun(folder)
    with said(f"cannot clear {folder}"):
        clear(folder)
    began = RunFacts(to_table(recipe), datetime.now(UTC).isoformat("T", "seconds"))
    write_json(folder / facts.FILE, to_json(began))
    _copy_recipe(folder, recipe)


def begin_repeat(folder: Path, recipe: Recipe) -> None:
    """As `begin`, or see to it that the run of one seed that has begun in `folder` is of this recipe.

    Raises:
        RunError: it is of another, which was edited.
    """
    if not (folder / facts.FILE).exists() and _never_began(folder):
        return begin(folder, recipe)
    if begun(folder) != recipe:
        raise RunError(
            f"{folder} holds a run of another recipe than {folder.parent}/recipe.toml says for that seed: put copies of "
            "its recipe.toml and run.json back, or run the recipe anew"
        )
    return None


def begun(folder: Path) -> Recipe:
    """As `recipe_of`, and the copy of the recipe is there again if it was gone."""
    recipe = recipe_of(folder)
    if not (folder / "recipe.toml").exists():
        log.warning("%s was missing and is written again", folder / "recipe.toml")
        _copy_recipe(folder, recipe)
    return recipe


def recipe_of(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. Raises RunError: no run there, a damaged run.json, or an edited recipe."""
    written = folder / "recipe.toml"
    if not (folder / facts.FILE).is_file():
        raise RunError(f"{folder} is not a run folder (it has no run.json): check the path, or put a copy of it back")
    kept = cast(Table, facts.read(folder).recipe)
    try:
        found = tomllib.loads(written.read_text("utf-8")) if written.exists() else kept
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{written} cannot be read ({error}): delete it, which is a copy for the reader, and resume"
        ) from error
    name = from_table(kept).method.name
    kept, found = (with_present_names(table, name) for table in (kept, found))
    if edited := _differences(kept, found):
        raise RunError(
            f"{folder}/recipe.toml was edited after the run began ({', '.join(edited)}): undo that to resume, "
            "or start a new run with the edited recipe (run.json beside it tells what the run began with)"
        )
    return from_table(kept)


def run_identity(recipe: Recipe, noise_key: str) -> str:
    """16 hex digits that every party of one run knows it by; equal runs have equal ones, on every machine.

    Args:
        noise_key: the secret of the noise, "" where there is none; it cannot be told from the identity.
    """
    return _digest({"recipe": _numbers(recipe), "noise_key": noise_key})[:16]


def recipe_digest(recipe: Recipe) -> str:
    """64 hex digits, of what in a recipe changes numbers."""
    return _digest(_numbers(recipe))


def _numbers(recipe: Recipe) -> dict[str, object]:
    return {key: value for key, value in to_table(recipe).items() if key not in _NO_NUMBERS}


def _digest(table: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def first_seed(folder: Path) -> Path:
    """The folder itself, or that of its first repeat."""
    repeats = sorted(folder.glob("seed-*"))
    return folder if (folder / "state.safetensors").exists() or not repeats else repeats[0]


def clear(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for part in list(folder.rglob(".*.part")):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)  # It may lie in a folder that is gone by now.


def noise_key(recipe: Recipe, folder: Path) -> str:
    """The secret of the noise: from the recipe's, or one drawn once and kept in the run folder for its owner only.

    Raises:
        PrivacyError: the recipe's is not 32 hex digits.
        RunError: it is gone or damaged; another one would give other noise to the same means.
    """
    if recipe.privacy.kind != "central":
        return recipe.privacy.noise_key  # A client draws its own where it is empty.
    if recipe.privacy.noise_key:
        return key_of_seed(recipe.privacy.noise_key, recipe.seed)
    path = folder / "noise.key"
    if not path.exists():
        if (folder / commit.FILE).exists():
            raise RunError(
                f"{path} is missing, the secret of this run's noise: put a copy of it back, or run the recipe anew"
            )
        replace_file(path, new_key().encode(), mode=0o600)
    with said(f"cannot read {path}"):
        path.chmod(0o600)  # A copy may have left it open to others.
        key = path.read_bytes().decode("ascii", "replace")
    if not re.fullmatch("[0-9a-f]{32}", key):
        raise RunError(f"{path} is damaged (not 32 hex digits): put a copy of it back, or run the recipe anew")
    return key


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Put `value` in the place of the file `path`."""
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode("utf-8"))


def _refuse_begun(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and _never_began(folder)):
        begun = (folder / facts.FILE).exists()
        hint = f"`kilofed resume {folder}` goes on with it" if begun else "it holds other files"
        raise RunError(f"{folder} already exists and {hint}; choose another --out")


def _never_began(folder: Path) -> bool:
    """Whether nothing but a run's question lies there: its data or model could not be had."""
    question = {facts.FILE, "recipe.toml", lock.FILE}
    return {item.name for item in folder.iterdir() if item.suffix != ".part"} <= question


def _copy_recipe(folder: Path, recipe: Recipe) -> None:
    replace_file(folder / "recipe.toml", to_toml(recipe).encode())


def _differences(kept: Mapping[str, object], found: Mapping[str, object], where: str = "") -> list[str]:
    changed = []
    for key in sorted({*kept, *found}):
        old, new = kept.get(key), found.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(where + key)
    return changed
