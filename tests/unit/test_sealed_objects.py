"""Sealed objects byte for byte: pinned, opened a second time from the specification, and no change of one passes.

Provenance of the vectors: made by this implementation; `by_the_book` follows docs/spec/sealed.md with `cryptography` and
`msgspec` alone. Whatever changes one of these bytes is a new version of the format.
"""

from __future__ import annotations

import hmac
import importlib.util
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flowengine.errors import AuthenticationError, IntegrityError
from flowengine.trust.sealed import (
    HEADER_BYTES,
    ObjectSealer,
    SealingKey,
    object_name,
    open_object,
    parse_object_name,
)
from flowengine.trust.sealing_keys import OpeningKey, dump_key, load_key, unwrap_key, wrap_key

HERE = Path(__file__).parent.parent
VECTORS: dict[str, Any] = json.loads((HERE / "vectors" / "sealed.json").read_text("utf-8"))
SECRET = bytes.fromhex(VECTORS["secret"])
KEY = SealingKey(SECRET)

_PATH = HERE / "fuzz" / "fuzz_sealed.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_sealed", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz_sealed = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz_sealed)


def content(size: int) -> bytes:
    return bytes((n * n + 7) & 0xFF for n in range(size))


def sealed(row: dict[str, Any]) -> bytes:
    sealer = ObjectSealer(KEY, row["path"].encode())
    return sealer.seal(content(row["size"]), row["kind"], row["mode"], row["mtime_ns"], row["link"].encode())


def hkdf(info: bytes, length: int = 32) -> bytes:
    return HKDF(hashes.SHA256(), length, None, info).derive(SECRET)


def by_the_book(data: bytes) -> tuple[list[Any], bytes]:
    """An object opened as the specification says, with no code of this project."""
    header, object_id = data[:48], data[32:48]
    assert header[:16] == b"flowseal" + bytes([1, 1, 0, 0, 0, 0, 0, 0])
    assert header[16:32] == hkdf(b"flowengine sealed 1 key id\0", 16)
    both = hkdf(b"flowengine sealed 1 object\0" + object_id, 64)

    def opened(part: bytes, index: int) -> bytes:
        place = index.to_bytes(8, "little")
        key = hmac.digest(both[32:], part[:32], "sha256")
        plain = AESGCM(key).decrypt(bytes(12), part[32:], header + place)
        assert hmac.digest(both[:32], place + plain, "sha256") == part[:32]
        return plain

    end = len(data) - 4 - int.from_bytes(data[-4:], "little")
    described = opened(data[end:-4], 2**64 - 1)
    meta = msgspec.msgpack.decode(described[4 : 4 + int.from_bytes(described[:4], "little")])
    parts = [data[at : min(at + 65_584, end)] for at in range(48, end, 65_584)]
    assert sha256(b"".join(part[:32] for part in parts)).digest() == meta[3]
    assert hmac.digest(hkdf(b"flowengine sealed 1 names\0"), meta[0], "sha256")[:16] == object_id
    return meta, b"".join(opened(part, index) for index, part in enumerate(parts))


@pytest.mark.parametrize("row", VECTORS["objects"], ids=lambda row: row["path"] or "the root")
def test_objects_are_sealed_as_pinned_and_open_by_the_book(row: dict[str, Any]) -> None:
    data = sealed(row)
    assert (len(data), sha256(data).hexdigest()) == (row["sealed_bytes"], row["sha256"])
    assert data.hex() == row.get("sealed", data.hex())
    assert ObjectSealer.size_of(row["path"].encode(), row["size"], row["link"].encode()) == len(data)
    meta, plain = open_object(KEY, data)
    said, also = by_the_book(data)
    assert plain == also == content(row["size"])
    assert (meta.path.decode(), meta.kind, meta.size, meta.mode, meta.mtime_ns) == (
        row["path"], row["kind"], row["size"], row["mode"], row["mtime_ns"],
    )  # fmt: skip
    assert said[:3] == [row["path"].encode(), row["kind"], row["size"]]
    assert object_name(KEY.object_id(row["path"].encode())).decode() == row["name"]
    assert parse_object_name(row["name"].encode()) == data[32:48]


