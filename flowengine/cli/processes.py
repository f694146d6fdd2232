"""Programs that `flow up` runs: started, waited for until they are ready, stopped in order, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final

from flowengine.errors import FlowError, TemporaryError

__all__ = ["Child", "Children"]

READY: Final = "ready: "
SHOWN_LINES: Final = 8
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Runs in the child: SIGTERM when whoever started it dies, however that happens. Linux only."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """One program. What it says goes to its log file, except the line that begins with `ready: `."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        ended: Callable[[Child], None],
    ) -> None:
        self.name = name
        self.log = log
        self._ended = ended
        self._ready = threading.Event()
        self._ready_text: str | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us alone: we stop the children in order
                preexec_fn=_end_with_parent,  # one system call, no lock
            )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with open(self.log, "ab", buffering=0) as log, self.process.stdout as out:
            for line in out:
                log.write(line)
                text = line.decode(errors="replace").strip()
                if text.startswith(READY) and self._ready_text is None:
                    self._ready_text = text.removeprefix(READY)
                    self._ready.set()
        self.process.wait()
        self._ready.set()
        self._ended(self)

    def wait_ready(self, timeout_s: float) -> str:
        """What stands behind `ready: `.

        Raises:
            FlowError: it ended before, or took too long; with the last lines of its log.
        """
        self._ready.wait(timeout_s)
        if self._ready_text is not None:
            return self._ready_text
        code = self.process.poll()
        if code is None:
            raise TemporaryError(
                f"{self.name} is not ready after {timeout_s:.0f} s", hint=f"its log is {self.log}"
            )
        raise FlowError(
            f"{self.name} ended with exit code {code}:\n{self.last_lines()}", hint=f"its log is {self.log}"
        )

    def last_lines(self) -> str:
        """The end of its log, for people."""
        try:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                return "".join(f"    {line}" for line in deque(file, SHOWN_LINES)).rstrip()
        except OSError:
            return ""

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL where that does not help in time."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)


class Children:
    """Programs that live as long as this block; the last one started is stopped first."""

    def __init__(self, grace_s: float = 10.0) -> None:
        self._children: list[Child] = []
        self._grace_s = grace_s
        # A SimpleQueue may be put to from a signal handler.
        self.news: SimpleQueue[Child | int] = SimpleQueue()

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        """Start a program; that it ended, or that a signal came, is told by `news`."""
        child = Child(name, argv, env, log, self.news.put)
        self._children.append(child)
        return child

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Together first, so that the time of grace is one for all; the oldest, on which others depend, last.
        for child in self._children[1:]:
            if child.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
        for child in reversed(self._children):
            child.stop(self._grace_s)
