"""What is taken out of a run folder is what the run delivers; nothing is overwritten, nothing left half written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kilofed
from kilofed.config.recipe import Recipe
from kilofed.errors import RunError
from kilofed.runs import export

IDS = torch.tensor([[1, 70, 71, 72], [1, 80, 81, 82]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[kilofed.Run]:
    """Filled by the first test that runs something."""
    return []


@pytest.fixture
def run(tiny_recipe: Recipe, finished: list[kilofed.Run], tmp_path_factory: pytest.TempPathFactory) -> kilofed.Run:
    if not finished:
        evaluate = replace(tiny_recipe.evaluate, generate=0)
        recipe = replace(tiny_recipe, evaluate=evaluate, seeds=2, rounds=1)
        finished.append(kilofed.run(recipe, out=tmp_path_factory.mktemp("runs") / "run"))
    return finished[0]


def test_a_merged_model_loads_in_plain_transformers_and_says_the_same(run: kilofed.Run, tmp_path: Path) -> None:
    model, tokenizer = run.model()
    folder = export.merged(run.folder, tmp_path / "new" / "whole")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == tokenizer("abc").input_ids
    assert [path.name for path in folder.parent.iterdir()] == ["whole"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers.
def test_an_adapter_over_the_base_says_the_same(run: kilofed.Run, tiny_model: Path, tmp_path: Path) -> None:
    model, _ = run.model()
    folder = export.adapter(run.folder, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, folder).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_of_several_repeats_the_first_is_exported(run: kilofed.Run, tmp_path: Path) -> None:
    folders = sorted(run.folder.glob("seed-*"))
    taken = load_file(export.adapter(run.folder, tmp_path / "adapter") / "adapter_model.safetensors")
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(taken[name], first[name]) for name in first)
    assert not all(torch.equal(taken[name], second[name]) for name in first)


@pytest.mark.parametrize("what", [export.merged, export.adapter])
def test_a_folder_that_exists_is_not_touched(what, run: kilofed.Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep", "utf-8")
    with pytest.raises(RunError, match="already exists; choose another folder"):
        what(run.folder, tmp_path / "mine")
    assert (tmp_path / "mine").read_text("utf-8") == "keep"


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finish it with `kilofed resume"):
        export.adapter(tmp_path, tmp_path / "adapter")
    with pytest.raises(RunError, match="not a run folder"):
        export.merged(tmp_path, tmp_path / "whole")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_cleared_away(run: kilofed.Run, tmp_path: Path) -> None:
    part = tmp_path / ".whole.part"
    part.mkdir()
    (part / "junk").write_text("half", "utf-8")
    export.merged(run.folder, tmp_path / "whole")
    assert not part.exists()
    assert not (tmp_path / "whole" / "junk").exists()
