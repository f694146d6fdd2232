"""Sessions over streams in memory, for what needs one and no peer."""

from __future__ import annotations

import trio

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.transfer.control import Control
from flowengine.transfer.session import Session
from flowengine.transfer.streams import Streams
from flowengine.wire.control import ControlDecoder
from flowengine.wire.keys import NO_FINGERPRINT, SessionSecrets
from flowengine.wire.messages import Options

__all__ = ["session_over"]


def session_over(stream: trio.abc.HalfCloseableStream) -> Session:
    """The sending side of a session whose control connection is this stream."""
    return Session(
        control=Control(stream, ControlDecoder()),
        streams=Streams(lambda count, via: None),
        secrets=SessionSecrets(
            bytes(32), bytes([1]) * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=bytes([2]) * 32
        ),
        session_id=bytes(16),
        profile=DEFAULT_PROFILE,
        options=Options(),
        sends=True,
    )
