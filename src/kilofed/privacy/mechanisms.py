"""Privacy as a pair of functions around `mean`: a client half, a server half, and the event that it spends.

Central differential privacy (McMahan et al. 2018, arXiv:1710.06963): each client's update is clipped to an L2 norm, a
trusted server adds Gaussian noise to the sum and divides by the number of clients that were asked, not by who came.
Weights are uniform, and scalars (losses, counts) do not leave a client. The server clips again what arrives, so that one
client that does not keep to the clip costs the others neither their result nor their epsilon.
"""

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kilofed.config.recipe import PrivacySpec
from kilofed.errors import PayloadError, PrivacyError
from kilofed.payload import Payload
from kilofed.privacy.accounting import check_delta, check_noise, gaussian_epsilon
from kilofed.privacy.clipping import clipped, norm, scaled, update_of
from kilofed.privacy.noise import Noise

When = tuple[int, int]
"""(round, exchange)."""

ROWS = "rows"
"""Name of a tensor (N, D) with one row per token, by which split learning sends hidden states and their gradients."""


@dataclass(frozen=True)
class Mechanism:
    """No mechanism: replies pass as they are. Subclasses say what differs."""

    kind = "none"
    needs_aggregate = False
    """True refuses the verb `call` for actions that read rows."""
    uniform = False
    """True gives every client the same weight, whatever it says."""

    def client(self, reply: Payload, ask: Payload) -> Payload:
        """What leaves the client's walls instead of `reply`."""
        return reply

    def failure(self, kind: str, text: str) -> str:
        """What a client may say of its failure; `kind` is the error's class, `text` its message."""
        return text

    def arrived(self, reply: Payload, ask: Payload) -> Payload:
        """What the server sums instead of `reply`: the very object where it keeps to the policy, whoever sent it.

        Raises:
            PayloadError: `reply` cannot be held to the policy; its sender failed.
        """
        return reply

    def outline(self, reply: Payload) -> Payload:
        """What leaves instead of `reply`, right in names, shapes and dtypes; the tensors need no numbers."""
        return reply

    def server(self, mean: Payload, ask: Payload, *, num_replies: int, expected: int, when: When) -> Payload:
        """What the method is given instead of `mean`, the mean of `num_replies` replies from `expected` clients."""
        return mean

    def epsilon(self, num_means: int) -> float:
        """Epsilon spent by `num_means` private means; infinite without a mechanism."""
        return math.inf


@dataclass(frozen=True)
class CentralGaussian(Mechanism):
    """Clip at the client, Gaussian noise at a trusted server."""

    clip: float
    """Largest L2 norm of one client's update over all its tensors."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum, in units of `clip`."""
    delta: float
    key: str = field(repr=False)
    """32 hex digits; whoever knows them can subtract the noise."""

    kind = "central"
    needs_aggregate = True
    uniform = True

    def __post_init__(self) -> None:
        check_noise(self.noise_multiplier)
        check_delta(self.delta)
        _check_key(self.key)
        if not self.clip > 0:
            raise PrivacyError(f"privacy.clip is {self.clip}; expected a number above 0, or inf for no clip")
        if math.isinf(self.clip) and self.noise_multiplier:
            raise PrivacyError(
                "privacy.clip is inf, so no finite noise hides one client: set a finite clip, or noise_multiplier 0"
            )

    def client(self, reply: Payload, ask: Payload) -> Payload:
        if not math.isfinite(norm(reply, ask)):
            return scaled(reply, ask, 0.0)
        return Payload(clipped(reply, ask, self.clip).tensors)

    def failure(self, kind: str, text: str) -> str:
        if kind == PrivacyError.__name__:
            return text  # The policy refused the method; rows have no part in it.
        return (
            f"{kind} (the rest stays with the client: under privacy.central no text that rows may have shaped leaves)"
        )

    def arrived(self, reply: Payload, ask: Payload) -> Payload:
        try:
            return clipped(reply, ask, self.clip)
        except PrivacyError as error:
            raise PayloadError(f"its reply cannot be held to privacy.clip: {error}") from error

    def outline(self, reply: Payload) -> Payload:
        return Payload(reply.tensors)

    def server(self, mean: Payload, ask: Payload, *, num_replies: int, expected: int, when: When) -> Payload:
        if num_replies == expected and self.noise_multiplier == 0:
            return mean
        # No two means share a stream: their difference would be free of noise.
        noise = Noise(self.key, "mean", *when)
        deviation = self.noise_multiplier * self.clip / expected if self.noise_multiplier else 0.0
        tensors: dict[str, Tensor] = {}
        for name in sorted(mean.tensors):
            tensor = mean.tensors[name]
            update = (update_of(name, tensor, ask) * (num_replies / expected)).contiguous()
            if deviation:
                noise.add_into(update, deviation)
            tensors[name] = _value(update, ask.tensors.get(name), tensor.dtype)
        return Payload(tensors)

    def epsilon(self, num_means: int) -> float:
        """Epsilon at `delta` after `num_means` means, one client added or removed, without credit for sampling."""
        spent = gaussian_epsilon(self.noise_multiplier, num_means, self.delta)
        return math.inf if math.isinf(self.clip) and num_means else spent


