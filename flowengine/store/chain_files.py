"""A chain of evidence on disk: appended to, synced, cut back to its last whole record after a crash; blocking.

Goal
    What `append` has returned is on the disk, in order, and stays; nothing else is ever believed to be.
Plan
    FOLDER/chain/SEQ.jsonl holds records, a line each, named by the first. Values that records only show the digest
    of go to FOLDER/values.jsonl before them, bundles to FOLDER/bundles/HEX.bundle. One process holds FOLDER/lock.
Invariants
    - Writing begins at the end of what was synced, never behind it: after a failure the file is cut back to there.
    - At most the tail of the last file may be torn; it is cut off, and the next record says so. A whole line that is
      wrong is never cut: the folder is then refused, as an auditor has to see it.
    - A new file is begun only behind a checkpoint of the own chain, so that the last file and the last line of the one
      before it tell all that is needed to go on.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Final

from flowengine.errors import Denied, IntegrityError, LocalError, NotFound
from flowengine.evidence.bodies import check_body, checkpoint_body, recovery_body
from flowengine.evidence.canonical import canonical
from flowengine.evidence.chain import MAX_RECORD_BYTES, Head, Record, begin_chain, next_record, read_record
from flowengine.evidence.checkpoint import read_checkpoint, sign_checkpoint
from flowengine.evidence.private import Kept, conceal
from flowengine.evidence.suites import DEFAULT_SUITE, Suite, find_suite
from flowengine.policy.bundle import open_bundle
from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret

__all__ = ["SEGMENT_BYTES", "ChainFiles"]

SEGMENT_BYTES: Final = 8 << 20
_KEY_BYTES: Final = 32

Signer = tuple[bytes, bytes]
"""Private key (PEM) and certificate (DER) of whoever signs checkpoints."""


class ChainFiles:
    """The chain of one agent, open for appending by this process alone. Not for several threads at once.

    Args:
        folder: made, with mode 0700, where there is none.
        agent: `site:NAME`.

    Raises:
        LocalError: another process has it open, it cannot be read or written, or it is another agent's chain.
        IntegrityError: what is there is damaged; reason "evidence".
    """

    def __init__(
        self,
        folder: str,
        agent: str,
        *,
        now: Callable[[], float] = time.time,
        rng: Callable[[int], bytes] = os.urandom,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.folder = folder
        self.agent = agent
        self.cut_bytes = 0
        """How much of a torn record was cut off at opening."""
        self.checkpoint_document = b""
        """The last checkpoint of this chain."""
        self.bundle = ""
        """Digest of the bundle that the last `policy.activate` names; empty where none is near the end."""
        self._now = now
        self._rng = rng
        self._segment_bytes = segment_bytes
        self._files: list[int] = []
        self._since: list[str] = []
        self._fd = -1
        self._size = 0
        self._lock(folder, agent)
        try:
            self._key = self._own_key()
            self._values = _open_append(os.path.join(folder, "values.jsonl"))
            self._files.append(self._values)
            self._values_size = _cut_partial_line(self._values)
            self._open_chain()
        except BaseException:
            self.close()
            raise

    def _lock(self, folder: str, agent: str) -> None:
        make_secret_folder(folder)
        for name in ("chain", "bundles"):
            make_secret_folder(os.path.join(folder, name))
        fd = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._files.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise LocalError(
                f"another process writes the evidence of {agent} in {folder}",
                hint="one agent runs per state folder; stop the other one",
            ) from None

    def _own_key(self) -> bytes:
        path = os.path.join(self.folder, "digest.key")
        with contextlib.suppress(NotFound):
            return read_secret(path)
        key = self._rng(_KEY_BYTES)
        write_secret(path, key, replace=False)
        return key

    # --- opening ------------------------------------------------------------------------------------------------

    def _open_chain(self) -> None:
        names = sorted(name for name in os.listdir(self._chain_folder) if name.endswith(".jsonl"))
        if not names:
            self._begin()
            return
        suite, chain = self._first_of(names[0])
        head: Head | None = None
        if len(names) > 1:
            records, tail = self._read(names[-2], suite, chain, None)
            if tail or not records:
                raise self._damaged(f"{names[-2]} does not end with a record")
            head = records[-1][1]
            self._note(records[-1][0])
        self._fd = _open_append(os.path.join(self._chain_folder, names[-1]))
        records, tail = self._read(names[-1], suite, chain, head)
        for record, _ in records:
            self._note(record)
        self._size = os.fstat(self._fd).st_size - len(tail)
        if records:
            head = records[-1][1]
        if head is None:  # the agent died while it wrote its very first record
            os.unlink(os.path.join(self._chain_folder, names[-1]))
            os.close(self._fd)
            self._fd = -1
            self._begin()
            return
        if head.agent != self.agent:
            raise LocalError(
                f"the evidence in {self.folder} is of {head.agent}, not {self.agent}",
                hint="give each site its own state folder",
            )
        self.head = head
        if tail:
            self.cut_bytes = len(tail)
            os.ftruncate(self._fd, self._size)
            self.append([("recovery", recovery_body(len(tail), "sha256:" + sha256(tail).hexdigest()))])

    def _first_of(self, name: str) -> tuple[Suite, str]:
        """The suite of the chain and its id, by its first record; the id is empty where that was never written."""
        with open(os.path.join(self._chain_folder, name), "rb") as file:
            line = file.readline()
        suite = find_suite(DEFAULT_SUITE)
        if not line.endswith(b"\n"):
            return suite, ""
        try:
            record = read_record(line[:-1], suite)
        except IntegrityError as error:
            raise self._damaged(f"{name}: {error.message}") from None
        if name != _segment_name(1) or record.kind != "chain":
            raise self._damaged(f"{name} does not begin a chain")
        return find_suite(record.get("suite")), record.hash

    def _read(
        self, name: str, suite: Suite, chain: str, before: Head | None
    ) -> tuple[list[tuple[Record, Head]], bytes]:
        """The records of a file with the heads they make, and the bytes of a torn tail."""
        with open(os.path.join(self._chain_folder, name), "rb") as file:
            data = file.read()
        found: list[tuple[Record, Head]] = []
        at = 0
        while at < len(data):
            end = data.find(b"\n", at)
            line = data[at:end] if end >= 0 else data[at:]
            try:
                if end < 0:
                    raise IntegrityError("the last line has no end")
                record = read_record(line, suite)
            except IntegrityError as error:
                tail = data[at:]
                # What a crash leaves: a line without its end, or blocks that were never written.
                if end < 0 or not tail.strip(b"\0\n"):
                    return found, tail
                raise self._damaged(f"{name}, after {len(found)} records: {error.message}") from None
            previous = found[-1][1] if found else before
            if previous is not None and (record.seq, record.prev) != (previous.seq + 1, previous.hash):
                raise self._damaged(f"{name}: record {record.seq} does not follow the one before it")
            found.append((record, Head(record.agent, chain, suite, record.seq, record.hash)))
            at = end + 1
        return found, b""

    def _note(self, record: Record) -> None:
        """Keep what the next checkpoint will be over."""
        self._since.append(record.hash)
        if record.kind == "policy.activate":
            self.bundle = str(record.get("bundle"))
        if record.kind != "checkpoint":
            return
        document = base64.b64decode(str(record.get("document")))
        found, _ = read_checkpoint(document)
        if found.agent == self.agent:
            self.checkpoint_document = document
            del self._since[: -(record.seq - found.seq)]

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"the chain of evidence in {self.folder} is damaged: {why}",
            hint="flow evidence verify FOLDER tells more; move the folder away for the auditor, and a new chain begins",
            reason="evidence",
        )

    @property
    def _chain_folder(self) -> str:
        return os.path.join(self.folder, "chain")

    def _begin(self) -> None:
        record, head = begin_chain(self.agent, self._rng(16), self._now())
        self._open_segment(1)
        self._write(record.line + b"\n")
        self.head = head
        self._since = [record.hash]

    def _open_segment(self, first: int) -> None:
        path = os.path.join(self._chain_folder, _segment_name(first))
        fd = _open_append(path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, 0
        folder = os.open(self._chain_folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    # --- writing ------------------------------------------------------------------------------------------------

    @property
    def unsigned(self) -> int:
        """Records that no checkpoint covers yet; the record of the last checkpoint itself does not count."""
        return len(self._since) - (1 if self.checkpoint_document else 0)

    def append(self, bodies: Sequence[tuple[str, Mapping[str, object]]]) -> list[Record]:
        """Add records; when this returns they are on the disk.

        Args:
            bodies: kind and body of each.

        Raises:
            ValueError: a body is not what its kind needs; nothing was written.
            Denied: they cannot be made durable (reason "no-evidence"); none of them is in the chain.
        """
        head = self.head
        records: list[Record] = []
        values: list[Kept] = []
        for kind, body in bodies:
            check_body(kind, body)
            concealed, kept = conceal(body, head.suite, self._key, self._rng)
            record, head = next_record(head, kind, concealed, self._now())
            records.append(record)
            values += kept
        try:
            if values:
                lines = b"".join(canonical(value.as_dict()) + b"\n" for value in values)
                self._values_size = _write_at(self._values, lines, self._values_size)
            self._write(b"".join(record.line + b"\n" for record in records))
        except OSError as error:
            raise Denied(
                f"the evidence cannot be written to {self.folder}: {error.strerror}",
                hint="what cannot be recorded is not permitted: make room on that disk, then try again",
                reason="no-evidence",
            ) from None
        self.head = head
        for record in records:
            self._note(record)
        return records

    def _write(self, data: bytes) -> None:
        self._size = _write_at(self._fd, data, self._size)

    def checkpoint(self, signer: Signer) -> bytes:
        """A signed checkpoint of all that is recorded; the last one where nothing came since.

        Raises:
            Denied: it cannot be recorded.
        """
        if self.unsigned == 0 and self.checkpoint_document:
            return self.checkpoint_document
        document = sign_checkpoint(self.head, self._since, self._now(), *signer)
        found, _ = read_checkpoint(document)
        self.append([("checkpoint", checkpoint_body(found, base64.b64encode(document).decode("ascii")))])
        if self._size > self._segment_bytes:
            with contextlib.suppress(OSError):  # the old file goes on where no new one can be made
                self._open_segment(self.head.seq + 1)
        return document

    def keep_bundle(self, content: bytes) -> str:
        """Keep a policy bundle for as long as the chain speaks of it; returns its digest.

        Raises:
            IntegrityError: it is no bundle.
            LocalError: it cannot be written.
        """
        digest = open_bundle(content).digest
        path = os.path.join(self.folder, "bundles", digest.partition(":")[2] + ".bundle")
        if not os.path.exists(path):
            write_secret(path, content)
        return digest

    def close(self) -> None:
        """Let the folder go; nothing is lost by not calling it."""
        for fd in (*self._files, *([self._fd] if self._fd >= 0 else [])):
            os.close(fd)
        self._files, self._fd = [], -1


def _segment_name(first: int) -> str:
    return f"{first:012d}.jsonl"


def _open_append(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _write_at(fd: int, data: bytes, at: int) -> int:
    """Write behind what is there for sure, durably; returns the new end. After a failure the file ends at `at` again."""
    try:
        if os.fstat(fd).st_size != at:
            os.ftruncate(fd, at)
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
        os.fdatasync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, at)
        raise
    return at + len(data)


def _cut_partial_line(fd: int) -> int:
    """The size of a file of lines without a torn last one."""
    size = os.fstat(fd).st_size
    start = max(0, size - 2 * MAX_RECORD_BYTES)
    whole = start + os.pread(fd, size - start, start).rfind(b"\n") + 1
    if whole != size:
        os.ftruncate(fd, whole)
    return whole
