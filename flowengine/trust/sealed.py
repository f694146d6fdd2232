"""Sealed objects: what a site stores for somebody without being able to read it.

Goal
    The holder sees how many objects there are and about how large they are, and learns nothing else; whoever has the
    key finds every change to an object. Sealing the same object again gives the same bytes where nothing changed, so
    that a second copy sends what was edited.
Plan
    One *sealing key* for each source path that is given away. An object's id is a keyed hash of its path; it is its name
    at the holder, and separates its keys from those of every other object. The plaintext is cut into segments of 64 KiB.
    Each is encrypted with AES-256-GCM under a key of its own, which is derived from a keyed hash of the segment and its
    place (as in SIV, RFC 5297, and DAE, Rogaway and Shrimpton 2006), so no key ever meets two plaintexts, and the nonce is
    constant. Behind the segments stands what is known of the object (path, kind, mode, times, a digest over all
    segments), sealed in the same way.
Invariants
    - No key and nonce are used for two plaintexts.
    - Nothing is released as plaintext before its tag was checked; nothing of an object is believed before its end was.
    - A changed, missing, added, moved or exchanged byte, segment or object gives `IntegrityError`.
"""

from __future__ import annotations

import hmac
import struct
from base64 import b32decode, b32encode
from collections.abc import Iterator
from hashlib import sha256
from typing import Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flowengine.errors import IntegrityError
from flowengine.units import show_path
from flowengine.wire.keys import Secret

__all__ = [
    "HEADER_BYTES",
    "KEY_BYTES",
    "KEY_ID_BYTES",
    "SEGMENT_BYTES",
    "SUITE",
    "TRAILER_BYTES",
    "Kind",
    "ObjectHeader",
    "ObjectMeta",
    "ObjectOpener",
    "ObjectSealer",
    "SealingKey",
    "object_name",
    "open_object",
    "parse_header",
    "parse_object_name",
    "sealed_segment_bytes",
    "sealed_size",
]

SUITE: Final = "aes-256-gcm"
"""The one suite, as policies name it."""
MAGIC: Final = b"flowseal"
VERSION: Final = 1
_SUITE_NUMBER: Final = 1
SEGMENT_BYTES: Final = 64 * 1024
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 16
OBJECT_ID_BYTES: Final = 16
_SIV_BYTES: Final = 32
_TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = _SIV_BYTES + _TAG_BYTES
"""What a sealed segment is longer than its plaintext."""
_HEADER: Final = struct.Struct("<8sBBHI16s16s")
HEADER_BYTES: Final = _HEADER.size
TRAILER_BYTES: Final = 4
_META_STEP: Final = 256
"""Descriptions are padded to multiples of this, so that their lengths tell little of names."""
MAX_META_BYTES: Final = 128 * 1024
_META_INDEX: Final = 2**64 - 1
_NONCE: Final = bytes(12)

Kind = Literal["file", "directory", "symlink"]


class ObjectMeta(msgspec.Struct, array_like=True, frozen=True):
    """What is known of an object; sealed behind its segments.

    Attributes:
        path: from the root of what was sealed; empty for the root itself.
        kind: "file", "directory" or "symlink".
        size: plaintext bytes.
        digest: SHA-256 over the first 32 bytes (the keyed hashes) of all sealed segments, in order.
        mode: permission bits.
        mtime_ns: modification time, nanoseconds since 1970, UTC.
        link: target of a symbolic link.
        extra: extended attributes and owner, as a manifest's entry has them.
    """

    path: bytes
    kind: Kind
    size: int
    digest: bytes
    mode: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    extra: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ObjectMeta).decode


def _derive(secret: bytes, purpose: str, about: bytes = b"", length: int = 32) -> bytes:
    info = b"flowengine sealed 1 " + purpose.encode("ascii") + b"\0" + about
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(secret)


