"""Which hosts are this machine, so that what is sent to them crosses no network."""

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach `host`: a name or an address, without port or brackets."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
