"""Canonical JSON (RFC 8785) for texts, integers, flags, lists and objects: one value, one row of bytes.

Numbers are integers that every reader of JSON holds exactly (RFC 7493, 2.2); there are no fractions, so no two
writers round differently. What is read must be the bytes that would be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

__all__ = ["MAX_INTEGER", "canonical", "read_canonical"]

MAX_INTEGER: Final = 2**53 - 1
MAX_DEPTH: Final = 64
_MAX_DIGITS: Final = 17


def canonical(value: object) -> bytes:
    r"""The bytes of a value.

    >>> canonical({"b": [1, True, None], "a": "\u20ac"})
    b'{"a":"\xe2\x82\xac","b":[1,true,null]}'

    Raises:
        ValueError: it holds a fraction, an integer beyond 2^53-1, a key that is no text, a lone surrogate, anything
            that JSON does not know, or is nested too deep.
    """
    plain = _plain(value, 0)
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def read_canonical(data: bytes) -> object:
    """The value of canonical bytes.

    Raises:
        ValueError: they are no JSON, or not the one way to write it.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"), parse_int=_integer, parse_float=_fraction, parse_constant=_fraction
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    if canonical(value) != data:
        raise ValueError("it is not written in the one canonical way")
    return value


def _plain(value: object, depth: int) -> object:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"{value} is beyond 2^53-1: write it as text")
        return int(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text")  # noqa: TRY004 - one kind of error for callers
        return {key: _plain(value[key], depth + 1) for key in sorted(value, key=_utf16)}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, depth + 1) for item in value]
    raise ValueError(f"canonical JSON has no place for {type(value).__name__}")


def _utf16(key: str) -> bytes:
    """RFC 8785, 3.2.3: keys are sorted by their UTF-16 code units."""
    return key.encode("utf-16-be")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("an integer is too long")
    return int(text)


def _fraction(text: str) -> NoReturn:
    raise ValueError(f"{text} is no integer")
