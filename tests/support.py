"""What tests of the engine with real processes share: commands, trees, waiting, counting what is opened."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import inspect
import json
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import forked
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from flowengine.chunking import chunk_id
from flowengine.wire.ticket import Ticket

FLOW = [sys.executable, "-m", "flowengine.cli.main"]
MIB = 1 << 20
GIB = 1 << 30


class _Patience:
    """Counts the seconds of a wait from one look to the next; of those in which the machine stood still, hardly any."""

    _LOOK_AT_MOST_S = 0.5

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds
        self._seen = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        self._left_s -= min(now - self._seen, self._LOOK_AT_MOST_S)
        self._seen = now
        return self._left_s < 0


class AwakeClock:
    """Seconds that this machine was awake: for bounds on how long something takes.

    A thread wakes every few milliseconds. What it comes late by was no time in which others could have worked either.
    """

    _TICK_S, _TICK_AT_MOST_S = 0.01, 0.03

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._awake_s = 0.0
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> AwakeClock:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._TICK_S):
            now = time.monotonic()
            self._awake_s += min(now - before, self._TICK_AT_MOST_S)
            before = now

    def now_s(self) -> float:
        """Seconds awake since it was started."""
        return self._awake_s

    def asleep_s(self) -> float:
        """Seconds since then that the machine was not awake."""
        return time.monotonic() - self._begun - self._awake_s


def wait_until(
    condition: Callable[[], Any], what: str, seconds: float = 90.0, *, every_s: float = 0.005
) -> Any:
    """The first true value of `condition`, which is asked again and again for so many seconds that the machine works."""
    pause, patience = threading.Event(), _Patience(seconds)
    while True:
        value = condition()
        if value:
            return value
        assert not patience.is_over(), f"waited {seconds:.0f} s in vain: {what}"
        pause.wait(every_s)


def assert_rate(look: Callable[[], float], least: float, most: float = float("inf"), looks: int = 4) -> None:
    """What `look` measures is at most `most` each time, and at least `least` in one of some looks.

    Whatever else runs on the machine takes from a rate and never adds to it: so a limit that is broken once is broken,
    while a rate that was reached once can be reached.
    """
    seen: list[float] = []
    while (not seen or seen[-1] < least) and len(seen) < looks:
        try:
            seen.append(look())
        except AssertionError as error:
            raise AssertionError(f"after looks at {seen}: {error}") from error
        assert seen[-1] <= most, seen
    assert seen[-1] >= least, seen


@contextlib.contextmanager
def roomy_folder(otherwise: Path) -> Iterator[Path]:
    """Memory where there is plenty of it: for gigabytes, and where the network is judged and no disk."""
    room = os.statvfs("/dev/shm")
    roomy = room.f_bavail * room.f_frsize > 8 * GIB
    with tempfile.TemporaryDirectory(prefix="flow-test-", dir="/dev/shm" if roomy else otherwise) as folder:
        yield Path(folder)


def wait_until_nobody_writes(target: Path) -> None:
    """Wait until no session holds a staging folder below `target`: a server clears up behind its last word."""

    def nobody() -> bool:
        for folder, below, _ in os.walk(target):  # which leaves out what goes meanwhile
            if ".flow-staging" in below:
                try:
                    with open(os.path.join(folder, ".flow-staging", "lock"), "rb") as lock:
                        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except (FileNotFoundError, BlockingIOError):
                    return False
        return True

    wait_until(nobody, f"the end of every session that writes to {target}")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file and link below a folder where others write meanwhile: what goes is left out, and may be gone by now."""
    for place, folders, names in os.walk(folder):
        for name in names:
            yield Path(place, name)
        yield from (path for name in folders if (path := Path(place, name)).is_symlink())


def stats_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """`files_below` with what stands there, which may go between the look at its name and the look at itself."""
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.lstat()


def written_below(folder: Path, *, staged: bool = False) -> int:
    """Bytes that the disk holds below a folder where others write, or (`staged`) of what has no name of its own yet.

    Not their sizes: a file in staging has its whole size from the start.
    """
    return sum(
        st.st_blocks * 512 for path, st in stats_below(folder) if not staged or ".flow-staging" in path.parts
    )


