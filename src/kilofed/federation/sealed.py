"""A payload that carries its own digest, for what is kept on a disk: a file that was changed in any bit is seen as such."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from kilofed.errors import PayloadError
from kilofed.payload import Pack, Payload, Scalar

SEAL = "sha256"
"""Name of the scalar with the digest: 64 hex digits, of the encoding without it."""


def seal(tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar]) -> bytes:
    """Encode, with the digest of all of it among the scalars. Raises PayloadError: as `Payload.encode`."""
    pack = Pack.of(tensors)
    digest = hashlib.sha256(Payload(pack, scalars).encode()).hexdigest()
    return Payload(pack, {**scalars, SEAL: digest}).encode()


def unseal(body: bytes) -> Payload:
    """What was sealed, the digest among its scalars. Raises PayloadError: `body` is not what `seal` gave."""
    payload = Payload.decode(body)
    bare = {name: value for name, value in payload.scalars.items() if name != SEAL}
    if SEAL not in payload.scalars:
        raise PayloadError("it carries no digest of its own")
    if hashlib.sha256(Payload(payload.tensors, bare).encode()).hexdigest() != payload.scalars[SEAL]:
        raise PayloadError("its bytes do not give the digest that it carries")
    return payload
