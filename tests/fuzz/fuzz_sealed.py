"""Coverage-guided fuzzing of what a holder gives back: sealed objects, key files, wrapped keys.

Usage: python tests/fuzz/fuzz_sealed.py TARGET [libFuzzer options], as `objects -max_total_time=60`. Needs atheris;
importing this module, and calling the targets with bytes, does not.

A target must take any bytes: a `FlowError` of the kinds that it names is right, anything else is a finding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from flowengine.errors import AuthenticationError, IntegrityError, LocalError
from flowengine.trust.sealed import ObjectMeta, ObjectSealer, SealingKey, open_object, parse_object_name
from flowengine.trust.sealing_keys import KeptKey, OpeningKey, dump_key, load_key, unwrap_key, wrap_key

_KEY: Final = SealingKey(bytes(range(32)))
_GOOD: Final = ObjectSealer(_KEY, b"a/b").seal(b"hello" * 50, "file", 0o644, 1)
_KEPT: Final = KeptKey(_KEY, "paris", "lab", "/data", 1)
_FILE: Final = dump_key(_KEPT)
_OWN: Final = OpeningKey(bytes(range(1, 33)))
_WRAPPED: Final = wrap_key(_KEPT, _OWN.public)


def _changed(good: bytes, data: bytes) -> bytes:
    """What follows the first byte; where that is odd, as a change of what is good."""
    if not (data[:1] and data[0] & 1):
        return data[1:]
    change = data[1:].ljust(len(good), b"\0")[: len(good)]
    return bytes(a ^ b for a, b in zip(good, change, strict=True)) + data[1 + len(good) :]


def _opened(data: bytes) -> tuple[ObjectMeta, bytes]:
    return open_object(_KEY, data)


def objects(data: bytes) -> None:
    """A sealed object as a holder gives it; with an odd first byte the right one, changed."""
    given = _changed(_GOOD, data)
    try:
        _opened(given)
    except IntegrityError as error:
        str(error).encode("utf-8")
        return
    if given != _GOOD:
        raise AssertionError("an object was changed and opened")


def descriptions(data: bytes) -> None:
    """A description that was sealed with the right key: whatever it says, it fits its object or is refused."""
    sealer = ObjectSealer(_KEY, b"a/b")
    plain = data[: 64 * 1024]
    sealed = sealer._seal(2**64 - 1, len(plain).to_bytes(4, "little") + plain)
    given = sealer.header + sealed + len(sealed).to_bytes(4, "little")
    try:
        meta, content = _opened(given)
    except IntegrityError:
        return
    if meta.path != b"a/b" or content or meta.size:
        raise AssertionError("a description was taken that is another object's")


def names(data: bytes) -> None:
    """A name of a file at a holder."""
    found = parse_object_name(data)
    if found is not None and len(found) != 16:
        raise AssertionError("a name stands for no id")


def key_files(data: bytes) -> None:
    """A key file."""
    try:
        load_key(_changed(_FILE, data), "a file")
    except LocalError as error:
        str(error).encode("utf-8", "surrogatepass")


def wrapped_keys(data: bytes) -> None:
    """A wrapped key."""
    given = _changed(_WRAPPED, data)
    try:
        kept = unwrap_key(given, _OWN, "a file")
    except AuthenticationError as error:
        str(error).encode("utf-8", "surrogatepass")
        return
    if kept.key.id != _KEY.id:
        raise AssertionError("a wrapped key was forged")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (objects, descriptions, names, key_files, wrapped_keys)
}


if __name__ == "__main__":
    from instrument import fuzz

    fuzz(sys.argv, TARGETS, "flowengine.trust.")