async def until(
    condition: Callable[[], Any], what: str, seconds: float = 90.0, pause_at_most_s: float = 0.1
) -> Any:
    """`wait_until` for asyncio and trio, where the condition may be something to ask; asked less and less often."""
    patience = _Patience(seconds)
    pause_s = 0.005
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert not patience.is_over(), f"waited {seconds:.0f} s in vain: {what}"
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, pause_at_most_s)


async def is_listening(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


_FIRST_PORT, _LAST_PORT, _WORKERS = 10_240, 32_760, 8
_given_ports: set[int] = set()


def free_port() -> int:
    """A free port of this machine that stays free while its owner is away.

    It lies below those that the kernel gives to outgoing connections, other workers take others, and none is given twice.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = random.SystemRandom().randrange(_FIRST_PORT, _LAST_PORT, _WORKERS) + worker % _WORKERS
        if port in _given_ports:
            continue  # whoever has it may be about to listen there, or away to come back
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_ports.add(port)
            return port


# --- commands ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def data(self) -> dict[str, Any]:
        """What --json printed."""
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.stdout}\n{self.stderr}"


def environment(**more: str) -> dict[str, str]:
    """What processes of a test find as their environment: none of this one's `FLOW_` variables, and compiled modules.

    A process that compiles what it loads takes two seconds where others take half of one. So they are kept: beside the
    modules, or where the environment does not want that, in a folder of this run's.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLOW_")}
    if kept.pop("PYTHONDONTWRITEBYTECODE", ""):
        kept["PYTHONPYCACHEPREFIX"] = _bytecode()
    return kept | more


@functools.cache
def _bytecode() -> str:
    folder = tempfile.TemporaryDirectory(prefix="flow-bytecode-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.chmod(folder.name, 0o755)  # some commands run as an account without rights
    return folder.name


@dataclass
class Flow:
    """The `flow` command with a state directory of its own.

    Attributes:
        state: where its caches live.
        prefix: what stands before the command, such as `ip netns exec NAME`.
        executed: for tests of starting and of memory: never a fork of what has loaded its modules.
    """

    state: Path
    prefix: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    executed: bool = False

    def environment(self) -> dict[str, str]:
        """What the command finds as its environment."""
        return environment(FLOW_STATE_DIR=str(self.state)) | self.env

    def command(self, *args: object) -> list[str | bytes]:
        words: list[str | bytes] = [*self.prefix, *FLOW]
        return words + [arg if isinstance(arg, bytes) else str(arg) for arg in args]

    def __call__(
        self, *args: object, code: int | None = 0, stdin: bytes = b"", timeout: float = 120
    ) -> Result:
        """Run to the end; the exit code must be `code` unless that is None."""
        program = self._forked(*args)
        if program is not None:
            out, err = program.communicate(stdin, timeout)
            result = Result(program.wait(), out.decode(), err.decode())
        else:
            done = subprocess.run(
                self.command(*args), env=self.environment(), input=stdin, capture_output=True, timeout=timeout
            )
            result = Result(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert code is None or result.code == code, str(result)
        assert "Traceback" not in result.stderr, str(result)
        return result

    def _forked(self, *args: object) -> forked.Program | None:
        return None if self.executed else forked.start(self.command(*args), self.environment())

    @contextlib.contextmanager
    def started(self, *args: object, **popen: Any) -> Iterator[Running]:
        """A command that runs meanwhile; killed at the end of the block if it still does."""
        process: forked.Program | subprocess.Popen[bytes] | None = None if popen else self._forked(*args)
        if process is not None:
            process.stdin.close()
        else:
            process = subprocess.Popen(
                self.command(*args),
                env=self.environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **popen,
            )
        running = Running(process)
        try:
            yield running
        finally:
            for pid in children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if process.poll() is None:
                process.kill()
            running.finish()

    @contextlib.contextmanager
    def serving(self, root: object, *options: object, listen: str = "127.0.0.1:0") -> Iterator[Ticket]:
        """`flow serve` of a folder: its ticket."""
        with self.started("serve", root, "--listen", listen, *options) as running:
            line = running.first_line()
            assert line.startswith("flow://"), str(running.finish())
            yield Ticket.parse(line)


class Running:
    """A command that runs: its lines on stderr as they come."""

    def __init__(self, process: forked.Program | subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._first: list[str] = []
        self._out: list[bytes] = []
        self._threads = [
            threading.Thread(target=self._read_errors, daemon=True),
            threading.Thread(target=self._read_output, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.decode(errors="replace"))

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._out.append(line)

    def first_line(self) -> str:
        """The first line of stdout."""
        wait_until(lambda: self._out or self.process.poll() is not None, "a line of stdout")
        return self._out[0].decode().strip() if self._out else ""

    def events(self) -> list[dict[str, Any]]:
        """What --progress json wrote so far."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def wait_progress(self, enough: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """The first progress event that is enough; fails when the command ends without one."""

        def found() -> dict[str, Any] | None:
            ended = self.process.poll() is not None
            for event in self.events():
                if event["event"] == "progress" and enough(event):
                    return event
            assert not ended, "ended before: " + "".join(self.lines)
            return None

        event: dict[str, Any] = wait_until(found, "progress", seconds)
        return event

    def finish(self, timeout: float = 120) -> Result:
        """Wait for the end."""
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return Result(code, b"".join(self._out).decode(), "".join(self.lines))


def children(pid: int) -> list[int]:
    """Process ids of a process's children (proc(5): each thread has its own)."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it may end meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return [child for child in found if not gone(child)]


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def peak_memory(pid: int) -> int:
    """Most resident bytes that a running process has had; 0 when it is gone."""
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file,
    ):
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


# --- trees ------------------------------------------------------------------------------------------------------


def random_file(path: Path, size: int, seed: int = 0) -> Path:
    """A file of bytes that nothing compresses and that depend on the seed alone; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A cipher's stream: what `random` gives takes fifteen times as long.
    key = hashlib.sha256(seed.to_bytes(16, "big", signed=True)).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(bytes(min(size, MIB)))
    with open(path, "wb") as file:
        for at in range(0, size, MIB):
            file.write(stream.update(zeros[: size - at]))
    return path


def small_tree(root: Path, count: int, size: int = 200, per_folder: int = 250, seed: int = 0) -> Path:
    """Many small files with different bytes, so many to a folder."""
    rng = random.Random(seed)
    for number in range(count):
        folder = root / f"d{number // per_folder:04}"
        if number % per_folder == 0:
            folder.mkdir(parents=True)
        (folder / f"f{number}").write_bytes(number.to_bytes(4, "big") + rng.randbytes(size))
    return root


def rich_tree(root: Path) -> Path:
    """A tree with every kind of thing that is moved and the corner cases of each."""
    root.mkdir()
    rng = random.Random(1)
    (root / "empty").write_bytes(b"")
    (root / "one").write_bytes(b"1")
    (root / "text.txt").write_text("many words, again and again\n" * 5000)
    for size in (16384, 16385, 65536, 262144, 262145, MIB - 1, MIB, MIB + 1, 5 * MIB + 7):
        (root / f"size-{size}").write_bytes(rng.randbytes(size))
    (root / "same-as-text.txt").write_bytes((root / "text.txt").read_bytes())
    (root / "zeros").write_bytes(bytes(3 * MIB))
    os.makedirs(root / "empty-folder" / "nested" / "deep")
    deep = root
    for level in range(40):
        deep = deep / f"level-{level}"
        deep.mkdir()
    (deep / "bottom").write_bytes(b"deep")
    odd = os.fsencode(root) + b"/odd"
    os.mkdir(odd)
    for name in (
        b"not-\xff\xfe-utf8",
        "naïve-☃".encode(),
        b"new\nline",
        b" blank ",
        b"-dash",
        b"#hash",
        b"a" * 255,
    ):
        with open(odd + b"/" + name, "wb") as file:
            file.write(b"of " + name)
    (root / "modes").mkdir()
    for mode in (0o400, 0o444, 0o600, 0o640, 0o755, 0o777, 0o1644):
        path = root / "modes" / f"{mode:o}"
        path.write_bytes(b"mode")
        path.chmod(mode)
    links = root / "links"
    links.mkdir()
    (links / "relative").symlink_to("../one")
    (links / "absolute").symlink_to("/etc/hostname")
    (links / "dangling").symlink_to("nowhere/at/all")
    (links / "folder").symlink_to("../empty-folder")
    (links / "loop").symlink_to("loop")
    os.utime(links / "dangling", ns=(1, 1_234_567_890_123_456_789), follow_symlinks=False)
    hard = root / "zz-hard"
    hard.mkdir()
    os.link(root / "one", hard / "one-again")
    os.link(root / f"size-{5 * MIB + 7}", hard / "large-again")
    os.link(root / "empty", hard / "empty-again")
    with open(root / "sparse", "wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(rng.randbytes(300_000))
    with open(root / "hole-only", "wb") as file:
        file.truncate(8 * MIB)
    readonly = root / "readonly-folder"
    readonly.mkdir()
    (readonly / "inside").write_bytes(b"x")
    for path, ns in (("one", 1), ("text.txt", 999_999_999), ("modes/600", 4_102_444_800_123_456_789)):
        os.utime(root / path, ns=(ns, ns))
    os.utime(root / "empty-folder", ns=(5, 86_400_000_000_007))
    readonly.chmod(0o555)
    return root


@dataclass(frozen=True)
class Item:
    """What is compared of one path."""

    kind: str
    mode: int
    mtime_ns: int
    size: int
    content: str
    same_inode: bytes


def snapshot(root: Path | str) -> dict[bytes, Item]:
    """Everything below a folder, the folder itself included."""
    top = os.fsencode(root)
    found: dict[bytes, Item] = {}
    groups: dict[tuple[int, int], bytes] = {}
    pending = [b""]
    while pending:
        relative = pending.pop()
        path = os.path.join(top, relative) if relative else top
        st = os.lstat(path)
        mode = stat.S_IMODE(st.st_mode)
        if stat.S_ISDIR(st.st_mode):
            found[relative] = Item("directory", mode, st.st_mtime_ns, 0, "", b"")
            names = sorted(os.listdir(path), reverse=True)
            pending += [os.path.join(relative, name) if relative else name for name in names]
        elif stat.S_ISLNK(st.st_mode):
            found[relative] = Item("link", 0, st.st_mtime_ns, 0, os.fsdecode(os.readlink(path)), b"")
        else:
            first = groups.setdefault((st.st_dev, st.st_ino), relative) if st.st_nlink > 1 else b""
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[relative] = Item("file", mode, st.st_mtime_ns, st.st_size, digest, first)
    return found


def assert_same(source: Path | str, target: Path | str, *, root_itself: bool = True) -> None:
    """Two trees are equal in names, kinds, content, modes, times, links and hard link groups, once nobody writes."""
    wait_until_nobody_writes(Path(target))
    a, b = snapshot(source), snapshot(target)
    if not root_itself:
        del a[b""], b[b""]
    assert sorted(a) == sorted(b)
    wrong = {path: (a[path], b[path]) for path in a if a[path] != b[path]}
    assert not wrong, f"{len(wrong)} differ, such as {next(iter(wrong.items()))}"


_JOURNAL_HEAD = struct.Struct("<QI")
_JOURNAL_MARK = 0xFFFF_FFFF
_JOURNAL_CHECK_BYTES = 4


def journal_rows(journal: Path) -> list[tuple[int, int, bytes]]:
    """(offset, length, chunk id) of all that a staging journal says was written, as far as it is whole."""
    data = journal.read_bytes()
    at = 4 + struct.unpack_from("<I", data)[0]
    rows: list[tuple[int, int, bytes]] = []
    while at + _JOURNAL_HEAD.size <= len(data):
        offset, count = _JOURNAL_HEAD.unpack_from(data, at)
        at += _JOURNAL_HEAD.size
        chunks = 0 if count == _JOURNAL_MARK else count
        if at + 36 * chunks + _JOURNAL_CHECK_BYTES > len(data):
            break
        for place in range(at, at + 36 * chunks, 36):
            length = int.from_bytes(data[place : place + 4], "little")
            rows.append((offset, length, data[place + 4 : place + 36]))
            offset += length
        at += 36 * chunks + _JOURNAL_CHECK_BYTES
    return rows


def assert_journals_are_true(target: Path) -> int:
    """Whatever was killed: each chunk that a journal below a target names is in its staging file; how many there are."""
    count = 0
    for journal in files_below(target):
        if not journal.match(".flow-staging/l.*.j"):
            continue
        with open(journal.with_suffix(""), "rb") as staged:
            for offset, length, identity in journal_rows(journal):
                staged.seek(offset)
                assert chunk_id(staged.read(length)) == identity, f"{journal}: {offset}"
                count += 1
    return count


def stats_of(root: Path | str) -> dict[bytes, tuple[int, ...]]:
    """Every stat field that a change would show in, per path."""
    top = os.fsencode(root)
    found: dict[bytes, tuple[int, ...]] = {}
    if not os.path.lexists(top):
        return found
    for path, names, files in os.walk(top):
        for name in [b".", *names, *files]:
            st = os.lstat(os.path.join(path, name))
            found[os.path.join(path, name)] = (
                st.st_ino, st.st_mode, st.st_nlink, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_blocks,
            )  # fmt: skip
    return found


# --- what is opened ---------------------------------------------------------------------------------------------

_IN_ACCESS = 0x1
_IN_OPEN = 0x20
_IN_ISDIR = 0x4000_0000
_IN_Q_OVERFLOW = 0x4000
_IN_NONBLOCK = 0o4000


@dataclass
class Touched:
    """Paths of regular files that were opened, and of those that were read from."""

    opened: set[bytes] = field(default_factory=set)
    read: set[bytes] = field(default_factory=set)


@contextlib.contextmanager
def touched_files(*roots: Path) -> Iterator[Touched]:
    """What anybody opens and reads below the roots inside the block, told by inotify; known behind the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(_IN_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    found = Touched()
    folders: dict[int, bytes] = {}
    try:
        for root in roots:
            for path, _, _ in os.walk(os.fsencode(root)):
                watch = libc.inotify_add_watch(fd, path, _IN_OPEN | _IN_ACCESS)
                assert watch >= 0, os.strerror(ctypes.get_errno())
                folders[watch] = path
        yield found
        while True:
            try:
                data = os.read(fd, 1 << 20)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                at += 16 + length
                assert not mask & _IN_Q_OVERFLOW, "more was opened than the kernel's queue holds"
                if name and not mask & _IN_ISDIR:
                    (found.opened if mask & _IN_OPEN else found.read).add(folders[watch] + b"/" + name)
    finally:
        os.close(fd)


# --- network namespaces, root only ------------------------------------------------------------------------------


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


@contextlib.contextmanager
def loopback_namespace() -> Iterator[list[str]]:
    """The command prefix of a network namespace of its own, with nothing but a loopback."""
    name = f"flow-test-{os.getpid()}"
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        _ip("netns", "del", name)


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[list[str], list[str]]]:
    """Prefixes of two namespaces that a cable joins: 10.77.0.1 (first) and 10.77.0.2."""
    names = [f"flow-test-{os.getpid()}-{side}" for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip(
            "-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1]
        )
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]
    finally:
        for name in made:
            _ip("netns", "del", name)


def bytes_on(prefix: list[str], device: str) -> int:
    """Bytes that a device of a namespace has sent so far."""
    text = subprocess.run(
        [*prefix, "cat", "/proc/net/dev"], check=True, capture_output=True, text=True
    ).stdout
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[8])
    raise AssertionError(f"there is no {device}")


@contextlib.contextmanager
def mounted(path: Path, *options: str, kind: str = "tmpfs", device: str = "flow-test") -> Iterator[Path]:
    """A file system mounted at a path, made where missing."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", ",".join(options) or "rw", device, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
