"""Scores that were paid for are kept, found again by their text, and nothing but them is in the file."""

from pathlib import Path

import numpy as np
import pytest

from kilofed.errors import RunError
from kilofed.proxy.api_cache import LogprobCache, TopLogprobs, prefix_keys

TOLD = TopLogprobs(np.array([7, 3], np.int32), np.array([-0.5, -1.25], np.float32))


def test_what_was_put_is_found_in_another_process_s_file(tmp_path: Path) -> None:
    keys = prefix_keys("large", 2, [1, 5])
    first = LogprobCache(tmp_path / "scores")
    first.put({keys[1]: TOLD})
    first.close()
    again = LogprobCache(tmp_path / "scores")
    found = again.get(keys)
    again.close()
    assert list(found) == [keys[1]]
    assert found[keys[1]].ids.tolist() == [7, 3]
    assert found[keys[1]].logprobs.tolist() == [-0.5, -1.25]


def test_a_key_is_the_model_the_number_and_the_text_before() -> None:
    keys = prefix_keys("large", 2, [1, 5, 9])
    assert prefix_keys("large", 2, [1, 5]) == keys[:2]
    others = [
        prefix_keys("other", 2, [1, 5, 9]),
        prefix_keys("large", 3, [1, 5, 9]),
        prefix_keys("large", 2, [2, 5, 9]),
    ]
    assert not set(keys) & {key for other in others for key in other}


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("these are no scores, but a text that is long enough to be looked at\n" * 20)
    with pytest.raises(RunError, match="cannot use the file of scores"):
        LogprobCache(tmp_path / "scores")
