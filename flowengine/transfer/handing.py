"""A session that another process of this host carries: this one keeps its connections and decides, that one moves.

Goal
    Whoever moves the data has the rights of the account that it is moved for, and neither a key of this site nor a word
    in what is decided.
Plan
    The *keeper* has the session as it was agreed on, control connection in TLS and all. It hands keys, data connections
    and one end of a socket pair over to the *hands*, which run the engine on them, and splices the pair with the
    control connection. What the engine asks and tells here (how far it is, what is durable, may this go out, dial
    another one) are messages on a line between the two; to stop it, the keeper cuts. The messages stand here, each side
    in a module of its own: `keeper`, `hands`.
Invariants
    - The keeper's copies of the data connections live as long as the session: what it cuts is cut, whatever the hands do.
    - An object is reported to the peer only after the keeper has taken note of it.
    - While a limit holds, each portion is counted by the keeper before it goes out.
    - The hands read what a peer sends: what they say is judged like a peer's word, and at the worst ends their session.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any, Final, Protocol, TypeAlias

import msgspec

import flowengine.errors as all_errors
from flowengine.errors import FlowError, ProtocolError
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.pacing import Pacer
from flowengine.transfer.session import Session
from flowengine.transfer.streams import MAX_STREAMS
from flowengine.trust.grant import Party
from flowengine.wire.messages import Options

__all__ = [
    "READS",
    "WRITES",
    "Answered",
    "Broke",
    "Came",
    "Dial",
    "Durable",
    "Ended",
    "Gone",
    "Halt",
    "Handed",
    "Landed",
    "Leave",
    "Named",
    "Pace",
    "Post",
    "Status",
    "Take",
    "ToHands",
    "ToKeeper",
    "encode",
    "error_of",
    "odd",
    "pacer_for",
    "to_hands",
    "told_error",
    "understood",
]


class Landed(Protocol):
    """Takes note of objects that are durable; of what is wrong with them as well, where that is said."""

    def __call__(self, rows: list[tuple[bytes, int]], wrong: str = "") -> None: ...


READS: Final = "<reads>"
WRITES: Final = "<writes>"
"""In place of a link's site: the storage that is read from or written to."""


class Handed(msgspec.Struct, frozen=True):
    """A session as it is handed over; fields as of `Session`.

    Attributes:
        dials: whether more data connections are dialled by the keeper, rather than asked of the peer.
    """

    secrets: tuple[bytes, int, int, bytes, bytes]
    session_id: bytes
    profile: str
    options: Options
    rtt_s: float
    window_bytes: int
    compression: int | None
    stall_s: float
    first_streams: int
    fixed_streams: bool
    peer: str | None
    sends: bool
    subtrees: bool
    checkpoint: bytes
    halted: str
    route: list[Party]
    dials: bool

    def __repr__(self) -> str:  # it holds keys
        return f"<Handed {self.session_id.hex()}>"


class _Told(msgspec.Struct, tag_field="is"):
    """Base of what is told on the line."""


class Came(_Told, tag="came"):
    """A data connection; its descriptor comes with it."""

    number: int
    near: str
    far: str


class Leave(_Told, tag="leave"):
    """These streams are to end."""

    numbers: list[int]


class Halt(_Told, tag="halt"):
    """Nothing more is to be offered."""

    why: str


class Post(_Told, tag="post"):
    """A control message of the keeper's own."""

    framed: bytes


class Pace(_Told, tag="pace"):
    """What holds on a link, or of the storage (`READS`, `WRITES`), now; None: no limit."""

    near: str
    bits_per_s: float | None


class Answered(_Told, tag="answered"):
    """A question is answered."""

    ticket: int


class Status(_Told, tag="status"):
    """How far the hands are."""

    counters: dict[str, int]
    busy: dict[str, int]
    threads: dict[str, int]
    peer: dict[str, int]
    carried: dict[str, int]
    changes: list[str]


class Gone(_Told, tag="gone"):
    """A stream ended."""

    number: int


class Dial(_Told, tag="dial"):
    """More data connections are wanted."""

    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_STREAMS)]
    via: str


class Take(_Told, tag="take"):
    """May so much go out over a link, or be read or written?"""

    ticket: int
    near: str
    size: Annotated[int, msgspec.Meta(ge=0)]


class Durable(_Told, tag="durable"):
    """Objects are durable under their names."""

    ticket: int
    rows: list[tuple[bytes, int]]
    wrong: str = ""


class Named(_Told, tag="named"):
    """Objects that were told as durable before they had their names have them now."""

    ticket: int
    rows: list[tuple[bytes, int]]


class Ended(_Told, tag="ended"):
    """The session came to its end."""

    outcome: bytes
    peer_checkpoint: bytes


class Broke(_Told, tag="broke"):
    """It ended by an error."""

    kind: str
    message: str
    hint: str
    reason: str
    context: dict[str, Any]


ToHands: TypeAlias = Came | Leave | Halt | Post | Pace | Answered
ToKeeper: TypeAlias = Status | Gone | Dial | Take | Durable | Named | Ended | Broke
encode: Final = msgspec.msgpack.Encoder().encode
to_hands: Final = msgspec.msgpack.Decoder(ToHands).decode
to_keeper: Final = msgspec.msgpack.Decoder(ToKeeper).decode


def odd(what: str) -> ProtocolError:
    """The hands said something that nobody can have meant."""
    return ProtocolError(
        f"the process that moves the data told {what}",
        hint="its session is ended; look at the agent's log, and please report it",
    )


def understood(said: bytes) -> ToKeeper:
    """What the hands said.

    Raises:
        ProtocolError: it is nothing that they may say.
    """
    try:
        message: ToKeeper = to_keeper(said)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise odd(f"what nobody understands: {error}") from None
    return message


def pacer_for(session: Session, of: str) -> Pacer:
    """What holds on a link, or of the storage."""
    return session.reads if of == READS else session.writes if of == WRITES else session.pacer_of(of)


def told_error(error: BaseException) -> Broke:
    """An error for the other process; one that nobody foresaw is told to stderr as well."""
    found = error if isinstance(error, FlowError) else first_flow_error(error)
    if found is None:
        traceback.print_exception(error, file=sys.stderr)
        found = FlowError(
            f"an internal error of a mover: {error!r}"[:500],
            hint="look at the agent's log, and please report it",
        )
    known = next(kind for kind in type(found).__mro__ if getattr(all_errors, kind.__name__, None) is kind)
    context = msgspec.to_builtins(found.context, enc_hook=str)
    return Broke(known.__name__, found.message, found.hint, found.reason, context)


def error_of(broke: Broke) -> FlowError:
    """The error that the other process told of."""
    kind = getattr(all_errors, broke.kind, FlowError)
    if not (isinstance(kind, type) and issubclass(kind, FlowError)):
        kind = FlowError
    made = kind(broke.message, hint=broke.hint, reason=broke.reason)
    made.context = broke.context
    return made
