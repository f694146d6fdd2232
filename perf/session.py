"""The processes of one measured run: started, watched and ended together, with what they cost.

All of them, daemons and orphans too, are descendants of this process, which asks the kernel for orphans.
Their CPU time is that of the reaped (rusage) plus that of the living (/proc): no daemon escapes the account.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.network import Network

__all__ = ["Cost", "RunFailedError", "Session"]

SAMPLE_S = 0.03
LISTEN_LIMIT_S = 15.0
PR_SET_CHILD_SUBREAPER = 36
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGESIZE")


class RunFailedError(Exception):
    """A program of the run failed, hung or never listened; the message holds the end of what it said."""


@dataclass
class Cost:
    """What a stretch of a run took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    wire_bytes: int = 0
    peak_rss_bytes: int = 0


class _Family:
    """The processes below this one. A process is looked at once: whose child it is does not change for us."""

    def __init__(self) -> None:
        self._ours: dict[int, bool] = {os.getpid(): True}
        self._lock = threading.Lock()

    def members(self) -> list[int]:
        """Process ids of all descendants, zombies included."""
        with self._lock:
            present = {int(name) for name in os.listdir("/proc") if name.isdigit()}
            self._ours = {pid: ours for pid, ours in self._ours.items() if pid in present}
            fresh = {pid: int(fields[1]) for pid in present - self._ours.keys() if (fields := _stat(pid))}
            for pid in fresh:
                self._ours[pid] = self._leads_here(pid, fresh)
            return [pid for pid, ours in self._ours.items() if ours and pid != os.getpid()]

    def _leads_here(self, pid: int, parents: dict[int, int]) -> bool:
        while pid not in self._ours:
            if pid not in parents:
                return False
            pid = parents[pid]
        return self._ours[pid]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


