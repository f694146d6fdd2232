"""What commands print: progress on stderr, data on stdout. The only module that knows how it looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Protocol

from flowengine.units import format_bytes, format_count, format_duration, format_rate, show_path

__all__ = ["PROGRESS_MODES", "Numbers", "Progress", "print_failures", "print_json"]

PROGRESS_MODES: Final = ("auto", "bar", "lines", "json", "none")
LINE_EVERY_S: Final = 30.0
MAX_SHOWN: Final = 50
"""Failures named on stderr; all of them are in --json."""


class Numbers(Protocol):
    """What progress is made of: `transfer.session.Counters`, or what a coordinator reports."""

    objects: int
    size_bytes: int
    scan_done: bool
    objects_done: int
    bytes_done: int
    bytes_read: int
    bytes_sent: int
    bytes_reused: int


class Progress:
    """Shows counters while a transfer runs; a context manager.

    Args:
        mode: "bar" (rich, on a terminal), "lines" (one every 30 s), "json" (NDJSON on stderr), "none", or "auto".
        verb: what is being done, for people.
    """

    def __init__(self, mode: str, verb: str) -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self._mode = mode
        self._verb = verb
        self._started = time.monotonic()
        self._last_line = self._started
        self._samples: list[tuple[float, int]] = [(self._started, 0)]
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._mode == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._verb, total=None, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """Something a person should know now."""
        if self._mode == "json":
            print(_as_json({"event": "note", "message": line}), file=sys.stderr, flush=True)
        elif self._mode != "none":
            if self._bar is not None:
                self._bar.console.print(f"flow: {line}", highlight=False)
            else:
                print(f"flow: {line}", file=sys.stderr, flush=True)

    def update(self, counters: Numbers) -> None:
        """New numbers; called about twice a second."""
        now = time.monotonic()
        done = counters.bytes_done + max(
            0, counters.bytes_read - counters.bytes_done if not counters.bytes_done else 0
        )
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > 5:
            self._samples.pop(0)
        (t0, b0), (t1, b1) = self._samples[0], self._samples[-1]
        rate = max(0.0, (b1 - b0) / (t1 - t0)) if t1 > t0 else 0.0
        left = counters.size_bytes - done
        eta = left / rate if rate > 0 and counters.scan_done else None
        if self._mode == "bar":
            self._bar.update(
                self._task,
                total=counters.size_bytes or None,
                completed=done,
                text=self._text(counters, done, rate, eta),
            )
        elif self._mode == "lines" and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            print(f"flow: {self._verb} {self._text(counters, done, rate, eta)}", file=sys.stderr, flush=True)
        elif self._mode == "json":
            row = {
                "event": "progress",
                "objects": counters.objects,
                "objects_done": counters.objects_done,
                "bytes": counters.size_bytes,
                "bytes_done": counters.bytes_done,
                "bytes_sent": counters.bytes_sent,
                "bytes_reused": counters.bytes_reused,
                "scan_done": counters.scan_done,
                "rate_bytes_per_s": round(rate),
                "eta_s": None if eta is None else round(eta, 1),
                "seconds": round(now - self._started, 3),
            }
            print(_as_json(row), file=sys.stderr, flush=True)

    @staticmethod
    def _text(counters: Numbers, done: int, rate: float, eta: float | None) -> str:
        scanning = "" if counters.scan_done else "+"
        parts = [
            f"{format_bytes(done)} of {format_bytes(counters.size_bytes)}{scanning}",
            f"{counters.objects_done} of {format_count(counters.objects, 'object', scanning)}",
            format_rate(rate),
        ]
        if eta is not None:
            parts.append(f"{format_duration(eta)} left")
        return ", ".join(parts)


def print_json(data: dict[str, Any], write: Callable[[str], object] = sys.stdout.write) -> None:
    """One JSON object on one line of stdout."""
    write(_as_json(data, ensure_ascii=False) + "\n")


def print_failures(failures: list[tuple[bytes, str, str]]) -> None:
    """Name the objects that failed, on stderr."""
    for path, reason, message in failures[:MAX_SHOWN]:
        print(f"flow: {show_path(path)}: {message} ({reason})", file=sys.stderr)
    if len(failures) > MAX_SHOWN:
        print(f"flow: … and {len(failures) - MAX_SHOWN} more; --json names all of them", file=sys.stderr)


def _as_json(data: dict[str, Any], *, ensure_ascii: bool = True) -> str:
    import json  # takes a hundredth of a small copy to load, and most print none

    return json.dumps(data, ensure_ascii=ensure_ascii)
