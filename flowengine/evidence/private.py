"""Values that must not stand in a log: kept at the origin, shown elsewhere as keyed digests.

The digest is an HMAC under a key that never leaves the origin, over a salt of its own, so that neither guessing (of a
number of persons) nor comparing two records says anything. The origin keeps digest and value side by side; who holds
both and the key can show that the value is the one that was recorded. Forgetting the value leaves the chain whole.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flowengine.evidence.canonical import canonical
from flowengine.evidence.suites import Suite

__all__ = ["Kept", "Private", "conceal", "is_concealed", "reveal"]

_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Private:
    """A value of a body that is recorded as a keyed digest.

    Args:
        name: What it is the value of; part of what is digested.
        value: Canonical-JSON-able.
    """

    name: str
    value: object


@dataclass(frozen=True, slots=True)
class Kept:
    """What the origin keeps of a private value."""

    digest: str
    name: str
    value: object

    def as_dict(self) -> dict[str, object]:
        """As a line of the file of values says it."""
        return {"digest": self.digest, "name": self.name, "value": self.value}


def conceal(
    body: Mapping[str, object], suite: Suite, key: bytes, rng: Callable[[int], bytes]
) -> tuple[dict[str, object], list[Kept]]:
    """The body with every `Private` replaced by `{"digest": …}`, and what is to be kept of them."""
    kept: list[Kept] = []

    def walk(value: object) -> object:
        if isinstance(value, Private):
            digest = _digest(suite, key, rng(_SALT_BYTES), value.name, value.value)
            kept.append(Kept(digest, value.name, value.value))
            return {"digest": digest}
        if isinstance(value, Mapping):
            return {name: walk(item) for name, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
            return [walk(item) for item in value]
        return value

    concealed = walk(body)
    assert isinstance(concealed, dict)
    return concealed, kept


def is_concealed(value: object) -> bool:
    """Whether a recorded value is a keyed digest."""
    return isinstance(value, dict) and set(value) == {"digest"}


def reveal(digest: str, kept: Kept, suite: Suite, key: bytes) -> bool:
    """Whether a kept value is the one that was recorded under a digest."""
    try:
        salt = bytes.fromhex(digest.split(":")[1])
        expected = _digest(suite, key, salt, kept.name, kept.value)
    except (ValueError, IndexError):
        return False
    return hmac.compare_digest(expected, digest)


def _digest(suite: Suite, key: bytes, salt: bytes, name: str, value: object) -> str:
    mac = suite.mac(key, salt + canonical([name, value]))
    return f"hmac-{suite.prefix}:{salt.hex()}:{mac.hex()}"
