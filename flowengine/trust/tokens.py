"""Bearer secrets that people and programs carry as text: API tokens, join tokens, login strings.

Only hashes of secrets are stored. A secret has 256 random bits, so a plain SHA-256 of it is enough: there is nothing to
guess, and nothing to slow down.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, TypeVar

import msgspec

from flowengine.errors import UsageError
from flowengine.trust.certificate_facts import Rng
from flowengine.units import is_name

__all__ = ["JoinSecret", "Login", "UserToken", "make_join_secret", "make_user_token"]

MAX_CHARACTERS: Final = 4096
SECRET_BYTES: Final = 32
FINGERPRINT_BYTES: Final = 32
_USER: Final = re.compile(r"flowt_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_JOIN_PREFIX: Final = "flowj_"
_LOGIN_PREFIX: Final = "flowl_"


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, slots=True)
class UserToken:
    """An API token, `flowt_ID_SECRET`. The id is public and finds the stored hash.

    Attributes:
        id: 8 hexadecimal digits.
    """

    id: str
    _secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> UserToken:
        """The token that somebody sent; white space around it is ignored.

        Raises:
            UsageError: it has not the form of one; the message never repeats it.
        """
        match = _USER.fullmatch(text.strip()) if len(text) <= MAX_CHARACTERS else None
        if match is None:
            raise UsageError(
                "this is no API token of flowengine", hint="copy it whole: flowt_, 8 digits, _, 43 characters"
            )
        return cls(match[1], match[2])

    def format_secret(self) -> str:
        """The whole token: only for whom it is meant."""
        return f"flowt_{self.id}_{self._secret}"

    def digest(self) -> str:
        """What is stored: SHA-256 of the whole token, hexadecimal."""
        return sha256(self.format_secret().encode("ascii")).hexdigest()

    def matches(self, stored_digest: str) -> bool:
        """Whether it is the token whose digest was stored; takes the same time whatever differs."""
        return hmac.compare_digest(self.digest().encode(), stored_digest.encode())


def make_user_token(rng: Rng) -> UserToken:
    """A new API token."""
    return UserToken(rng(4).hex(), _text(rng(SECRET_BYTES)))


class _JoinFields(msgspec.Struct, array_like=True):
    url: str
    ca_sha256: bytes
    site: str
    id: str
    secret: bytes


class _LoginFields(msgspec.Struct, array_like=True):
    url: str
    ca_sha256: bytes
    token: str


@dataclass(frozen=True, slots=True)
class JoinSecret:
    """A one-time join token, `flowj_…`: where to join, how to know the coordinator, as which site.

    Attributes:
        url: of the coordinator.
        ca_sha256: SHA-256 of the CA's certificate (DER): whoever answers must show a chain to it.
        site: name that the site joins under.
        id: finds the stored digest.
    """

    url: str
    ca_sha256: bytes
    site: str
    id: str
    _secret: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> JoinSecret:
        """The token that an operator handed out; errors as for `UserToken.parse`."""
        fields = _parse(text, _JOIN_PREFIX, _JoinFields, "join token")
        if (
            len(fields.ca_sha256) != FINGERPRINT_BYTES
            or len(fields.secret) != SECRET_BYTES
            or not is_name(fields.site)
            or re.fullmatch(r"[0-9a-f]{8,32}", fields.id) is None
        ):
            raise _no_token("join token", _JOIN_PREFIX)
        return cls(fields.url, fields.ca_sha256, fields.site, fields.id, fields.secret)

    def format_secret(self) -> str:
        """The whole token: only for whom it is meant."""
        fields = _JoinFields(self.url, self.ca_sha256, self.site, self.id, self._secret)
        return _JOIN_PREFIX + _text(msgspec.msgpack.encode(fields))

    def digest(self) -> str:
        """What is stored: SHA-256 over id, site and secret, hexadecimal."""
        return sha256(f"{self.id}/{self.site}/".encode() + self._secret).hexdigest()

    def matches(self, stored_digest: str) -> bool:
        """Whether it is the token whose digest was stored; takes the same time whatever differs."""
        return hmac.compare_digest(self.digest().encode(), stored_digest.encode())


def make_join_secret(url: str, ca_sha256: bytes, site: str, rng: Rng) -> JoinSecret:
    """A new join token."""
    return JoinSecret(url, ca_sha256, site, rng(8).hex(), rng(SECRET_BYTES))


@dataclass(frozen=True, slots=True)
class Login:
    """A login string, `flowl_…`: where the coordinator is, how to know it, and an API token."""

    url: str
    ca_sha256: bytes
    token: UserToken

    @classmethod
    def parse(cls, text: str) -> Login:
        """The string that somebody pasted; errors as for `UserToken.parse`."""
        fields = _parse(text, _LOGIN_PREFIX, _LoginFields, "login string")
        if len(fields.ca_sha256) != FINGERPRINT_BYTES:
            raise _no_token("login string", _LOGIN_PREFIX)
        return cls(fields.url, fields.ca_sha256, UserToken.parse(fields.token))

    def format_secret(self) -> str:
        """The whole string: only for whom it is meant."""
        fields = _LoginFields(self.url, self.ca_sha256, self.token.format_secret())
        return _LOGIN_PREFIX + _text(msgspec.msgpack.encode(fields))


_F = TypeVar("_F", _JoinFields, _LoginFields)


def _parse(text: str, prefix: str, kind: type[_F], what: str) -> _F:
    text = text.strip()
    try:
        if len(text) > MAX_CHARACTERS or not text.startswith(prefix):
            raise ValueError
        body = text.removeprefix(prefix)
        if re.fullmatch(r"[A-Za-z0-9_-]+", body) is None:
            raise ValueError
        fields = msgspec.msgpack.decode(urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=kind)
        if not re.fullmatch(r"https://[A-Za-z0-9._:\[\]%-]+(/[A-Za-z0-9._~/-]*)?", fields.url):
            raise ValueError
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _no_token(what, prefix) from None
    return fields


def _no_token(what: str, prefix: str) -> UsageError:
    return UsageError(
        f"this is no {what} of flowengine, or not the whole of it",
        hint=f"copy it whole; it begins with {prefix}",
    )
