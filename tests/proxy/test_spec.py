"""What a recipe may say of the large model, and what it becomes."""

import pytest

from kilofed.config.fields import Value, build
from kilofed.errors import RecipeError
from kilofed.proxy.spec import LargeSpec


@pytest.mark.parametrize(
    ("address", "said"),
    [("ftp://x/v1", "http://"), ("http:///v1", "name a host"), ("https://me:secret@x/v1", "holds a password")],
)
def test_an_address_that_is_none_is_refused(address: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        LargeSpec(address, name="large")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["top_k", "batch_size", "max_tries"])
def test_a_count_below_one_is_refused(name: str) -> None:
    table: dict[str, Value] = {name: 0}
    with pytest.raises(RecipeError, match=f"{name} .*at least 1"):
        build(LargeSpec, table, "method.large.")


def test_a_path_is_loaded_and_an_address_is_asked() -> None:
    local = LargeSpec("org/name", "bfloat16", "cuda:1", "main")
    assert not local.is_remote
    assert (local.local.path, local.local.dtype, local.local.device, local.local.revision) == (
        "org/name",
        "bfloat16",
        "cuda:1",
        "main",
    )
    assert LargeSpec("https://models.example.org/v1").is_remote