def test_keys_are_kept_and_wrapped_as_pinned() -> None:
    kept = load_key(VECTORS["key_file"].encode(), "the file")
    assert (kept.key.id.hex(), dump_key(kept).decode()) == (VECTORS["key_id"], VECTORS["key_file"])
    opening = OpeningKey(bytes.fromhex(VECTORS["opening_secret"]))
    assert opening.public == VECTORS["opening_key"]
    wrapped = VECTORS["wrapped"].encode()
    assert unwrap_key(wrapped, opening, "it").key.id == kept.key.id
    assert wrap_key(kept, opening.public) != wrapped  # a new ephemeral key each time
    for at in range(0, len(wrapped), 7):
        changed = wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :]
        with pytest.raises(AuthenticationError) as refused:
            unwrap_key(changed, opening, "it")
        assert refused.value.reason == "sealing-key-other"
        assert VECTORS["secret"] not in str(refused.value)


def test_every_changed_byte_and_every_cut_is_found() -> None:
    data = ObjectSealer(KEY, b"a").seal(content(70), "file", 0o644, 1)
    for at in range(len(data)):
        for changed in (
            data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :],
            data[:at],
            data[:at] + data[at + 1 :],
        ):
            with pytest.raises(IntegrityError):
                open_object(KEY, changed)
    with pytest.raises(IntegrityError):
        open_object(KEY, data + b"\0")
    assert open_object(KEY, data)[1] == content(70)


def test_segments_belong_to_their_place_their_object_and_their_state() -> None:
    size = 3 * 65_536
    one = ObjectSealer(KEY, b"a").seal(content(size), "file", 0o644, 1)
    other = ObjectSealer(KEY, b"b").seal(content(size), "file", 0o644, 1)
    length = 65_584
    first, second = (
        one[HEADER_BYTES : HEADER_BYTES + length],
        one[HEADER_BYTES + length : HEADER_BYTES + 2 * length],
    )
    rest = one[HEADER_BYTES + 2 * length :]
    older = ObjectSealer(KEY, b"a").seal(bytes(size), "file", 0o644, 1)[HEADER_BYTES : HEADER_BYTES + length]
    for changed in (
        one[:HEADER_BYTES] + second + first + rest,  # reordered
        one[:HEADER_BYTES] + first + first + rest,  # doubled
        one[:HEADER_BYTES] + other[HEADER_BYTES : HEADER_BYTES + length] + second + rest,  # another object's
        one[:HEADER_BYTES] + older + second + rest,  # of another time
        other[:HEADER_BYTES] + one[HEADER_BYTES:],  # under another name
        one[: HEADER_BYTES + length] + rest,  # one is missing
    ):
        with pytest.raises(IntegrityError) as refused:
            open_object(KEY, changed)
        assert refused.value.reason == "sealed-damaged"


def test_equal_segments_look_equal_only_at_one_place_of_one_object() -> None:
    same = ObjectSealer(KEY, b"a").seal(bytes(2 * 65_536), "file", 0o644, 1)
    first, second = same[48 : 48 + 65_584], same[48 + 65_584 : 48 + 2 * 65_584]
    assert first[:32] != second[:32]
    assert first[32:64] != second[32:64]
    assert ObjectSealer(KEY, b"a").seal(bytes(2 * 65_536), "file", 0o644, 1) == same
    assert (
        ObjectSealer(SealingKey(bytes(32)), b"a").seal(bytes(2 * 65_536), "file", 0o644, 1)[32:] != same[32:]
    )


@pytest.mark.parametrize("name", fuzz_sealed.TARGETS)
def test_the_fuzz_targets_take_samples(name: str) -> None:
    for sample in (b"", b"\0", b"\1", b"flowseal", bytes(20_000), b"{}", b"\1" + bytes(40) + b"\x80"):
        fuzz_sealed.TARGETS[name](sample)


def test_the_fuzz_targets_find_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_sealed, "_opened", lambda data: None)
    with pytest.raises(AssertionError, match="changed"):
        fuzz_sealed.TARGETS["objects"](b"\1\1")
