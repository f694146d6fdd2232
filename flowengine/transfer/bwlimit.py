"""What `--bwlimit` says, followed while a transfer runs: a rate, rates by time of day, or a file that holds either."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from flowengine.errors import FlowError, UsageError
from flowengine.transfer.pacing import RateSchedule, parse_schedule
from flowengine.transfer.session import Session
from flowengine.units import format_rate

__all__ = ["LimitSetting", "following"]

_LOOK_EVERY_S: Final = 0.5
_MAX_FILE_BYTES: Final = 4096


class LimitSetting:
    """A limit as a user wrote it.

    Args:
        text: as `pacing.parse_schedule` reads it; with `@` before it, the path of a file that holds such a text, which
            is looked at again twice a second.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, text: str) -> None:
        self._path = text[1:] if text.startswith("@") else ""
        self._text = self._read() if self._path else text
        self._schedule: RateSchedule = parse_schedule(self._text)

    def _read(self) -> str:
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read(_MAX_FILE_BYTES).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the limit cannot be read from {self._path}: {error}",
                hint="write one line like 200Mbit/s, or off, into that file",
            ) from None

    def current(self, now: time.struct_time) -> float | None:
        """Bits per second that are allowed at this local time; None for no limit.

        Raises:
            UsageError: the file cannot be read any more; what it said last still holds.
        """
        if self._path:
            text = self._read()
            if text != self._text:
                self._text = text
                self._schedule = parse_schedule(text)
        return self._schedule.rate_at(now.tm_hour * 60 + now.tm_min)


@contextlib.asynccontextmanager
async def following(
    session: Session, setting: LimitSetting | None, note: Callable[[str], None]
) -> AsyncIterator[None]:
    """Hold a session to a setting for the length of the block; the first rate holds before any data is sent."""
    if setting is None:
        yield
        return
    rate = setting.current(time.localtime())
    session.limit(rate)

    async def follow(last: float | None) -> None:
        wrong = ""
        while True:
            await trio.sleep(_LOOK_EVERY_S)
            try:
                rate = setting.current(time.localtime())
            except FlowError as error:
                if error.message != wrong:
                    note(error.message)
                wrong = error.message
                continue
            if rate != last:
                session.limit(rate)
                note("the limit is off" if rate is None else f"the limit is {format_rate(rate / 8)} now")
                last = rate

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, rate)
        yield
        nursery.cancel_scope.cancel()
