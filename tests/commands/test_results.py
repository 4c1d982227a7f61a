"""eval and export: scores on other rows, and models that peft and transformers load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kilofed.cli import main
from kilofed.models import loading
from kilofed.runs.restore import delivered

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=IDS).logits)  # type: ignore[operator]


def test_eval_scores_a_run_on_other_rows(folder: Path, tiny_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "results.json").read_text("utf-8"))["rows"]["federated"]
    assert main(["eval", str(folder), "--json", f"data.test={tiny_rows}"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["loss"] != found["loss"]
    assert sum(c["num_tokens"] for c in other["clients"]) > sum(c["num_tokens"] for c in found["clients"])


def test_an_exported_adapter_loads_with_peft(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--adapter", str(tmp_path / "adapter")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/adapter\n"
    with loading.quiet():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        tuned = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(tuned), logits(delivered(folder)[0]))


def test_an_exported_model_loads_with_plain_transformers(
    folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--merged", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/merged\n"
    with loading.quiet():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    torch.testing.assert_close(logits(plain), logits(delivered(folder)[0]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(base), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("a") == [
        *AutoTokenizer.from_pretrained(tiny_model).encode("a")
    ]


def test_export_refuses_to_overwrite_and_to_give_half_a_result(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder), "--adapter", str(tmp_path)]) == 1
    assert "already exists; choose another folder" in capsys.readouterr().err
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "results.json").unlink()
    assert main(["export", str(half), "--adapter", str(tmp_path / "adapter")]) == 1
    assert "has no adapter yet: finish it with `kilofed resume" in capsys.readouterr().err
