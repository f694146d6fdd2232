"""The project's programs as forks of a process that has loaded their modules: each is there in a moment.

Goal: a test run starts some thousand times `flow`, agents and coordinators, and what each loads is the same and takes
longer than what most of them do. Plan: a server per test process loads it once; asked for a program, it forks, and the
child takes over arguments, environment, folder and the three standard streams, and runs the module as `python -m` does.
Invariants: the child is a process of its own, with nothing of the test's but these; what was asked for in any other way
(another interpreter, a command before it, a library to load first) is executed as it stands.

What this does not notice is a module that fails to load another one by itself, or the order of a set: what one server
forks hashes alike. Hence with `--full` every program is executed, as are every day those that `flow up`, pages of the
documentation and coordinators start.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NoReturn

__all__ = ["Program", "start"]

PROGRAMS = ("flowengine.cli.main", "flowengine_agent.main")
_LENGTH = struct.Struct("<I")
_ANSWER = struct.Struct("<i")
_always_execute = False


def always_execute() -> None:
    """Fork nothing from now on."""
    global _always_execute
    _always_execute = True


class Program:
    """A program that was forked, with what `subprocess.Popen` says of one: bytes on its pipes, or text."""

    def __init__(
        self, words: Sequence[str | bytes], env: Mapping[str, str], text: bool, stderr: IO[Any] | None
    ) -> None:
        self.args = words
        self._reading = threading.Lock()
        self.returncode: int | None = None
        mine, its = [], []
        for index in range(3):
            if index == 2 and stderr is not None:
                its.append(os.dup(stderr.fileno()))
                break
            reading, writing = os.pipe()
            mine.append(reading if index else writing)
            its.append(writing if index else reading)
        mode, encoding = ("", "utf-8") if text else ("b", None)
        self.stdin, self.stdout = (
            os.fdopen(end, f"{way}{mode}", encoding=encoding) for end, way in zip(mine, "wr", strict=False)
        )
        self.stderr = os.fdopen(mine[2], f"r{mode}", encoding=encoding) if stderr is None else stderr
        names = [os.fsdecode(word) for word in words[2:]]
        request = json.dumps([names, dict(env), os.getcwd()]).encode("ascii")
        self._line = _server(_settings(env)).ask(request, its)
        for end in its:
            os.close(end)
        (self.pid,) = _ANSWER.unpack(self._line.recv(_ANSWER.size, socket.MSG_WAITALL))

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when it has ended."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, content: bytes, timeout: float) -> tuple[bytes, bytes]:
        """Give it what it reads, and take what it writes until it has ended; a time that is over ends it."""
        said: list[bytes] = [b"", b""]

        def read(index: int) -> None:
            with (self.stdout, self.stderr)[index] as pipe:
                said[index] = pipe.read()

        def write() -> None:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(content)

        bodies = [write, *(functools.partial(read, index) for index in range(2))]
        threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        until = time.monotonic() + timeout
        try:
            self.wait(timeout)
        finally:
            self.kill()
            self.wait()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():  # what it started holds a pipe
                raise subprocess.TimeoutExpired(list(self.args), timeout)
        return said[0], said[1]

    def _ended(self, timeout: float | None) -> int | None:
        looking = select.poll()
        with contextlib.suppress(ValueError):  # another thread has closed it: it was quicker
            looking.register(self._line, select.POLLIN)
            if looking.poll(None if timeout is None else timeout * 1000):
                with self._reading:
                    if self.returncode is None:
                        self.returncode = _ANSWER.unpack(self._line.recv(_ANSWER.size, socket.MSG_WAITALL))[0]
                        self._line.close()
        return self.returncode


def start(
    words: Sequence[str | bytes],
    env: Mapping[str, str],
    *,
    text: bool = False,
    stderr: IO[Any] | None = None,
) -> Program | None:
    """Fork a program of this project that was to be executed so; nothing where it has to be executed.

    Args:
        text: whether its pipes give text.
        stderr: a file to write to instead of a pipe.
    """
    forks = not _always_execute and len(words) > 2 and words[:2] == [sys.executable, "-m"]
    if not forks or words[2] not in PROGRAMS or any(name.startswith("LD_") for name in env):
        return None
    return Program(words, env, text, stderr)


# --- the server -------------------------------------------------------------------------------------------------


class _Server:
    """The process that forks, as the test's process sees it."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._asking = threading.Lock()
        self._mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            command = [sys.executable, __file__, str(its.fileno())]
            env = {"PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1", **settings}
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            )  # fmt: skip
        atexit.register(self._end)

    def ask(self, request: bytes, streams: list[int]) -> socket.socket:
        """Have a program forked; where its process id, then its exit code, is told."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            rights = array.array("i", [its.fileno(), *streams]).tobytes()
            head = _LENGTH.pack(len(request))
            with self._asking:
                self._mine.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                self._mine.sendall(request)
        return mine

    def _end(self) -> None:
        self._mine.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _settings(env: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """What an interpreter looks at when it starts."""
    return frozenset(
        (name, value) for name, value in env.items() if name.startswith(("PYTHON", "LC_", "LANG"))
    )


@functools.cache
def _server(settings: frozenset[tuple[str, str]]) -> _Server:
    return _Server(dict(settings))


def _load() -> None:
    """All that a program of ours may load, except what a coordinator's planner has for itself."""
    import flowengine
    import flowengine_agent

    for package in (flowengine, flowengine_agent):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            path, _, name = module.name.rpartition(".")
            if module.name not in PROGRAMS and ".coordinator" not in path and not name.startswith("_"):
                importlib.import_module(module.name)
    importlib.import_module("flowengine.coordinator.run")


def _serve(line: socket.socket) -> list[str]:
    """Fork what is asked for until nobody asks any more; in a child gives the arguments of its program."""
    running: dict[int, socket.socket] = {}
    waking, woken = os.pipe()
    for end in (waking, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([line.fileno(), waking], [], [])
        if waking in ready:
            os.read(waking, 4096)
        if line.fileno() in ready:
            head, rights, _, _ = line.recvmsg(_LENGTH.size, socket.CMSG_SPACE(4 * 4))
            if not head:
                os._exit(0)
            numbers = array.array("i", rights[0][2])
            request = line.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in running.values():
                    other.close()
                return _become(request, numbers, [line.detach(), waking, woken])
            for number in numbers[1:]:
                os.close(number)
            running[pid] = socket.socket(fileno=numbers[0])
            running[pid].sendall(_ANSWER.pack(pid))
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                with running.pop(pid) as asking, contextlib.suppress(OSError):
                    asking.sendall(_ANSWER.pack(os.waitstatus_to_exitcode(status)))


def _become(request: bytes, numbers: Sequence[int], theirs: list[int]) -> list[str]:
    """Take over what a process has that is executed."""
    for number, stream in enumerate(numbers[1:]):
        os.dup2(stream, number)
    for number in [*numbers, *theirs]:
        os.close(number)
    words, env, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    return [str(word) for word in words]


def main() -> NoReturn:
    """Serve; a child runs its program and ends as that does."""
    _load()
    gc.collect()
    gc.freeze()
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    import runpy

    importlib.import_module("trio._core._run")._r.seed()  # in which order tasks run
    gc.set_threshold(700, 10, 10)
    sys.argv = words  # the module's name is replaced by its file
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
