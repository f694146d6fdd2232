"""Run scenarios with contenders, alternating, and write down what each run took."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flowengine.machine import memory_limits
from perf import data
from perf.contenders import CONTENDERS, Contender
from perf.network import Network, NetworkError, opened
from perf.report import print_tables
from perf.scenarios import SCENARIOS, Built, Scenario, put_at_target
from perf.session import Cost, RunFailedError, Session

__all__ = ["RESULTS", "OneRun", "PlaceError", "Plan", "disk_folder", "kept_memory", "memory_folder", "run"]

RESULTS = Path(__file__).with_name("results")
ROOT = RESULTS.parent.parent
Record = dict[str, object]
_INSTRUCTIONS = {"avx2", "avx512f", "vaes", "sha_ni"}
"""What hashing and sealing are quicker with; a model's name may leave open which it is."""
_STEP = 256 << 10
"""What of memory a page is kept of: an eighth of what the host takes at a time."""
_MEMORY_LEFT = 2 << 30
_PROGRAMS_BYTES = 2 << 30
"""What the programs themselves have, at most."""
_FILE_BYTES = 8 << 10
"""What a small file takes above its bytes: the rest of a page, inode, name."""


class PlaceError(Exception):
    """There is no such place for data here; the message says what to do."""


@dataclass(frozen=True)
class Plan:
    """What to measure, as asked for on the command line."""

    scenarios: list[str]
    contenders: list[str]
    networks: list[str]
    size: str = "small"
    repeat: int = 3
    seed: int = 1
    disk: Path | None = None
    limit_s: float = 1800.0
    check: bool = True
    out: Path = RESULTS


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> Record:
    """What the figures depend on and nothing that names the machine."""
    model, flags = "", set[str]()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        flags = set(next((line.split() for line in lines if line.startswith("flags")), []))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model or platform.machine(),
        "instructions": sorted(flags & _INSTRUCTIONS),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The measured commit, with a plus where the tree differs from it; empty outside a repository."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = [*git, "status", "--porcelain", "--", "flowengine", "agents"]
    dirty = subprocess.run(changed, capture_output=True, text=True, check=False).stdout.strip()
    return head.stdout.strip() + ("+" if dirty else "")


def storage_of(path: Path) -> str:
    """The type of the file system that a path lies on."""
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if str(path).startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def allocated_bytes(root: Path) -> int:
    """What the files of a tree take on the disk, staging and hidden files included."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def forget_pages(root: Path) -> None:
    """Write back and drop the cached pages of a tree, so that a disk is read."""
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fdatasync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)


@contextlib.contextmanager
def kept_memory(size_bytes: int) -> Iterator[None]:
    """Have memory stand behind so many bytes of free pages for the length of the with block, whoever runs in it.

    On a virtual machine the host takes freed pages back, a large block at a time, and the first write to such a page waits
    for the host: two to three times the cost of the write, for whichever contender comes after a pause. So pages are
    written once, and most are freed again: a block of which one page is in use is nobody's to take. What is one block here
    lies in several there, hence a page of each eighth.
    """
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next((int(field[1]) << 10 for field in fields if field[0] == "MemAvailable:"), 0)
    size = min([size_bytes, available - _MEMORY_LEFT, *(limit // 2 for limit in memory_limits())]) & -_STEP
    with contextlib.ExitStack() as held:
        if size > 0:
            try:
                _touch(held.enter_context(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
            except OSError as error:
                log(f"memory is not kept: {error}")
        yield


def _touch(pages: mmap.mmap) -> None:
    """Write all pages, and free them again but for one of each step."""
    with contextlib.suppress(OSError):  # a kernel without huge pages; of these no part is given back
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    some = bytes(_STEP)
    for _ in range(0, len(pages), _STEP):
        pages.write(some)
    for start in range(0, len(pages), _STEP):
        pages.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, _STEP - mmap.PAGESIZE)


def free_memory() -> None:
    """Take from the system what it keeps of files that were read, where that is permitted.

    With little memory free the kernel looks for some while a contender runs, on a processor that the contender needs: on
    two cores the same transfer took up to half as long again.
    """
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


class OneRun:
    """One contender in one scenario, once."""

    def __init__(self, kind: type[Contender], scenario: Scenario, built: Built, plan: Plan) -> None:
        self._kind = kind
        self._scenario = scenario
        self._built = built
        self._plan = plan

    def measure(self, network: Network, scratch: Path) -> Record:
        """What the run took; `ok` is false and `error` says why where it did not end well."""
        target = scratch / "target"
        put_at_target(self._built, target)
        session = Session(network, scratch, self._plan.limit_s)
        record: Record = {"ok": False, "error": ""}
        try:
            contender = self._kind()
            contender.serve(session, target)
            for tree in self._built.before:
                contender.transfer(session, tree, target)
            if self._plan.disk:
                for tree in (*self._built.measured, target):
                    forget_pages(tree)
            if self._scenario.kill_at_half:
                record["before_kill"] = asdict(self._until_killed(session, contender, target))
                contender = self._kind()
                contender.serve(session, target)
            with session.metered() as cost:
                reports = [contender.transfer(session, tree, target) for tree in self._built.measured]
            begin = time.monotonic()
            subprocess.run(["sync", "-f", str(target)], check=False)
            record |= {**asdict(cost), "sync_s": time.monotonic() - begin, "reports": reports}
            compared = self._plan.check and not self._kind.reference
            record["error"] = data.same_tree(self._built.measured[-1], target) if compared else ""
            record["ok"] = not record["error"]
        except RunFailedError as error:
            record["error"] = str(error)
        finally:
            session.close()
        return record

    def _until_killed(self, session: Session, contender: Contender, target: Path) -> Cost:
        """Let the transfer run until half of the bytes have passed, then end all its processes at once."""
        half = sum(data.total_size(tree)[0] for tree in self._built.measured) // 2

        def passed() -> int:
            return allocated_bytes(session.scratch) if self._kind.local_only else session.network.wire_bytes()

        start = passed()

        def watch() -> None:
            if not session.killed and passed() - start >= half:
                session.kill()

        with session.metered(watch) as cost:
            try:
                contender.transfer(session, self._built.measured[0], target)
            except RunFailedError:
                if not session.killed:
                    raise
        if not session.killed:
            raise RunFailedError("the transfer ended before it could be killed at half; take a larger size")
        session.close()
        return cost


def memory_folder() -> Path:
    """Where files lie in memory; the usual temporary directory on a machine without."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