class SealingKey(Secret):
    """The key of what was sealed from one source path; never shown or pickled.

    Args:
        secret: 32 random bytes.
    """

    __slots__ = ("_names", "_secret", "id")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a sealing key has {KEY_BYTES} bytes")
        self._secret = bytes(secret)
        self.id = _derive(secret, "key id", length=KEY_ID_BYTES)
        self._names = _derive(secret, "names")

    def secret_bytes(self) -> bytes:
        """The 32 bytes to keep; only for a file of secrets, or to be wrapped."""
        return self._secret

    def object_id(self, path: bytes) -> bytes:
        """How the object of a path is called."""
        return hmac.digest(self._names, path, "sha256")[:OBJECT_ID_BYTES]

    def _object_keys(self, object_id: bytes) -> tuple[bytes, bytes]:
        both = _derive(self._secret, "object", object_id, 64)
        return both[:32], both[32:]

    def __repr__(self) -> str:
        return f"<SealingKey {self.id.hex()}>"


class ObjectHeader(msgspec.Struct, frozen=True):
    """The first bytes of a sealed object, which anybody can read."""

    key_id: bytes
    object_id: bytes


def object_name(object_id: bytes) -> bytes:
    """An id as the name of a file or folder: base32 in lower case, without padding.

    >>> object_name(bytes(16))
    b'aaaaaaaaaaaaaaaaaaaaaaaaaa'
    """
    return b32encode(object_id).rstrip(b"=").lower()


def parse_object_name(name: bytes) -> bytes | None:
    """The id that a name stands for; None where it is no name of a sealed object."""
    try:
        found = b32decode(name.upper() + b"======") if len(name) == 26 else b""
    except ValueError:
        return None
    return found if len(found) == OBJECT_ID_BYTES and object_name(found) == name else None


def parse_header(data: bytes | memoryview, where: str) -> ObjectHeader:
    """The header that an object begins with.

    Args:
        data: at least its first 48 bytes.
        where: the object's place, for messages.

    Raises:
        IntegrityError: that is no sealed object (reason "not-sealed"), or one of a version that is not known here.
    """
    if len(data) < HEADER_BYTES or bytes(data[:8]) != MAGIC:
        raise IntegrityError(
            f"{where} is no sealed object", hint="look at what wrote it there", reason="not-sealed"
        )
    _, version, suite, flags, reserved, key_id, object_id = _HEADER.unpack_from(data)
    if (version, suite, flags, reserved) != (VERSION, _SUITE_NUMBER, 0, 0):
        raise IntegrityError(
            f"{where} is sealed in a way that is not known here (version {version}, suite {suite}, flags {flags:#x})",
            hint="if a newer flowengine sealed it, update this one; otherwise it is damaged: take another copy",
            reason="sealed-damaged",
        )
    return ObjectHeader(key_id, object_id)


def sealed_segment_bytes(size: int, index: int) -> int:
    """Length of a sealed segment of an object with so many plaintext bytes."""
    return min(SEGMENT_BYTES, size - index * SEGMENT_BYTES) + OVERHEAD_BYTES


def sealed_size(size: int, meta_bytes: int) -> int:
    """Length of a sealed object.

    Args:
        size: of the plaintext.
        meta_bytes: of its sealed description.

    >>> sealed_size(0, 304), sealed_size(65_537, 304)
    (356, 65989)
    """
    segments = -(-size // SEGMENT_BYTES)
    return HEADER_BYTES + size + segments * OVERHEAD_BYTES + meta_bytes + TRAILER_BYTES


def _description_bytes(path: bytes, link: bytes, extra: bytes) -> int:
    """Length of a description before it is sealed: padded, and the same whatever size, mode and time it says."""
    longest = ObjectMeta(path, "directory", 2**63 - 1, bytes(32), 0o7777, 2**63 - 1, link, extra)
    length = 4 + len(_encode(longest))
    return length + -length % _META_STEP


class _Object:
    """The keys of one object."""

    __slots__ = ("_encrypting", "_hashes", "_hashing", "_header")

    def __init__(self, key: SealingKey, object_id: bytes) -> None:
        self._header = _HEADER.pack(MAGIC, VERSION, _SUITE_NUMBER, 0, 0, key.id, object_id)
        hashing, self._encrypting = key._object_keys(object_id)
        self._hashing = hmac.new(hashing, digestmod="sha256")
        self._hashes = sha256()

    def _cipher(self, siv: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self._encrypting, siv, "sha256"))

    def _seal(self, index: int, plaintext: bytes | memoryview) -> bytes | bytearray:
        place = index.to_bytes(8, "little")
        hashed = self._hashing.copy()
        hashed.update(place)
        hashed.update(plaintext)
        siv = hashed.digest()
        sealed = bytearray(OVERHEAD_BYTES + len(plaintext))
        sealed[:_SIV_BYTES] = siv
        self._cipher(siv).encrypt_into(
            _NONCE, plaintext, self._header + place, memoryview(sealed)[_SIV_BYTES:]
        )
        return sealed

    def _open(self, index: int, sealed: bytes | memoryview) -> bytes:
        siv = bytes(sealed[:_SIV_BYTES])
        return self._cipher(siv).decrypt(
            _NONCE, bytes(sealed[_SIV_BYTES:]), self._header + index.to_bytes(8, "little")
        )


