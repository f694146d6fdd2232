"""The agent's evidence: one chain of records, durable before anybody acts on them, with checkpoints handed out.

Callers that record at the same time share one write and one sync. A record that cannot be made durable is an error for
its caller, and whoever was about to permit something must not.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from flowengine.errors import AuthenticationError, FlowError, IntegrityError
from flowengine.evidence.bodies import checkpoint_body
from flowengine.evidence.chain import Head, Record
from flowengine.evidence.checkpoint import Checkpoint, verify_checkpoint
from flowengine.evidence.heads import contradiction
from flowengine.store.chain_files import ChainFiles, Signer

__all__ = ["CHECKPOINT_EVERY_S", "CHECKPOINT_RECORDS", "EvidenceLog"]

CHECKPOINT_EVERY_S: Final = 60.0
CHECKPOINT_RECORDS: Final = 1000
_MOST_SHOWN: Final = 1000
"""Heads of peers that wait to be handed on."""


@dataclass(eq=False)
class _Entry:
    """What one caller records: in the chain together, or not at all."""

    bodies: tuple[tuple[str, Mapping[str, object]], ...]
    records: Sequence[Record] = ()
    error: Exception | None = None


class EvidenceLog:
    """Appends to the chain in a folder, for any number of tasks of one trio loop.

    Args:
        folder: `STATE/evidence`.
        site: name of the site.
        signer: gives key and certificate to sign checkpoints with, as they are now.

    Raises:
        LocalError: another process has it open.
        IntegrityError: the chain is damaged (reason "evidence").
    """

    def __init__(
        self,
        folder: str,
        site: str,
        signer: Callable[[], Signer],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._files = ChainFiles(folder, f"site:{site}", now=now)
        self._signer = signer
        self._lock = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)
        self._waiting: list[_Entry] = []
        self._due = trio.Event()
        self._peers: dict[str, Checkpoint] = {}
        self._shown: deque[bytes] = deque(maxlen=_MOST_SHOWN)

    @property
    def head(self) -> Head:
        """Where the chain ends: what the records of others can name."""
        return self._files.head

    @property
    def bundle(self) -> str:
        """Digest of the bundle that was last recorded as activated; empty where that is long ago."""
        return self._files.bundle

    @property
    def cut_bytes(self) -> int:
        """What was cut off at opening of a record that a crash had torn."""
        return self._files.cut_bytes

    @property
    def last_checkpoint(self) -> bytes:
        """The newest checkpoint; empty before the first."""
        return self._files.checkpoint_document

    async def record(self, kind: str, body: Mapping[str, object]) -> Record:
        """Record something; on the disk when this returns. Cancelled before it is written, it leaves nothing.

        Args:
            kind: as `flowengine.evidence.bodies` has functions for.
            body: what such a function made.

        Raises:
            Denied: it cannot be made durable (reason "no-evidence").
            ValueError: the body is not what its kind needs.
        """
        return (await self.record_all([(kind, body)]))[0]

    async def record_all(self, bodies: Sequence[tuple[str, Mapping[str, object]]]) -> Sequence[Record]:
        """Record several things behind each other, with nothing of other callers between: all of them or none.

        Args, Raises:
            as of `record`.
        """
        entry = _Entry(tuple(bodies))
        self._waiting.append(entry)
        try:
            async with self._lock:
                if entry in self._waiting:
                    with trio.CancelScope(shield=True):
                        await self._commit()
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.error is not None:
            raise entry.error
        return entry.records

    async def _commit(self) -> None:
        batch, self._waiting = self._waiting, []
        await trio.to_thread.run_sync(self._write, batch, limiter=self._limiter)
        if self._files.unsigned >= CHECKPOINT_RECORDS:
            self._due.set()

    def _write(self, batch: list[_Entry]) -> None:
        try:
            records = iter(self._files.append([body for entry in batch for body in entry.bodies]))
        except ValueError:  # one of them is wrong: the others must not suffer
            for entry in batch:
                try:
                    entry.records = self._files.append(entry.bodies)
                except (ValueError, FlowError) as error:
                    entry.error = error
        except FlowError as error:
            for entry in batch:
                entry.error = error
        else:
            for entry in batch:
                entry.records = [next(records) for _ in entry.bodies]

    async def checkpoint(self) -> bytes:
        """A signed checkpoint of all that is recorded so far.

        Raises:
            Denied: it cannot be recorded.
        """
        document = b""
        async with self._lock:
            with trio.CancelScope(shield=True):
                document = await trio.to_thread.run_sync(
                    self._files.checkpoint, self._signer(), limiter=self._limiter
                )
        self._due.set()  # it is handed out at once
        return document

    async def keep_bundle(self, content: bytes) -> str:
        """Keep a policy bundle beside the records that name it; returns its digest.

        Raises:
            IntegrityError: it is no bundle.
        """
        return await trio.to_thread.run_sync(self._files.keep_bundle, content, limiter=self._limiter)

    async def note_peer(self, document: bytes, anchors_pem: str, *, site: str) -> Checkpoint:
        """Put a peer's signed checkpoint into this chain, so that the peer can drop nothing before it unseen.

        Args:
            site: the peer; a checkpoint of another one is refused.

        Raises:
            AuthenticationError: it is not that site's.
            IntegrityError: it was changed, is not understood, or contradicts one that was shown before; that one is on
                record all the same.
            Denied: it cannot be recorded.
        """
        found, facts = verify_checkpoint(document, anchors_pem)
        if facts.site != site:
            raise AuthenticationError(
                f"site {site} showed a checkpoint of {found.agent[:80]}", reason="evidence"
            )
        await self.record("checkpoint", checkpoint_body(found, base64.b64encode(document).decode("ascii")))
        before = self._peers.get(found.agent)
        if before is None or before.chain != found.chain or before.seq < found.seq:
            self._peers[found.agent] = found
        self._shown.append(document)
        self._due.set()
        if before is not None and (why := contradiction(before, found)):
            raise IntegrityError(
                f"the history of site {site} forks: {why}",
                hint="both heads are in this site's evidence: flow evidence verify names them",
                reason="evidence",
            )
        return found

    async def run(
        self, hand_out: Callable[[bytes], None], failed: Callable[[FlowError], None] = lambda error: None
    ) -> None:
        """Make a checkpoint every minute or every thousand records, and hand out each new one; until cancelled.

        The last one of an earlier life is handed out again: it may not have arrived. So are the heads that peers showed, for
        whoever holds others of theirs to compare.

        Args:
            failed: told why none can be made; it is tried again a minute later.
        """
        handed = b""
        while True:
            if handed != self.last_checkpoint:
                handed = self.last_checkpoint
                hand_out(handed)
            while self._shown:
                hand_out(self._shown.popleft())
            with trio.move_on_after(CHECKPOINT_EVERY_S) as minute:
                await self._due.wait()
            self._due = trio.Event()
            many = self._files.unsigned >= CHECKPOINT_RECORDS
            if many or (minute.cancelled_caught and self._files.unsigned):
                try:
                    await self.checkpoint()
                except FlowError as error:
                    failed(error)

    def close(self) -> None:
        """Sign for what is not signed for yet, where that can be done, and let the folder go."""
        if self._files.unsigned:
            with contextlib.suppress(FlowError):
                self._files.checkpoint(self._signer())
        self._files.close()
