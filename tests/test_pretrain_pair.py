"""The script that trains the embedded pair: its promises on a toy, and the whole of it on the standard library."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kilofed.data.sources import gazetteer, pydocs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "models"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_muon_steps_have_singular_values_near_one() -> None:
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        values = torch.linalg.svdvals(module("muon").orthogonalise(matrices))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_takes_the_same_step_alone_and_in_a_group() -> None:
    start = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    together = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    optimisers = [module("muon").Muon(together, lr=0.1)] + [module("muon").Muon([item], lr=0.1) for item in alone]
    for parameter in together + alone:
        parameter.grad = parameter.detach() ** 2
    for optimiser in optimisers:
        optimiser.step()
    for one, other, before in zip(together, alone, start, strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.equal(one, before)


def test_learning_rate_warms_up_holds_and_falls() -> None:
    train = module("pair_train")
    plan = train.Plan("small", 0, warmup=10, decay=0.5)
    rates = [train._rate(step, 100, plan) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[10:50] == [1.0] * 40
    assert rates[-1] == 0.05
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_rate_while_it_holds_does_not_depend_on_the_length() -> None:
    train = module("pair_train")
    plan = train.Plan("small", 0)
    assert [train._rate(step, 100, plan) for step in range(60)] == [train._rate(step, 500, plan) for step in range(60)]


def test_a_pass_meets_every_row_of_the_stream_once() -> None:
    train = module("pair_train")
    stream = np.repeat(np.arange(7, dtype=np.uint16), train.LENGTH)
    stream = np.append(stream, np.uint16(9))
    plan = train.Plan("small", 0, batch=1)
    firsts = [int(train._batch(stream, step, plan)[0, 0]) for step in range(14)]
    assert sorted(firsts[:7]) == sorted(firsts[7:]) == list(range(7))
    assert firsts[:7] != firsts[7:]


def test_lines_that_repeat_a_held_out_summary_are_found() -> None:
    repeats = module("pair_corpus")._repeats
    banned = {"parse a document"}
    assert repeats("    Parse a document.", banned)
    assert repeats("parse -- Parse a document", banned)
    assert repeats("x = 1  # parse a document", banned)
    assert not repeats("Parse a document twice", banned)


def test_no_licence_but_permissive_ones_passes() -> None:
    corpus = module("pair_corpus")
    for licence in ("MIT", "BSD License", "Apache-2.0 AND MIT", "Python Software Foundation License"):
        assert corpus.PERMISSIVE.search(licence)
        assert not corpus.RESTRICTED.search(licence)
    for licence in ("LGPL-3.0", "GNU General Public License", "MPL-2.0", "Mozilla Public License 2.0"):
        assert corpus.RESTRICTED.search(licence)
    assert not corpus.PERMISSIVE.search("unknown")


def test_world_of_the_small_model_leaves_out_the_other_facts() -> None:
    texts = "\n".join(module("pair_corpus").world(seed=0, repeats=2, share=0.3))
    missing = [fact for fact in gazetteer.facts() if fact.attribute == "river" and not gazetteer.in_part(fact, 0.3)]
    assert missing
    assert not [fact for fact in missing if f"{fact.entity} lies on the river {fact.answer}" in texts]


def test_pre_training_asks_only_about_shown_entities() -> None:
    texts = module("pair_corpus").world(seed=0, repeats=20, share=1.0)
    asked = [line for text in texts for line in text.split("\n") if line.startswith("Q: ")]
    assert asked
    others = {fact.entity for fact in gazetteer.facts() if fact.group != "shown"}
    assert not [line for line in asked for entity in others if entity in line]


@pytest.mark.slow
def test_quick_run_exports_a_pair_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/pretrain_pair.py"), "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / "assets" / size) for size in ("small", "large")]
    text = "def f(x):\n    return  x + 1  # é\n"
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for tokenizer in tokenizers)
    for size in ("small", "large"):
        folder = tmp_path / "assets" / size
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert model.num_parameters() < {"small": 1e6, "large": 5e6}[size]
        assert "## Limits" in (folder / "README.md").read_text()
        log = [json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [2, 3]
    _assert_resumed_equals_uninterrupted(tmp_path)
    _assert_stream_holds_nothing_held_out(tmp_path)


def _assert_resumed_equals_uninterrupted(work: Path) -> None:
    """Two steps, then a fresh process to the end, against the run that was not stopped."""
    train = module("pair_train")
    whole = load_file(work / "assets/small/model.safetensors")
    (work / "small.checkpoint").unlink()
    plan = train.Plan("small", 3 * 2 * train.LENGTH, batch=2)
    original = train._step
    calls = []

    def stop_at_third(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    train._step = stop_at_third
    with pytest.raises(KeyboardInterrupt):
        train.train(work, plan, assets=work / "again", every=2)
    train._step = original
    train.train(work, plan, assets=work / "again", every=2)
    again = load_file(work / "again/small/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def _assert_stream_holds_nothing_held_out(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    text = tokenizer.decode(np.load(work / "large.npy").tolist())
    lines = {pydocs.normalise(line) for line in text.replace("</s>", "\n").replace('"""', "\n").split("\n")}
    held = pydocs.load(seed=0, families=list(pydocs.STDLIB_FAMILIES), train_rows=1).test
    assert len(held) == 200
    assert not lines & {pydocs.normalise(row["response"]) for row in held}
