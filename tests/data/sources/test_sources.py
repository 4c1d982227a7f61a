"""Sources are found by file name and refuse what they do not know."""

import json
import subprocess
import sys

import pytest

from kilofed.data.sources import Rows, load, names


def test_every_source_is_listed_by_its_file_name() -> None:
    assert names() == ["families", "gazetteer", "pydocs"]


def test_unknown_source_offers_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"pydoc is not a source \(did you mean pydocs\?\); sources: families, gazetteer, pydocs"
    ):
        load("pydoc", seed=0)


def test_unknown_option_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"num_client is not an option of gazetteer \(did you mean num_clients\?\)"):
        load("gazetteer", seed=0, num_client=3)


def test_options_reach_the_source() -> None:
    rows = load("gazetteer", seed=0, num_clients=2)
    assert isinstance(rows, Rows)
    assert len({row["client"] for row in rows.train}) == 2


def test_rows_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from kilofed.data.sources import load;"
        "json.dump(load(sys.argv[1], seed=3, num_clients=2), sys.stdout)"
    )
    for source in names():
        texts = {
            subprocess.run(
                [sys.executable, "-c", code, source],
                env={"PYTHONHASHSEED": hash_seed, "PATH": "", "SYSTEMROOT": ""},
                capture_output=True,
                check=True,
            ).stdout
            for hash_seed in ("1", "2")
        }
        assert len(texts) == 1
        train, test, _ = json.loads(texts.pop())
        assert train
        assert test


def test_import_needs_the_standard_library_only() -> None:
    code = (
        "import sys; from kilofed.data.sources import load; load('gazetteer', seed=0);"
        "load('pydocs', seed=0, families=['stdlib-text'], train_rows=5, test_rows=1);"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
