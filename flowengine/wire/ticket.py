"""Tickets: one string that says where a source listens, how to know it, and a secret that lets in.

`flow://HOST:PORT/sub/dir#SECRET`. The part before `#` is shown everywhere; the fragment holds the server
certificate's fingerprint and the secret and is shown only by `Ticket.format_secret_url`.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from flowengine.errors import ProtocolError, UsageError
from flowengine.wire.keys import FINGERPRINT_BYTES, Secret
from flowengine.wire.paths import check_relative_path

__all__ = ["MAX_SECRET_BYTES", "MIN_SECRET_BYTES", "SCHEME", "TICKET_VERSION", "Ticket"]

SCHEME: Final = "flow"
TICKET_VERSION: Final = 1
MIN_SECRET_BYTES: Final = 24
MAX_SECRET_BYTES: Final = 64
MAX_URL_CHARACTERS: Final = 16_384

_EXAMPLE: Final = "write it as the source printed it, like flow://data.example.org:7171/sets/a#AbCd…"
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_AUTHORITY: Final = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?)\]|(?P<host>[^\[\]:@]*)):(?P<port>[0-9]{1,5})"
)
_SAFE_PATH: Final = "/-._~!$&'()*+,;=:@"


@dataclass(frozen=True, slots=True)
class Ticket(Secret):
    """Where a source listens and how to get in.

    Attributes:
        host: Name or address; IPv6 without brackets.
        port: TCP port.
        path: Path below what the source serves, as bytes without a leading slash; empty for all of it.
        fingerprint: SHA-256 of the server's certificate (DER), 32 bytes.
        secret: 24 to 64 random bytes.
    """

    host: str
    port: int
    path: bytes
    fingerprint: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not _is_host(self.host):
            raise _refused(f"{self.host!r} is neither a host name nor an address")
        if not 0 < self.port < 65_536:
            raise _refused(f"{self.port} is not a TCP port")
        if self.path:
            _check_path(self.path)
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise _refused(f"its fingerprint has {len(self.fingerprint)} bytes, not {FINGERPRINT_BYTES}")
        if not MIN_SECRET_BYTES <= len(self.secret) <= MAX_SECRET_BYTES:
            raise _refused(
                f"its secret has {len(self.secret)} bytes, not {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}"
            )

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """The ticket that a person pasted; white space around it is ignored.

        Raises:
            UsageError: it is no ticket; the message never repeats the secret.
        """
        text = text.strip()
        if len(text) > MAX_URL_CHARACTERS:
            raise _refused(f"it has {len(text)} characters; {MAX_URL_CHARACTERS} are the most")
        scheme, mark, rest = text.partition("://")
        if not mark or scheme.lower() != SCHEME:
            raise _refused(f"it does not begin with {SCHEME}://")
        location, mark, fragment = rest.partition("#")
        if not mark or not fragment:
            raise _refused("the secret behind # is missing")
        authority, _, path = location.partition("/")
        match = _AUTHORITY.fullmatch(authority)
        if match is None:
            raise _refused("HOST:PORT is expected behind flow://, with an IPv6 address in brackets")
        if "?" in path:
            raise _refused("a question mark in its path must be written %3F")
        if re.search(r"%(?![0-9A-Fa-f]{2})", path):
            raise _refused("a percent sign in its path must be written %25")
        try:
            path_bytes = unquote_to_bytes(path.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            raise _refused("its path holds half a character") from None
        host = (match["v6"] or match["host"]).replace("%25", "%")
        fingerprint, secret = _decode_fragment(fragment)
        return cls(host, int(match["port"]), path_bytes.rstrip(b"/"), fingerprint, secret)

    @property
    def location(self) -> str:
        r"""The ticket without what is secret: for logs and messages.

        >>> Ticket("::1", 7171, b"a b/\xff", bytes(32), bytes(24)).location
        'flow://[::1]:7171/a%20b/%FF'
        """
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"{SCHEME}://{host}:{self.port}/{quote_from_bytes(self.path, _SAFE_PATH)}"

    def format_secret_url(self) -> str:
        """The whole ticket, secret included: only for whom it is meant."""
        blob = bytes([TICKET_VERSION]) + self.fingerprint + self.secret
        return f"{self.location}#{urlsafe_b64encode(blob).rstrip(b'=').decode('ascii')}"

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"<Ticket {self.location}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ticket):
            return NotImplemented
        same = (self.host, self.port, self.path, self.fingerprint) == (
            other.host, other.port, other.path, other.fingerprint,
        )  # fmt: skip
        return hmac.compare_digest(self.secret, other.secret) and same

    def __hash__(self) -> int:
        return hash((self.host, self.port, self.path, self.fingerprint))


def _decode_fragment(fragment: str) -> tuple[bytes, bytes]:
    if re.fullmatch(r"[A-Za-z0-9_-]+", fragment) is None:
        raise _refused("the part behind # holds a character that no ticket has; was it copied whole?")
    try:
        blob = urlsafe_b64decode(fragment + "=" * (-len(fragment) % 4))
    except ValueError:
        raise _refused("the part behind # is not whole") from None
    if blob[0] != TICKET_VERSION:
        raise UsageError(
            f"this ticket has format version {blob[0]}; this flowengine reads version {TICKET_VERSION}",
            hint="update the older side",
        )
    if len(blob) < 1 + FINGERPRINT_BYTES + MIN_SECRET_BYTES:
        raise _refused("the part behind # is too short; was it copied whole?")
    return blob[1 : 1 + FINGERPRINT_BYTES], blob[1 + FINGERPRINT_BYTES :]


def _check_path(path: bytes) -> None:
    try:
        check_relative_path(path)
    except ProtocolError as error:
        raise _refused(f"its path cannot be used: {error.message}") from None


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    return len(host) <= 253 and _HOST.fullmatch(host) is not None


def _refused(why: str) -> UsageError:
    return UsageError(f"this is not a ticket that flowengine can use: {why}", hint=_EXAMPLE)
