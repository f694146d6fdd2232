"""What all signed statements of people have alike: an owner's on labels, an authority's on agreements.

Each is one signed document of a speaker whom the policy bundle names with a key. The document is kept and handed on as
the bytes that were signed; of a speaker's statements on one thing the highest number counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import AuthenticationError, UsageError
from flowengine.policy.model import Value
from flowengine.trust.envelope import is_signed_by, open_envelope, seal_signed

__all__ = ["MAX_TIME", "Fact", "Form", "count_problem", "root_problem", "values_of"]

MAX_NUMBER: Final = 1 << 62
MAX_TIME: Final = 253_402_300_800
"""Unix seconds of the year 10,000: what is later no calendar shows."""

Fact: TypeAlias = bool | int | str | list[str]


class Counted(Protocol):
    """What each statement says beside what it is about."""

    @property
    def number(self) -> int: ...
    @property
    def issued(self) -> int: ...
    @property
    def expires(self) -> int | None: ...


S = TypeVar("S", bound=Counted)


@dataclass(frozen=True)
class Form(Generic[S]):
    """One kind of statement.

    Args:
        kind: its struct.
        domain: of its documents.
        what: what people call it, with its article.
        forged: reason of the error where a document is none.
        problem: why nobody would accept what is said; empty where nothing is wrong.
    """

    kind: type[S]
    domain: str
    what: str
    forged: str
    problem: Callable[[S], str]

    def sign(self, said: S, key: Ed25519PrivateKey) -> bytes:
        """The statement as it travels.

        Raises:
            UsageError: it says something that nobody would accept.
        """
        if problem := count_problem(said) or self.problem(said):
            raise UsageError(
                f"{self.what} like this cannot be made: {problem}", hint="docs/spec/trust.md has its form"
            )
        return seal_signed(self.domain, msgspec.msgpack.encode(said), key)

    def peek(self, document: bytes) -> S:
        """What a document says, before anything of it may be believed.

        Raises:
            AuthenticationError: it is none.
        """
        envelope = open_envelope(document, self.domain, self.forged, self.what.partition(" ")[2])
        try:
            said = msgspec.msgpack.decode(envelope.payload, type=self.kind)
        except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
            raise AuthenticationError(
                f"{self.what} cannot be understood: {error}", reason=self.forged
            ) from None
        if problem := count_problem(said) or self.problem(said):
            raise AuthenticationError(f"{self.what} cannot be used: {problem}", reason=self.forged)
        return said

    def is_signed_by(self, document: bytes, key: bytes) -> bool:
        """Whether an Ed25519 key (raw) signed a document of this kind."""
        return is_signed_by(
            open_envelope(document, self.domain, self.forged, self.what.partition(" ")[2]), key
        )


def values_of(facts: Mapping[str, Fact]) -> dict[str, Value]:
    """Facts of a statement as policies take them."""
    return {name: frozenset(value) if isinstance(value, list) else value for name, value in facts.items()}


def count_problem(said: Counted) -> str:
    """Why a statement's number or times cannot be; empty where they can."""
    if not 0 < said.number < MAX_NUMBER or not 0 <= said.issued < MAX_TIME:
        return "its number or time is out of range"
    if said.expires is not None and not 0 <= said.expires < MAX_TIME:
        return "its end is out of range"
    return ""


def root_problem(path: str) -> str:
    """Why a path is no root that a statement can be about; empty where it is one."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or "\0" in path or (path != "/" and not all(parts)):
        return "its root is no path like /data/cohort"
    if any(part in (".", "..") for part in parts):
        return "its root is no plain path"
    return ""