def disk_folder() -> Path:
    """A directory on a file system that is not in memory.

    Raises:
        PlaceError: there is none at the usual places.
    """
    for name in ("/var/tmp", tempfile.gettempdir(), str(Path.home())):
        if os.access(name, os.W_OK) and storage_of(Path(name) / "x") not in ("tmpfs", "ramfs"):
            return Path(name)
    raise PlaceError("no usual place for temporary files lies on a disk; name one with --disk DIR")


@contextlib.contextmanager
def work_directory(plan: Plan) -> Iterator[Path]:
    """A directory for data and targets: in memory, or on the disk that was asked for; removed at the end."""
    work = Path(tempfile.mkdtemp(prefix="flow-perf-", dir=plan.disk or memory_folder()))
    work.chmod(0o755)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def present(names: list[str]) -> tuple[list[type[Contender]], dict[str, str]]:
    """The contenders that can run here, and why the others cannot, with how to get them."""
    left_out = {name: why for name in names if (why := CONTENDERS[name].missing())}
    for name, why in left_out.items():
        log(f"{name} is left out: {why}")
    return [CONTENDERS[name] for name in names if name not in left_out], left_out


def run(plan: Plan, command: list[str]) -> int:
    """Measure everything that the plan names; 0 when every run ended well."""
    kinds, left_out = present(plan.contenders)
    if not kinds:
        log("no contender can run here")
        return 1
    about: Record = {
        "batch": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "command": ["python", "-m", "perf", *command],
        "left_out": left_out,
        "size": plan.size,
        "seed": plan.seed,
    }
    versions = {kind.name: kind.version() for kind in kinds}
    plan.out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    with work_directory(plan) as work:
        about["storage"] = storage_of(work)
        for name in plan.scenarios:
            scenario = SCENARIOS[name]
            log(f"{name}: {scenario.title} ({plan.size})")
            built = scenario.build(work / "data", plan.size, plan.seed)
            sizes = [data.total_size(tree) for tree in built.measured]
            facts = {
                "logical_bytes": sum(size for size, _ in sizes),
                "files": sum(count for _, count in sizes),
            }
            free_memory()
            # What a run has at a time, beside its source: an old version, a new one, and what both sides keep in the cache.
            room = 3 * (facts["logical_bytes"] + facts["files"] * _FILE_BYTES) + _PROGRAMS_BYTES
            with kept_memory(room):
                for record in _over_networks(plan, kinds, scenario, built, work):
                    entry = {**about, "scenario": name, **facts, **record}
                    entry["version"] = versions[str(record["contender"])]
                    records.append(entry)
                    with (plan.out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(entry) + "\n")
            shutil.rmtree(work / "data")
    print_tables(records)
    return 0 if records and all(record["ok"] for record in records) else 1


def _over_networks(
    plan: Plan, kinds: list[type[Contender]], scenario: Scenario, built: Built, work: Path
) -> Iterator[Record]:
    """All runs of a scenario, network by network; one that cannot be here is named and left out."""
    for name in plan.networks:
        try:
            with opened(name) as network:
                for record in _alternate(plan, kinds, scenario, built, network, work):
                    yield {"network": name, "about": network.about, **record}
        except NetworkError as error:
            log(f"{name} is left out: {error}")


def _alternate(
    plan: Plan, kinds: list[type[Contender]], scenario: Scenario, built: Built, network: Network, work: Path
) -> Iterator[Record]:
    """Run after run, all contenders in turn, each round beginning with another one."""
    for turn in range(plan.repeat):
        start = turn % len(kinds)
        for kind in [*kinds[start:], *kinds[:start]]:
            if kind.local_only and network.name != "loopback":
                continue
            scratch = work / "run"
            scratch.mkdir(mode=0o755)
            try:
                record = OneRun(kind, scenario, built, plan).measure(network, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            for key in ("error", "reports"):
                if key in record:
                    record[key] = json.loads(json.dumps(record[key]).replace(str(work), "WORK"))
            took = f"{record['wall_s']:.2f} s" if record.get("wall_s") else ""
            log(f"  {network.name} {turn + 1}/{plan.repeat} {kind.name}: {took} {record['error']}")
            yield {"contender": kind.name, "turn": turn, **record}
