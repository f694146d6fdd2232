"""Sizes, rates, durations and names as people write and read them.

Pure functions; every parser raises `UsageError` that says what was expected.
"""

from __future__ import annotations

import re
from typing import Final

from flowengine.errors import UsageError

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "NAME_PATTERN",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_rate",
    "is_name",
    "parse_bytes",
    "parse_duration_s",
    "parse_rate_bits_per_s",
    "show_path",
]

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Name of a site, tenant or user: as a DNS label (RFC 1123)."""

_BYTES: Final = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 1024 * GIB, "tib": 1024 * GIB, "tb": 10**12,
    "p": 1024**2 * GIB, "pib": 1024**2 * GIB, "pb": 10**15,
}  # fmt: skip
_BITS: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_SECONDS: Final = {
    "ms": 0.001, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minute": 60.0,
    "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0, "d": 86400.0, "day": 86400.0, "days": 86400.0,
    "w": 604800.0, "week": 604800.0, "weeks": 604800.0,
}  # fmt: skip
_QUANTITY: Final = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a {what}", hint=f"write it like {example}")
    return float(match[1].replace("_", "")), match[2].lower()


def parse_bytes(text: str) -> int:
    """Bytes in `text`: K, M, G, T, P and KiB… are powers of 1024; KB, MB… powers of 1000.

    >>> parse_bytes("64 KiB"), parse_bytes("2GB")
    (65536, 2000000000)
    """
    number, unit = _split(text, "size", "64KiB or 2GB")
    if unit not in _BYTES:
        raise UsageError(
            f"{text!r} has an unknown size unit {unit!r}", hint="use KiB, MiB, GiB, TiB or KB, MB, GB, TB"
        )
    return int(number * _BYTES[unit])


def parse_rate_bits_per_s(text: str) -> float:
    """Bits a second in `text`: '4 Gbit/s' or '500mbit' in bits, '100MB/s' in bytes.

    >>> parse_rate_bits_per_s("4 Gbit/s"), parse_rate_bits_per_s("1MB/s")
    (4000000000.0, 8000000.0)
    """
    stripped = text.strip()
    for suffix in ("/s", "ps"):
        if stripped.lower().endswith(suffix):
            stripped = stripped[: -len(suffix)]
            break
    number, unit = _split(stripped, "rate", "500Mbit/s or 100MB/s")
    if unit in _BITS:
        return number * _BITS[unit]
    if unit in _BYTES and unit:
        return number * _BYTES[unit] * 8
    raise UsageError(f"{text!r} has an unknown rate unit {unit!r}", hint="use Mbit/s, Gbit/s, MB/s or MiB/s")


def parse_duration_s(text: str) -> float:
    """Seconds in `text`.

    >>> parse_duration_s("180 days"), parse_duration_s("90s")
    (15552000.0, 90.0)
    """
    number, unit = _split(text, "duration", "30s, 5min or 180 days")
    if unit not in _SECONDS:
        raise UsageError(f"{text!r} has an unknown time unit {unit!r}", hint="use s, min, h, days or weeks")
    return number * _SECONDS[unit]


def format_bytes(size_bytes: float) -> str:
    """Bytes with a binary unit, three digits.

    >>> format_bytes(1536), format_bytes(12)
    ('1.50 KiB', '12 B')
    """
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            if unit == "B":
                return f"{int(value)} B"
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_rate(bytes_per_s: float) -> str:
    """A rate in decimal megabytes or gigabytes a second, as network people write it.

    >>> format_rate(930e6)
    '930 MB/s'
    """
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_s >= size:
            value = bytes_per_s / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{bytes_per_s:.0f} B/s"


def format_count(count: int, noun: str, more: str = "") -> str:
    """A number of things; `more` stands behind the number, as "+" where there may be more.

    >>> format_count(1, "object"), format_count(0, "object"), format_count(1, "object", "+")
    ('1 object', '0 objects', '1+ objects')
    """
    return f"{count}{more} {noun}{'' if count == 1 and not more else 's'}"


def format_duration(seconds: float) -> str:
    """A duration in the two largest units that matter.

    >>> format_duration(3725), format_duration(0.25)
    ('1h 2min', '0.25s')
    """
    if seconds < 10:
        return f"{seconds:.2f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}min {whole % 60}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}min"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def is_name(text: str) -> bool:
    r"""Whether `text` can name a site, tenant or user.

    >>> is_name("berlin-2"), is_name("Berlin"), is_name("a\n")
    (True, False, False)
    """
    return re.fullmatch(NAME_PATTERN[1:-1], text) is not None


def show_path(path: bytes) -> str:
    r"""A path for people and JSON: UTF-8 where it is, `\xNN` for every other byte and for control characters.

    >>> show_path(b"caf\xc3\xa9/\xff\n")
    'café/\\xff\\x0a'
    """
    text = path.decode("utf-8", "surrogateescape")
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}"
        if 0xDC80 <= ord(c) <= 0xDCFF
        else f"\\x{ord(c):02x}"
        if ord(c) < 32 or ord(c) == 127
        else c
        for c in text
    )