class Session:
    """Runs the programs of a contender at both sides of a network.

    Args:
        network: Where they run.
        scratch: Directory for logs, keys and configuration; emptied by whoever made it.
        limit_s: Bound of every client command.
    """

    def __init__(self, network: Network, scratch: Path, limit_s: float) -> None:
        self.network = network
        self.scratch = scratch
        self.output = ""
        """What the last command wrote to its standard output."""
        self._limit_s = limit_s
        self._family = _Family()
        self._outsiders = set(self._family.members())
        self._started: list[subprocess.Popen[bytes]] = []
        self._ports = random.SystemRandom()
        self._killed = False
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def environment(self, side: str) -> dict[str, str]:
        """What programs at a side see: a home, state and cache of their own, for the length of the run."""
        home = self.scratch / f"home-{side}"
        # Whoever installs a Python program has it compiled; not to keep that would be counted against it.
        left_out = ("FLOW_", "XDG_", "RCLONE_", "SSH_", "PYTHONDONTWRITEBYTECODE")
        env = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        env |= {"HOME": str(home), "LC_ALL": "C.UTF-8", "FLOW_STATE_DIR": str(home / "flow")}
        for kind in ("STATE", "CACHE", "CONFIG"):
            env[f"XDG_{kind}_HOME"] = str(home / kind.lower())
        for path in (home, *(home / kind for kind in ("state", "cache", "config"))):
            path.mkdir(parents=True, exist_ok=True)
        return env

    def port(self) -> int:
        return self._ports.randrange(20000, 30000)

    def start(self, side: str, argv: list[str], name: str = "daemon") -> subprocess.Popen[bytes]:
        """Start a program that stays; its output goes to NAME.out and NAME.err in the scratch directory."""
        with (
            (self.scratch / f"{name}.out").open("wb") as out,
            (self.scratch / f"{name}.err").open("wb") as err,
        ):
            child = subprocess.Popen(
                [*self.network.prefixes[side], *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment(side),
                cwd=self.scratch,
            )
        self._started.append(child)
        return child

    def run(self, side: str, argv: list[str], name: str = "client") -> str:
        """Run a program to its end; gives its standard output.

        Raises:
            RunFailedError: it failed, was killed, or took too long.
        """
        child = self.start(side, argv, name)
        self.finish(child, name)
        self.output = (self.scratch / f"{name}.out").read_text(errors="replace")
        return self.output

    def finish(self, child: subprocess.Popen[bytes], name: str) -> None:
        """Wait for a started program; raises RunFailedError unless it exits with 0."""
        # Popen.wait with a time-out polls at growing intervals, which would round every time up.
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        watchdog = threading.Timer(self._limit_s, end)
        watchdog.start()
        try:
            code = child.wait()
        finally:
            watchdog.cancel()
        if late.is_set():
            raise RunFailedError(f"{name}: no end after {self._limit_s:.0f} s; {self.said(name)}")
        if code != 0:
            raise RunFailedError(f"{name}: exit code {code}; {self.said(name)}")

    def said(self, name: str) -> str:
        """The last lines that a program wrote, for a message."""
        texts = [
            (self.scratch / f"{name}.{end}").read_text(errors="replace").strip() for end in ("out", "err")
        ]
        return (
            " | ".join(line for text in texts for line in text.splitlines()[-3:])[-600:] or "it said nothing"
        )

    def wait_listening(self, child: subprocess.Popen[bytes], port: int, name: str = "daemon") -> None:
        """Wait until the namespace of a started program has a listener on a port."""
        wanted = f":{port:04X}"

        def listening() -> bool:
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{child.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[1].endswith(wanted) and fields[3] == "0A":
                        return True
            return False

        self.wait_until(listening, child, name, f"listen on port {port}")

    def wait_until(
        self, condition: Callable[[], bool], child: subprocess.Popen[bytes], name: str, what: str
    ) -> None:
        """Wait for a condition that a started program brings about; RunFailedError when it does not."""
        deadline = time.monotonic() + LISTEN_LIMIT_S
        while child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if condition():
                    return
            time.sleep(0.01)
        raise RunFailedError(f"{name} did not {what}; {self.said(name)}")

    def _members(self) -> list[int]:
        return [pid for pid in self._family.members() if pid not in self._outsiders]

    def _cpu_s(self) -> float:
        """CPU time of all processes of the run so far, the living and the reaped."""
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = reaped.ru_utime + reaped.ru_stime
        for pid in self._members():
            if fields := _stat(pid):
                total += sum(map(int, fields[11:15])) / TICKS_PER_S
        return total

    def _rss_bytes(self) -> int:
        return sum(int(fields[21]) for pid in self._members() if (fields := _stat(pid))) * PAGE

    @contextlib.contextmanager
    def metered(self, watch: Callable[[], None] | None = None) -> Iterator[Cost]:
        """Measure the with block; the cost is complete when it ends, also by an exception.

        Args:
            watch: Called at every sample; may kill the run.
        """
        cost = Cost()
        ended = threading.Event()

        def sample() -> None:
            while True:
                cost.peak_rss_bytes = max(cost.peak_rss_bytes, self._rss_bytes())
                if watch is not None:
                    watch()
                if ended.wait(SAMPLE_S):
                    return

        sampler = threading.Thread(target=sample, name="sampler", daemon=True)
        wire, cpu, begin = self.network.wire_bytes(), self._cpu_s(), time.monotonic()
        sampler.start()
        try:
            yield cost
        finally:
            cost.wall_s = time.monotonic() - begin
            ended.set()
            sampler.join()
            cost.cpu_s = self._cpu_s() - cpu
            cost.wire_bytes = self.network.wire_bytes() - wire

    def kill(self) -> None:
        """End every process of the run at once, as a crash of both machines would."""
        self._killed = True
        for pid in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def killed(self) -> bool:
        return self._killed

    def close(self) -> None:
        """End what still runs, politely first, and reap it all."""
        for child in self._started:
            if child.poll() is None:
                child.terminate()
        for child in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(3)
        self.kill()
        for child in self._started:
            child.wait()
        deadline = time.monotonic() + 5
        while (left := self._members()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ChildProcessError, ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.005)
        self._started.clear()
        self._killed = False
