"""What the source says to the target: messages are taken on the loop, and those that offer something are placed.

Goal
    Whatever a source says, and however fast, the loop stays free and what waits is bounded.
Plan
    The loop handles a message at once where it only notes something. What offers goes into a queue, in order, from which
    the placer's thread takes it. While the queue is long the loop receives nothing more, which holds the source back.
Invariants
    - Offers are placed in the order in which they came, each once.
    - The end of the offers is accepted only with the version id that was computed here.
"""

from __future__ import annotations

import queue
from time import perf_counter_ns
from typing import Final

import trio

from flowengine.errors import ProtocolError
from flowengine.store.buffers import PoolClosed
from flowengine.transfer.halting import halt_landing
from flowengine.transfer.landing import Landing
from flowengine.transfer.losing import lose
from flowengine.transfer.placing import Placer
from flowengine.transfer.placing_subtrees import offers_of
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.session import MAX_OPEN_OFFERS, Session
from flowengine.transfer.streams import MAX_STREAMS
from flowengine.wire.messages import (
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Failed,
    Finer,
    Finish,
    Lost,
    ManifestPart,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Progress,
    Subtrees,
    Totals,
    Want,
    WantStreams,
)
from flowengine.wire.records import Run

__all__ = ["Hearing"]

MAX_QUEUED_MESSAGES: Final = 8192
"""Messages that may wait for the placer before no more are received."""
_RUNS_AT_ONCE: Final = 1000
_HALT_GRACE_S: Final = 5.0
"""How long offers may still come that were on their way when the source was told to stop."""


class Hearing:
    """Hears the source of one session.

    Attributes:
        finish: what the source said of the end; None before.
        source_failures: (path, reason, message) of what it cannot give.
        settled: all that was opened has landed or failed. For the loop.
    """

    def __init__(self, session: Session, landing: Landing, recorder: ManifestRecorder) -> None:
        self._session = session
        self._control = session.control
        self._landing = landing
        self._counters = landing.counters
        self._recorder = recorder
        self.finish: Finish | None = None
        self.source_failures: list[tuple[bytes, str, str]] = []
        self.settled = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        landing.settled = lambda: self._token.run_sync_soon(self.settled.set)
        self._inbox: queue.SimpleQueue[Message | EncodedOffer | None] = queue.SimpleQueue()
        self._offers = 0
        self._answers = 0
        self._room = trio.Event()
        self._held = False
        self._halted_at: float | None = None
        session.told_to_halt = self.halt

    # --- the loop -----------------------------------------------------------------------------------------------

    async def take(self, messages: list[Message | EncodedOffer]) -> None:
        """Handle messages, in order; waits while too many are not placed.

        Raises:
            ProtocolError: no source says that, or says it now.
        """
        for message in messages:
            self._handle(message)
        if self._inbox.qsize() > MAX_QUEUED_MESSAGES:
            self._room, self._held = trio.Event(), True
            if self._inbox.qsize() > MAX_QUEUED_MESSAGES // 2:
                await self._room.wait()  # what is not received holds the source back

    def stop(self) -> None:
        """Let `place` return."""
        self._inbox.put(None)

    def _handle(self, message: Message | EncodedOffer) -> None:
        match message:
            case (
                EncodedOffer()
                | Offer()
                | Finer()
                | ObjectBegin()
                | ObjectRun()
                | ObjectEnd()
                | DirectoryBegin()
                | DirectoryEnd()
                | Subtrees()
                | ManifestPart()
                | Finish()
            ):
                if isinstance(message, Finish):
                    self._session.peer_checkpoint = message.checkpoint
                if self._session.halted and isinstance(
                    message, EncodedOffer | Offer | ObjectBegin | Subtrees
                ):
                    self._check_halt()
                if isinstance(message, EncodedOffer | Offer | ObjectRun | Finer | Subtrees):
                    self._offers += offers_of(message) if isinstance(message, Subtrees) else 1
                    if self._offers - self._answers > MAX_OPEN_OFFERS:
                        raise ProtocolError("the source offers without waiting for answers")
                self._inbox.put(message)
            case Totals(objects, size_bytes, final):
                self._counters.objects, self._counters.size_bytes = objects, size_bytes
                self._counters.scan_done = final
            case Failed(path, reason, text):
                self.source_failures.append((path, reason, text))
                self._counters.objects_failed += 1
            case Lost(offer, index, count, reason, text):
                lose(self._landing, offer, index, count, reason, text)
            case Progress():
                if message.halt:
                    self._session.halt(message.halt[:1000])
                self._session.peer_progress = message
                self._session.told_changes(message.changes)
            case WantStreams(count, via) if self._session.streams.dial is not None:
                if not self._session.fixed_streams:
                    self._session.want_streams(min(count, MAX_STREAMS), via)
            case _:
                raise ProtocolError(
                    f"the source sent {type(message).__name__}, which only a target sends",
                    hint="check that both sides run compatible versions",
                )

    def halt(self, why: str) -> None:
        """Let land what has begun to, and nothing else; the source is told what is not wanted any more."""
        if not self._session.options.dry_run:
            self._tell_unwanted(halt_landing(self._landing, why))
        self._session.halt_is_told = True
        self._control.post(Progress(self._counters.as_dict(), "", [], why))

    def _tell_unwanted(self, runs: list[Run]) -> None:
        for first in range(0, len(runs), _RUNS_AT_ONCE):
            self._control.post(
                Progress(self._counters.as_dict(), "", [], "", runs[first : first + _RUNS_AT_ONCE])
            )

    def _check_halt(self) -> None:
        """A source that was told to offer nothing more has a moment to hear it."""
        now = trio.current_time()
        if self._halted_at is None:
            self._halted_at = now
        elif now - self._halted_at > _HALT_GRACE_S:
            raise ProtocolError(
                f"the source goes on to offer after it was told to stop: {self._session.halted}"
            )

    # --- the placer's thread ------------------------------------------------------------------------------------

    def answer(self, want: Want, offers: int) -> None:
        """Say what is wanted of an offer, or of so many that came as one."""
        self._answers += offers
        self._control.post(want)

    def place(self, placer: Placer) -> None:
        """Body of the placer's thread."""
        stage = self._session.clock.stage("place")
        halted = False
        while True:
            message = self._inbox.get()
            if message is None:
                return
            begin = perf_counter_ns()
            if isinstance(message, Finish):
                self._finished(placer, message)
            elif isinstance(message, ManifestPart):
                self._recorder.show(message.data, last=message.last)
            elif not self.settled.is_set():  # a finer cut may still come for what has failed: too late
                if self._landing.halted and not halted:
                    # What was opened while the others were given up, too.
                    halted = True
                    self._tell_unwanted(halt_landing(self._landing, self._landing.halted))
                try:
                    placer.handle(message)
                except PoolClosed:
                    return
            if self._held and self._inbox.qsize() <= MAX_QUEUED_MESSAGES // 2:
                self._held = False
                self._token.run_sync_soon(self._room.set)
            stage.since(begin)

    def _finished(self, placer: Placer, message: Finish) -> None:
        if not placer.root_is_left:
            raise ProtocolError("the source finished before it left the root directory")
        summary = self._recorder.finish()
        if (summary.version_id, summary.objects, summary.size_bytes) != (
            message.version_id,
            message.objects,
            message.size_bytes,
        ):
            raise ProtocolError(
                "what the source says it offered is not what arrived: the version ids differ",
                hint="update both sides to the same version; if that is so, report this as a bug",
            )
        self.finish = message
        self._landing.close_offering()