class ObjectSealer(_Object):
    """Seals one object: its header, each segment in order, then its description. One use.

    Args:
        path: from the root of what is sealed.
    """

    __slots__ = ("_index", "_path", "_size")

    def __init__(self, key: SealingKey, path: bytes) -> None:
        super().__init__(key, key.object_id(path))
        self._path = path
        self._index = self._size = 0

    @property
    def header(self) -> bytes:
        """What the object begins with."""
        return self._header

    def segment(self, plaintext: bytes | memoryview) -> bytes | bytearray:
        """The next segment, sealed. All but the last have `SEGMENT_BYTES`; none is empty."""
        assert 0 < len(plaintext) <= SEGMENT_BYTES
        assert self._size == self._index * SEGMENT_BYTES, "only the last segment is shorter"
        sealed = self._seal(self._index, plaintext)
        self._hashes.update(sealed[:_SIV_BYTES])
        self._index += 1
        self._size += len(plaintext)
        return sealed

    def finish(
        self, kind: Kind, mode: int, mtime_ns: int, link: bytes = b"", extra: bytes = b""
    ) -> bytes | bytearray:
        """What stands behind the segments."""
        meta = ObjectMeta(self._path, kind, self._size, self._hashes.digest(), mode, mtime_ns, link, extra)
        return self._description(meta)

    def _description(self, meta: ObjectMeta) -> bytes | bytearray:
        encoded = _encode(meta)
        data = len(encoded).to_bytes(4, "little") + encoded
        room = _description_bytes(meta.path, meta.link, meta.extra)
        sealed = self._seal(_META_INDEX, data + bytes(room - len(data)))
        return sealed + len(sealed).to_bytes(TRAILER_BYTES, "little")

    @staticmethod
    def size_of(path: bytes, size: int, link: bytes = b"", extra: bytes = b"") -> int:
        """Length of the sealed object, known before it is sealed."""
        return sealed_size(size, _description_bytes(path, link, extra) + OVERHEAD_BYTES)

    def seal(
        self, plaintext: bytes, kind: Kind, mode: int, mtime_ns: int, link: bytes = b"", extra: bytes = b""
    ) -> bytes:
        """A whole small object."""
        view = memoryview(plaintext)
        parts: list[bytes | bytearray] = [self.header]
        parts += [self.segment(view[at : at + SEGMENT_BYTES]) for at in range(0, len(view), SEGMENT_BYTES)]
        parts.append(self.finish(kind, mode, mtime_ns, link, extra))
        return b"".join(parts)


