"""Signed bundles: policies, lists, declarations, sites and tests as one deterministic archive.

Layout: an uncompressed tar (ustar, sorted, all times and owners zero) that begins with `LOCK.json` (version, expiry,
digest of every file and of the standard vocabulary), then the files, and ends with `SIGNATURES.json`. Signatures are
Ed25519 over a context line and the bytes of the lock; two roles with two keys have to sign. Bytes in, bytes out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from flowengine.errors import AuthenticationError, Denied, IntegrityError, UsageError
from flowengine.policy.explain import ENGINE
from flowengine.policy.vocabulary import vocabulary_digest

__all__ = [
    "MAX_BUNDLE_BYTES",
    "ROLES",
    "Bundle",
    "authentic",
    "build",
    "build_unversioned",
    "digest",
    "key_id",
    "open_bundle",
    "read_public_key",
    "sign",
    "verify",
]

ROLES: Final = ("policy-owner", "security")
"""The roles that have to sign, each with a key of its own."""

MAX_BUNDLE_BYTES: Final = 16 * 1024 * 1024
"""Every site keeps it, and every agent reads it whole."""
_MAX_FILES: Final = 10_000
_FOR_EVER: Final = 253_402_300_799
"""The last second that RFC 3339 can name."""
_CONTEXT: Final = b"flowengine policy bundle v1\n"
_LOCK: Final = "LOCK.json"
_SIGNATURES: Final = "SIGNATURES.json"
_NAME: Final = re.compile(r"(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*")


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: what its lock says, its files, its signatures as (role, key id, signature)."""

    version: int
    not_after: int
    digest: str
    overdue: tuple[str, ...]
    files: Mapping[str, bytes]
    signatures: tuple[tuple[str, str, bytes], ...]
    lock: bytes


def digest(content: bytes) -> str:
    """`sha256:` and the hex digest."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def key_id(key: Ed25519PublicKey) -> str:
    """How signatures name a key: the first 16 hex digits of the SHA-256 of its raw bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def read_public_key(content: bytes) -> Ed25519PublicKey:
    """An Ed25519 public key: PEM, or 64 hexadecimal digits.

    Raises:
        UsageError: It is none.
    """
    text = content.strip()
    if re.fullmatch(rb"[0-9a-f]{64}", text):
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.decode()))
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            "this is no Ed25519 public key", hint="it is the .pub file of `flow policy bundle keygen`"
        )
    return key


def build(files: Mapping[str, bytes], version: int, not_after: int, overdue: Iterable[str] = ()) -> bytes:
    """An unsigned bundle; the same files, version and expiry give the same bytes.

    Args:
        files: Content by relative path.
        version: Larger than that of any bundle an agent has; a rollback is old content with a new version.
        not_after: Seconds since 1970 after which agents start no transfer under it.
        overdue: Policies and lists past their review, which the lock names.

    Raises:
        UsageError: A path is none, or there are no files.
    """
    if version < 1:
        raise UsageError(f"a bundle's version is a number from 1 on, not {version}", hint="count upwards")
    if not files:
        raise UsageError("a bundle needs files", hint="name the directory that holds the policies")
    for name in files:
        if not _NAME.fullmatch(name) or name in (_LOCK, _SIGNATURES) or len(name) > 100:
            raise UsageError(
                f"{name!r} cannot be a file of a bundle", hint="use letters, digits, - _ . and /"
            )
    lock = {
        "v": 1,
        "engine": ENGINE,
        "vocabulary": vocabulary_digest(),
        "version": version,
        "not_after": not_after,
        "overdue": sorted(overdue),
        "files": {name: digest(content) for name, content in sorted(files.items())},
    }
    return _archive({_LOCK: _canonical(lock), **dict(sorted(files.items()))})


def build_unversioned(files: Mapping[str, bytes]) -> bytes:
    """The bundle as which a coordinator knows policies that it was given as a directory, and names them in its evidence."""
    return build(files, 1, _FOR_EVER)


def sign(bundle: bytes, role: str, key: Ed25519PrivateKey) -> bytes:
    """The bundle with one more signature; an earlier one of the same role is replaced.

    Raises:
        UsageError: The role is none of `ROLES`.
        IntegrityError: The bundle is damaged.
    """
    if role not in ROLES:
        raise UsageError(f"{role!r} is no role that signs bundles", hint="use " + " or ".join(ROLES))
    opened = open_bundle(bundle)
    made = key.sign(_CONTEXT + role.encode() + b"\n" + opened.lock)
    signatures = [found for found in opened.signatures if found[0] != role]
    signatures.append((role, key_id(key.public_key()), made))
    listed = [
        {"role": name, "key": owner, "signature": base64.b64encode(value).decode()}
        for name, owner, value in sorted(signatures)
    ]
    return _archive({_LOCK: opened.lock, **opened.files, _SIGNATURES: _canonical(listed)})


