"""A limit's rate at a moment: the constant one, or that of the window that holds then."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from flowengine.api.links import LimitWindow
from flowengine.errors import UsageError

__all__ = ["check_windows", "rate_now"]

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def check_windows(windows: Sequence[LimitWindow]) -> None:
    """Refuse a window in a zone that nobody knows."""
    for window in windows:
        _zone(window.zone)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(
            f"{name!r} is no time zone", hint="write it like Europe/Berlin or Asia/Shanghai"
        ) from None


def rate_now(rate_bits_per_s: int | None, windows: Sequence[LimitWindow], now: float) -> int | None:
    """The rate that holds now; None for no limit. Of several windows that hold, the lowest rate.

    A window whose end is not after its start lasts past midnight and belongs to the day on which it begins. Hours are
    those of the wall clock in the window's zone, daylight saving computed.

    >>> night = LimitWindow(rate_bits_per_s=10, start="20:00", end="06:00", days=["fri"], zone="Europe/Berlin")
    >>> rate_now(5, [night], 1_772_240_400), rate_now(5, [night], 1_772_190_000)  # Saturday 02:00, Friday 12:00
    (10, 5)
    """
    holding = [window.rate_bits_per_s for window in windows if _holds(window, now)]
    return min(holding) if holding else rate_bits_per_s


def _holds(window: LimitWindow, now: float) -> bool:
    there = datetime.fromtimestamp(now, _zone(window.zone))
    minute = there.hour * 60 + there.minute
    start, end = _minute(window.start), _minute(window.end)
    if start < end:
        return start <= minute < end and _on(window, there)
    return (minute >= start and _on(window, there)) or (
        minute < end and _on(window, there - timedelta(days=1))
    )


def _minute(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])


def _on(window: LimitWindow, there: datetime) -> bool:
    return not window.days or _DAYS[there.weekday()] in window.days
