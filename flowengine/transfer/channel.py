"""A control connection between two proven peers, before and around a session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

import trio

import flowengine
from flowengine.errors import FlowError, ProtocolError, TemporaryError
from flowengine.store.filesystem import local_error
from flowengine.transfer.control import STALL_S, Control, refusal
from flowengine.wire import messages
from flowengine.wire.control import ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import Software
from flowengine.wire.keys import SessionSecrets
from flowengine.wire.messages import Refuse

if TYPE_CHECKING:
    from flowengine.trust.grant import Party

__all__ = ["HANDSHAKE_S", "Channel", "disconnected", "first_flow_error", "session_errors", "software"]

HANDSHAKE_S: Final = 15.0


def software() -> Software:
    """What this side says about itself in the handshake."""
    return Software("flowengine", flowengine.__version__)


class Channel:
    """An authenticated control connection before a session runs on it.

    Args:
        stream: connected; who is at its other end was proved, or is beyond doubt.
        secrets: key material that only the two ends share.
        rtt_s: round-trip time seen so far.
        decoder: of what comes next, with the beginning of a message perhaps.
        pending: whole messages that came together with the end of the handshake.
        peer: address of the other end; None where it has none.
        route: all sites from the source to the target, where it goes through relays; else empty.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        secrets: SessionSecrets,
        rtt_s: float,
        *,
        decoder: ControlDecoder | None = None,
        pending: Sequence[bytes] = (),
        peer: str | None = None,
        route: tuple[Party, ...] = (),
    ) -> None:
        self.stream = stream
        self.secrets = secrets
        self.rtt_s = rtt_s
        self.peer = peer
        self.route = route
        self._decoder = decoder or ControlDecoder()
        self._pending = list(pending)

    async def send(self, message: messages.Message) -> None:
        """Send one message."""
        await self.send_encoded(messages.encode(message))

    async def send_encoded(self, message: bytes) -> None:
        """Send one message of whichever kind is spoken here."""
        try:
            await self.stream.send_all(frame(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise disconnected() from error

    async def receive(self, stall_s: float = STALL_S) -> messages.Message | None:
        """The next message; None when the peer closed.

        Raises:
            TemporaryError: the connection broke, or nothing arrived for `stall_s` (reason "stalled").
            FlowError: the peer refused, with its reason.
        """
        data = await self.receive_encoded(stall_s)
        if data is None:
            return None
        message = messages.decode(data)
        if isinstance(message, Refuse):
            raise refusal(message)
        return message

    async def receive_encoded(self, stall_s: float, *, max_message: int | None = None) -> bytes | None:
        """The next message as it came; None when the peer closed.

        Args:
            max_message: longest message from here on; as it was, where None.

        Raises:
            TemporaryError: as of `receive`.
        """
        if max_message is not None:
            self._decoder.max_message = max_message
        while not self._pending:
            try:
                with trio.fail_after(stall_s):
                    data = await self.stream.receive_some(65536)
            except trio.TooSlowError:
                raise TemporaryError(
                    f"the peer said nothing for {stall_s:g} s",
                    hint="look at the peer and the network; the same command continues where it stopped",
                    reason="stalled",
                ) from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise disconnected() from error
            if not data:
                return None
            self._pending = self._decoder.feed(data)
        return self._pending.pop(0)

    def bare(self) -> trio.abc.Stream:
        """The connection for something else than messages.

        Raises:
            ProtocolError: more has arrived already than both sides had agreed on.
        """
        if self._pending or self._decoder.buffered_bytes:
            raise ProtocolError("a site on the route sent more than it was asked for")
        return self.stream

    def control(self) -> Control:
        """Go over to the engine's use of the connection."""
        return Control(self.stream, self._decoder, self._pending)

    async def refuse(self, error: FlowError) -> None:
        """Tell the peer why this side will not go on, if it still listens, and close."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
            with contextlib.suppress(FlowError, trio.BusyResourceError, OSError, ValueError):
                await self.send(
                    Refuse(error.reason, error.message[:2000], error.hint[:1000], error.retryable)
                )
        await self.aclose()

    async def aclose(self) -> None:
        """Close without waiting for the peer."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self.stream)


def disconnected() -> TemporaryError:
    """The error for a connection that broke by itself."""
    return TemporaryError(
        "the connection to the peer broke", hint="it is dialled again", reason="disconnected"
    )


@contextlib.asynccontextmanager
async def session_errors(channel: Channel) -> AsyncIterator[None]:
    """Tell the peer of an error that ends the session here, then raise it on."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_flow_error(group)
        if error is None:
            raise
        await channel.refuse(error)
        raise error from group
    except FlowError as error:
        await channel.refuse(error)
        raise


def first_flow_error(error: BaseException) -> FlowError | None:
    """The most telling of our errors in a tree of exception groups: what is not temporary goes first.

    None where something else is among them: a bug must not hide behind a broken connection.
    """
    found: list[FlowError] = []

    def walk(node: BaseException) -> bool:
        if isinstance(node, BaseExceptionGroup):
            verdicts = [walk(child) for child in node.exceptions]  # all are visited, whatever the first says
            return all(verdicts)
        if isinstance(node, FlowError):
            found.append(node)
            return True
        if isinstance(node, OSError):
            found.append(
                local_error(node, "the system refused something at", os.fsencode(node.filename or b"."))
            )
            return True
        return isinstance(node, trio.Cancelled)

    if not walk(error) or not found:
        return None
    found.sort(key=lambda item: (item.retryable, item.reason == "disconnected"))
    return found[0]
