"""A run folder: made for a recipe, read again, and the files in it that are not of one round.

What it holds is written so that a run killed at any instant can be resumed.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from kilofed.config.recipe import Recipe
from kilofed.config.tables import from_table, to_table
from kilofed.errors import PayloadError, RunError
from kilofed.federation.method import with_present_names
from kilofed.federation.parties import Server
from kilofed.files import replace_file, said
from kilofed.payload import Payload
from kilofed.privacy.mechanisms import new_key

_NO_NUMBERS = {"engine", "name", "about", "seeds"}
"""Keys of a recipe that do not change what one seed's run comes to."""


def new_folder(recipe: Recipe, out: Path | None) -> Path:
    """Make `out`, or runs/NAME-N with the first free N. Raises RunError: `out` holds something else, or cannot be made."""
    if out is not None:
        if out.exists() and not (out.is_dir() and _never_began(out)):
            hint = f"`kilofed resume {out}` goes on with it" if (out / "run.json").exists() else "it holds other files"
            raise RunError(f"{out} already exists and {hint}; choose another --out")
        with said(f"cannot make {out}"):
            out.mkdir(parents=True, exist_ok=True)
            clear(out)
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


def recipe_of(folder: Path) -> Recipe:
    """The recipe of the run in `folder`. Raises RunError: no run there, or an edited recipe."""
    written = folder / "recipe.toml"
    try:
        kept = json.loads((folder / "run.json").read_text("utf-8"))["recipe"]
        found = tomllib.loads(written.read_text("utf-8")) if written.exists() else kept
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{folder} is not a run folder (no readable run.json and recipe.toml): check the path"
        ) from error
    name = from_table(kept).method.name
    kept, found = (with_present_names(table, name) for table in (kept, found))
    if edited := _differences(kept, found):
        raise RunError(
            f"{folder}/recipe.toml was edited after the run began ({', '.join(edited)}): undo that to resume, "
            "or start a new run with the edited recipe"
        )
    return from_table(kept)


def run_identity(recipe: Recipe, noise_key: str) -> str:
    """16 hex digits that every party of one run knows it by; equal runs have equal ones, on every machine.

    Args:
        noise_key: the secret of the noise, "" where there is none; it cannot be told from the identity.
    """
    table = {key: value for key, value in to_table(recipe).items() if key not in _NO_NUMBERS}
    text = json.dumps({"recipe": table, "noise_key": noise_key}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_seed(folder: Path) -> Path:
    """The folder itself, or that of its first repeat."""
    repeats = sorted(folder.glob("seed-*"))
    return folder if (folder / "state.safetensors").exists() or not repeats else repeats[0]


def clear(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for part in folder.rglob(".*.part"):
        part.unlink()


def load_state(folder: Path, server: Server) -> bool:
    """Put the newest state in `folder` into `server`; False if there is none. Raises RunError: it is damaged."""
    path = folder / "state.safetensors"
    if not path.exists():
        return False
    with said(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        payload = Payload.decode(content)
        server.state, server.round = dict(payload.tensors), int(payload.scalars["round"])
    except (PayloadError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is not a whole state of a run ({error}): put a copy back, or delete it and resume from round 1"
        ) from error
    return True


def noise_key(recipe: Recipe, folder: Path) -> str:
    """The secret of the noise: the recipe's, or one drawn once and kept in the run folder for its owner only."""
    if recipe.privacy.kind != "central" or recipe.privacy.noise_key:  # Elsewhere a client draws its own.
        return recipe.privacy.noise_key
    path = folder / "noise.key"
    if not path.exists():
        replace_file(path, new_key().encode())
    path.chmod(0o600)
    return path.read_text("utf-8")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Put `value` in the place of the file `path`."""
    replace_file(path, (json.dumps(value, indent=1) + "\n").encode("utf-8"))


def _never_began(folder: Path) -> bool:
    """Whether nothing but a run's question lies there: its data or model could not be had."""
    return {item.name for item in folder.iterdir() if item.suffix != ".part"} <= {"run.json", "recipe.toml"}


def _differences(kept: Mapping[str, object], found: Mapping[str, object], where: str = "") -> list[str]:
    changed = []
    for key in sorted({*kept, *found}):
        old, new = kept.get(key), found.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{where}{key}.")
        elif old != new:
            changed.append(where + key)
    return changed