def verify(
    bundle: bytes, trusted: Mapping[str, Iterable[Ed25519PublicKey]], now: int, newest_version: int = 0
) -> Bundle:
    """The bundle, if an agent may act on it.

    Args:
        bundle: The archive.
        trusted: Keys by role.
        now: The time.
        newest_version: The version in force; only a newer bundle is taken.

    Raises:
        IntegrityError: The archive is damaged or a file is not what the lock says.
        AuthenticationError: A role has not signed with a key trusted for it, or one key signed for two roles.
        Denied: It has expired, or is not newer.
    """
    opened = authentic(bundle, trusted)
    if opened.version <= newest_version:
        raise Denied(
            f"bundle version {opened.version} is not newer than {newest_version}",
            hint="to go back, build the old content with a new version",
        )
    if opened.not_after <= now:
        raise Denied(f"bundle version {opened.version} has expired", hint="build and sign a new one")
    return opened


def authentic(bundle: bytes, trusted: Mapping[str, Iterable[Ed25519PublicKey]]) -> Bundle:
    """The bundle, if both roles have signed it, whatever its version and age; errors as of `verify`."""
    opened = open_bundle(bundle)
    signers: dict[str, str] = {}
    for role in ROLES:
        signers[role] = _signer(opened, role, trusted.get(role, ()))
    if len(set(signers.values())) < len(signers):
        raise AuthenticationError(
            "one key signed for both roles", hint="policy owner and security sign with different keys"
        )
    return opened


def _signer(opened: Bundle, role: str, keys: Iterable[Ed25519PublicKey]) -> str:
    by_id = {key_id(key): key for key in keys}
    for name, owner, signature in opened.signatures:
        if name == role and owner in by_id:
            try:
                by_id[owner].verify(signature, _CONTEXT + role.encode() + b"\n" + opened.lock)
            except InvalidSignature:
                raise IntegrityError(
                    f"the signature of {role} by key {owner} does not fit the bundle", hint="sign it again"
                ) from None
            return owner
    signed = [f"{name} with key {owner}" for name, owner, _ in opened.signatures]
    raise AuthenticationError(
        f"no key trusted for {role} has signed; signed by: {', '.join(signed) or 'nobody'}",
        hint=f"flow policy bundle sign --role {role} --key FILE BUNDLE",
    )


def open_bundle(bundle: bytes) -> Bundle:
    """Read an archive and check every file against the lock; signatures are read, not judged.

    Raises:
        IntegrityError: Anything about it is not as it has to be.
    """
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise _damaged(f"it has {len(bundle)} bytes, more than {MAX_BUNDLE_BYTES}")
    members = _members(bundle)
    if next(iter(members), "") != _LOCK:
        raise _damaged("it does not begin with its lock")
    lock_bytes = members.pop(_LOCK)
    signature_bytes = members.pop(_SIGNATURES, b"[]")
    try:
        lock = json.loads(lock_bytes)
        digests = lock["files"]
        version, not_after = int(lock["version"]), int(lock["not_after"])
        overdue = tuple(str(name) for name in lock["overdue"])
        known = lock["v"] == 1 and isinstance(digests, dict)
        signatures = tuple(
            (str(item["role"]), str(item["key"]), base64.b64decode(item["signature"], validate=True))
            for item in json.loads(signature_bytes)
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        raise _damaged("its lock or its signatures cannot be read") from None
    if not known:
        raise _damaged("its lock is of another version")
    if set(digests) != set(members):
        odd = sorted(set(digests) ^ set(members))[0]
        raise _damaged(f"its lock and its files differ at {odd!r}")
    for name, content in members.items():
        if digest(content) != digests[name]:
            raise _damaged(f"{name} is not what the lock says")
    if lock.get("vocabulary") != vocabulary_digest():
        raise IntegrityError(
            f"the bundle was made for another vocabulary of facts ({lock.get('engine')})",
            hint=f"build it again with this version ({ENGINE})",
        )
    return Bundle(version, not_after, digest(lock_bytes), overdue, members, signatures, lock_bytes)


def _damaged(why: str) -> IntegrityError:
    return IntegrityError(f"this is no intact policy bundle: {why}", hint="fetch or build it again")


def _members(bundle: bytes) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(bundle), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or not _NAME.fullmatch(member.name):
                    raise _damaged(f"{member.name!r} is no plain file")
                if member.name in members or len(members) >= _MAX_FILES:
                    raise _damaged(f"{member.name!r} comes twice, or there are too many files")
                members[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError):
        raise _damaged("it is no archive") from None
    return members


def _archive(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
