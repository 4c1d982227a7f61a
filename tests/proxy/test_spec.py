"""What a recipe may say of the large model, and what it becomes."""

import pytest

from kilofed.config.fields import Value, build
from kilofed.errors import RecipeError
from kilofed.proxy.spec import LargeSpec


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://x/v1", "http://"),
        ("http:///v1", "name a host"),
        ("https://me:secret@x/v1", "holds a password"),
        ("https://x/v1?api_key=secret", r"something after \? or #"),
        ("https://x/v1#secret", r"something after \? or #"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        LargeSpec(address, name="large")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["sk-a-very-secret-key", "sk a", "", "7KEY", "KEY\n"])
def test_a_key_in_the_place_of_its_variable_is_refused_without_showing_it(name: str) -> None:
    with pytest.raises(RecipeError, match="name the environment variable that holds the key") as refused:
        LargeSpec("https://x/v1", name="large", key_variable=name)
    assert not name or name not in str(refused.value)


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
