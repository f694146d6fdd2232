"""One transfer, to await: how it stands, what has landed, why it waits, and how it is steered."""

from __future__ import annotations

import uuid
from typing import Final, Literal

import anyio

from flowengine.api.transfers import ENDED, DeliveryReceipt, LandedObject, Transfer, TransferState, Why
from flowengine.client.batches import Batches
from flowengine.client.transport import Transport
from flowengine.errors import Denied, FlowError, IntegrityError, TemporaryError

__all__ = ["AsyncTransfer", "failure_of"]

LONG_POLL_S: Final = 20.0
"""How long one question waits for news at the coordinator."""
EARLY_PAUSE_S: Final = 0.05
LATE_PAUSE_S: Final = 1.0


def failure_of(record: Transfer) -> FlowError | None:
    """Why a transfer that has ended is not complete; None for one that is."""
    if record.state == "completed":
        return None
    hint = next((task.hint for task in record.tasks if task.hint), "")
    kind = {"denied": Denied, "integrity": IntegrityError}.get(record.reason, FlowError)
    return kind(
        f"transfer {record.id} is {record.state}: {record.message or record.reason}",
        hint=hint or f"flow transfer show {record.id} has the details",
        reason=record.reason,
        transfer=record.id,
        state=record.state,
    )


class AsyncTransfer:
    """One transfer: watch it, use what has landed, steer it. Forgetting it leaves the transfer running.

    Attributes:
        record: the transfer as it was last seen.
    """

    def __init__(self, transport: Transport, record: Transfer) -> None:
        self._transport = transport
        self.record = record

    def __repr__(self) -> str:
        return f"<transfer {self.id}: {self.state}>"

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def state(self) -> TransferState:
        """The state as last seen."""
        return self.record.state

    @property
    def ended(self) -> bool:
        """Whether it had ended when it was last seen."""
        return self.record.state in ENDED

    async def refresh(self, wait_s: float = 0.0) -> Transfer:
        """The transfer as it is now; with `wait_s`, as soon as it has ended, at latest after so long."""
        params = {"wait_s": wait_s} if wait_s else None
        self.record = await self._transport.request(
            "GET", f"/v1/transfers/{self.id}", Transfer, params=params, timeout_s=wait_s + 30
        )
        return self.record

    async def wait(self, timeout_s: float | None = None) -> Transfer:
        """The transfer once it is complete: every object verified and durable at every target.

        Cancelling the wait leaves the transfer running.

        Raises:
            FlowError: it ended otherwise; its reason says how.
            TemporaryError: it still runs after `timeout_s` (reason "timeout").
        """
        with anyio.move_on_after(timeout_s):
            async for _ in self.updates(LONG_POLL_S):
                pass
        if not self.ended:
            raise TemporaryError(
                f"transfer {self.id} has not ended within {timeout_s:g} s; it goes on",
                hint="wait again, or ask why()",
                reason="timeout",
            )
        if (failure := failure_of(self.record)) is not None:
            raise failure
        return self.record

    def updates(self, every_s: float = 1.0) -> Batches[Transfer]:
        """The transfer about every `every_s` seconds, and at once when it ended: that is the last one."""
        last = False
        pause_s = EARLY_PAUSE_S

        async def fetch() -> list[Transfer] | None:
            nonlocal last, pause_s
            if last:
                return None
            began = anyio.current_time()
            record = await self.refresh(wait_s=every_s)
            last = record.state in ENDED
            early = anyio.current_time() - began < every_s / 2
            if early and not last:  # the coordinator is stopping, or does not wait
                await anyio.sleep(min(pause_s, every_s))
                pause_s = min(2 * pause_s, LATE_PAUSE_S)
            return [record]

        return Batches(fetch)

    def landed(self, after: int = 0) -> Batches[LandedObject]:
        """Each object as it becomes durable at a target, until the transfer has ended.

        What was there before and did not change counts as landed by an earlier transfer and is not named.

        Args:
            after: begin behind the object with this `seq`, to go on where an earlier loop stopped.

        Raises (while iterating, after the last object):
            FlowError: the transfer did not complete; what was named has landed nevertheless.
        """
        cursor = after

        async def fetch() -> list[LandedObject] | None:
            nonlocal cursor
            pause_s = EARLY_PAUSE_S
            while True:
                began = anyio.current_time()
                ended = self.ended  # known before asking: then nothing can land after this page
                items, _ = await self._transport.page(
                    f"/v1/transfers/{self.id}/landed",
                    LandedObject,
                    {"after": cursor, "wait_s": 0 if ended else LONG_POLL_S},
                    timeout_s=LONG_POLL_S + 30,
                )
                if items:
                    cursor = items[-1].seq
                    return items
                if ended:
                    if (failure := failure_of(self.record)) is not None:
                        raise failure
                    return None
                await self.refresh()
                if not self.ended and anyio.current_time() - began < LONG_POLL_S / 2:
                    await anyio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LATE_PAUSE_S)

        return Batches(fetch)

    async def why(self) -> Why:
        """One line on what it waits for, or what makes it no faster."""
        return await self._transport.request("GET", f"/v1/transfers/{self.id}/why", Why)

    async def receipts(self) -> list[DeliveryReceipt]:
        """What the targets signed for so far: one receipt for each at which everything landed."""
        return await self._transport.all_of(f"/v1/transfers/{self.id}/receipts", DeliveryReceipt)

    async def cancel(self) -> Transfer:
        """End it. What has landed stays."""
        return await self._steer("cancel")

    async def pause(self) -> Transfer:
        """Stop moving until `resume`; nothing that was done is lost."""
        return await self._steer("pause")

    async def resume(self) -> Transfer:
        """Go on after `pause`."""
        return await self._steer("resume")

    async def retry(self) -> Transfer:
        """Try again what ended incomplete: only what is missing moves."""
        return await self._steer("retry")

    async def _steer(self, verb: Literal["pause", "resume", "cancel", "retry"]) -> Transfer:
        self.record = await self._transport.request(
            "POST", f"/v1/transfers/{self.id}/{verb}", Transfer, key=uuid.uuid4().hex
        )
        return self.record