@dataclass(frozen=True)
class RowGaussian(Mechanism):
    """Clip and Gaussian noise on each row of what a client sends under the name ROWS: hidden states, one per token.

    No epsilon is claimed: a run sends too many of them for any that would mean something. What it hides is measured
    by the probe of the report.
    """

    clip: float
    """Largest L2 norm of a row."""
    noise_multiplier: float
    """Root of the expected squared norm of a row's noise, in units of `clip`."""
    key: str = field(repr=False)
    """32 hex digits: the client's secret. Equal rows get equal noise, so that asking again tells nothing."""
    kind = "activations"

    def client(self, reply: Payload, ask: Payload) -> Payload:
        rows = self.outline(reply).tensors.get(ROWS)
        if rows is None:
            return reply
        wide = rows.detach().cpu().double()
        norms = wide.norm(dim=1, keepdim=True)
        shrunk = (wide * (self.clip / norms.clamp(min=self.clip))).contiguous()
        if self.noise_multiplier:
            digest = hashlib.sha256(Payload({ROWS: rows}).encode()).digest()
            deviation = self.noise_multiplier * self.clip / math.sqrt(rows.shape[1])
            Noise(self.key, "rows", digest).add_into(shrunk, deviation)
        return Payload({**reply.tensors, ROWS: shrunk.to(rows.dtype)}, reply.scalars)

    def outline(self, reply: Payload) -> Payload:
        rows = reply.tensors.get(ROWS)
        if rows is not None and (rows.dim() != 2 or not rows.is_floating_point()):
            raise PrivacyError(
                f"{ROWS!r} is {rows.dtype} of shape {tuple(rows.shape)}; noise needs floating-point rows\n"
                "  hint: set method.activations and method.gradients to float32 or bfloat16"
            )
        return reply

    def __post_init__(self) -> None:
        check_noise(self.noise_multiplier)
        _check_key(self.key)
        if not 0 < self.clip < math.inf:
            raise PrivacyError(f"privacy.clip is {self.clip}; privacy.kind=activations needs a finite one above 0")


def load_mechanism(spec: PrivacySpec) -> Mechanism:
    """The mechanism that a recipe asks for. Raises PrivacyError: a key that is not 32 hex digits, noise without a clip."""
    if spec.kind == "none":
        return Mechanism()
    key = spec.noise_key or new_key()
    if spec.kind == "activations":
        return RowGaussian(spec.clip, spec.noise_multiplier, key)
    return CentralGaussian(spec.clip, spec.noise_multiplier, spec.delta, key)


def new_key() -> str:
    """A fresh secret for the noise."""
    return secrets.token_hex(16)


def key_of_seed(key: str, seed: int) -> str:
    """The secret of the run with `seed` among those that share `key`: equal noise in two runs would cancel out.

    Raises:
        PrivacyError: `key` is not 32 hex digits.
    """
    _check_key(key)
    return hashlib.shake_256(bytes.fromhex(key) + f"\0seed\0{seed}".encode()).hexdigest(16)


def _check_key(key: str) -> None:
    if len(key) != 32 or any(c not in "0123456789abcdef" for c in key):
        raise PrivacyError("privacy.noise_key is not 32 lower-case hex digits; leave it empty to draw a secret one")


def _value(update: Tensor, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (update if start is None else start.double() + update).to(dtype)
