"""Which hosts are this machine."""

import pytest

from kilofed.hosts import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_addresses_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "192.168.0.1", "example.com", "", "localhost.example", "127.0.0.1.example.com", "2130706433"],
)
def test_all_other_hosts_are_not_even_where_they_look_like_it(host: str) -> None:
    assert not is_loopback(host)