class ObjectOpener(_Object):
    """Opens one object that is `size` bytes long: its end first, then its segments in order.

    Args:
        header: as `parse_header` gave it; its key id is `key`'s.
        size: of the sealed object.
        where: the object's place, for messages.

    Raises:
        IntegrityError: another key sealed it (reason "sealing-key-other").
    """

    __slots__ = ("_index", "_object_id", "_sealed_bytes", "_where", "key", "meta")

    def __init__(self, key: SealingKey, header: ObjectHeader, size: int, where: str) -> None:
        if header.key_id != key.id:
            raise IntegrityError(
                f"{where} was sealed with key {header.key_id.hex()}, not with {key.id.hex()}",
                hint="give the key whose id it names; the site that sealed it keeps it",
                reason="sealing-key-other",
            )
        super().__init__(key, header.object_id)
        self.key = key
        self._object_id = header.object_id
        self._sealed_bytes = size
        self._where = where
        self._index = 0
        self.meta: ObjectMeta | None = None

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where} is not as it was sealed: {what}",
            hint="take another copy of it, or seal it anew from the source",
            reason="sealed-damaged",
        )

    def meta_span(self, trailer: bytes) -> tuple[int, int]:
        """(offset, length) of the sealed description, by the object's last four bytes.

        Raises:
            IntegrityError: there is no room for it.
        """
        length = int.from_bytes(trailer, "little") if len(trailer) == TRAILER_BYTES else 0
        start = self._sealed_bytes - TRAILER_BYTES - length
        if not OVERHEAD_BYTES < length <= MAX_META_BYTES or start < HEADER_BYTES:
            raise self._damaged("its end is missing")
        return start, length

    def open_meta(self, sealed: bytes) -> ObjectMeta:
        """The description.

        Raises:
            IntegrityError: it is not what was sealed, is another object's, or does not fit the object's length.
        """
        try:
            data = self._open(_META_INDEX, sealed)
            length = int.from_bytes(data[:4], "little")
            if any(data[4 + length :]) or 4 + length > len(data):
                raise ValueError
            meta = _decode(data[4 : 4 + length])
        except (InvalidTag, ValueError, msgspec.MsgspecError, RecursionError):
            raise self._damaged("its description does not open") from None
        if self.key.object_id(meta.path) != self._object_id:
            raise self._damaged(f"it says to be {show_path(meta.path)} and is not called so")
        if meta.size < 0 or sealed_size(meta.size, len(sealed)) != self._sealed_bytes:
            raise self._damaged(f"it has {self._sealed_bytes} bytes, which {meta.size} bytes do not give")
        if (
            len(meta.digest) != 32
            or not 0 <= meta.mode <= 0o7777
            or not -(2**63) <= meta.mtime_ns < 2**63
            or (meta.kind != "file" and meta.size)
            or (meta.kind != "directory" and not meta.path)
        ):
            raise self._damaged("its description cannot be meant")
        self.meta = meta
        return meta

    def segment_bytes(self) -> int:
        """Length of the next sealed segment; 0 behind the last."""
        assert self.meta is not None
        if self._index * SEGMENT_BYTES >= self.meta.size:
            return 0
        return sealed_segment_bytes(self.meta.size, self._index)

    def open_segment(self, sealed: bytes | memoryview) -> bytes:
        """The next segment's plaintext; not to be believed before `check_end`.

        Raises:
            IntegrityError: it is not the segment that was sealed here.
        """
        if len(sealed) != self.segment_bytes():
            raise self._damaged(f"it ends in segment {self._index}")
        try:
            plaintext = self._open(self._index, sealed)
        except InvalidTag:
            raise self._damaged(f"segment {self._index} does not open") from None
        self._hashes.update(bytes(sealed[:_SIV_BYTES]))
        self._index += 1
        return plaintext

    def check_end(self) -> None:
        """Raise unless these were all segments of one and the same state of the object.

        Raises:
            IntegrityError: segments are missing, or are of another time.
        """
        assert self.meta is not None
        if self.segment_bytes() or not hmac.compare_digest(self._hashes.digest(), self.meta.digest):
            raise self._damaged("its segments are not those of one state")


def open_object(key: SealingKey, data: bytes, where: str = "the object") -> tuple[ObjectMeta, bytes]:
    """A whole sealed object in memory: its description and its plaintext.

    Raises:
        IntegrityError: it is not what was sealed.

    >>> key = SealingKey(bytes(32))
    >>> meta, content = open_object(key, ObjectSealer(key, b"a/b").seal(b"hello", "file", 0o644, 0))
    >>> meta.path, meta.size, content
    (b'a/b', 5, b'hello')
    """
    opener = ObjectOpener(key, parse_header(data, where), len(data), where)
    start, length = opener.meta_span(data[-TRAILER_BYTES:])
    meta = opener.open_meta(data[start : start + length])
    return meta, b"".join(_segments(opener, data))


def _segments(opener: ObjectOpener, data: bytes) -> Iterator[bytes]:
    at = HEADER_BYTES
    while length := opener.segment_bytes():
        yield opener.open_segment(data[at : at + length])
        at += length
    opener.check_end()
