"""Transfer messages of the control connection: what source and target say to each other.

MessagePack arrays, the first item a tag; docs/spec/wire.md has the table. A message that does not decode into one
of these types is a `ProtocolError`. Unknown trailing fields of a newer peer are ignored.

The source numbers its *offers* (`Offer`, `ObjectRun`, …) 0, 1, 2 …; a chunk is addressed on the wire by
(offer number, index within the offer) and never by its id, so a data stream carries no ids at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Protocol, TypeVar

import msgspec

from flowengine.errors import ProtocolError
from flowengine.manifest import Entry

__all__ = [
    "LARGE_OBJECT_BYTES",
    "MANIFEST_PART_BYTES",
    "MAX_FINER_BYTES",
    "MAX_FINE_CHUNKS",
    "MAX_MANIFEST_BYTES",
    "MAX_OFFER_CHUNKS",
    "MAX_OFFER_ENTRIES",
    "MAX_SUBTREES_FOLDERS",
    "WANT_ALL",
    "WANT_NONE",
    "WANT_SOME",
    "DirectoryBegin",
    "DirectoryEnd",
    "EncodedOffer",
    "Failed",
    "Finer",
    "Finish",
    "Folder",
    "Landed",
    "LeaveStreams",
    "Listed",
    "Lost",
    "ManifestPart",
    "Message",
    "ObjectBegin",
    "ObjectEnd",
    "ObjectRun",
    "Offer",
    "Open",
    "Opened",
    "Options",
    "Progress",
    "Rate",
    "Receipt",
    "Received",
    "Refuse",
    "Subtrees",
    "Totals",
    "Want",
    "WantStreams",
    "decode",
    "decode_lazily",
    "encode",
    "passages",
]

MAX_OFFER_ENTRIES: Final = 1024
MAX_MANIFEST_BYTES: Final = 16 << 30
"""More than a hundred million objects have, or 28 TiB in chunks of 64 KiB; it is kept on disk."""
MANIFEST_PART_BYTES: Final = 64 * 1024
MAX_OFFER_CHUNKS: Final = 8192
MAX_SUBTREES_FOLDERS: Final = 256
MAX_FINE_CHUNKS: Final = 32_768
"""Fine chunks in one `Finer`; so one `Want` may ask for as many times the fine profile's smallest chunk in bytes."""
MAX_FINER_BYTES: Final = 64 << 20
"""Bytes of chunks that may be asked for finer and whose `Finer` is not answered."""
LARGE_OBJECT_BYTES: Final = 1 << 20
"""Objects of this size or more are offered in runs while they are read; smaller ones whole, many to an offer."""

WANT_NONE: Final = 0
WANT_ALL: Final = 1
WANT_SOME: Final = 2


class _Message(msgspec.Struct, array_like=True, gc=False, tag=True):
    """Common configuration; the tag is the class's position in the table of docs/spec/wire.md."""


class Options(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the transfer keeps, leaves out and removes; both ends obey the same values. A map: unknown keys are ignored.

    `labels`, `contracts` and `purpose` are what the client states of the data; a server's policies hear them
    beside its own, and never instead.
    """

    delete: bool = False
    dry_run: bool = False
    publish: str = "object"
    xattrs: bool = False
    owner: bool = False
    links: str = "keep"
    filters: list[tuple[bool, bytes]] = []
    files_from: list[bytes] | None = None
    rename: bytes = b""
    reread: bool = False
    labels: list[str] = []
    contracts: list[str] = []
    purpose: str = ""


class Open(_Message, tag=1):
    """Client's request on a served root: what to do below which path.

    `role` is what the *client* will be: "source" pushes, "target" pulls; "stat" and "list" only look. A client that is
    the source of a site's data shows the `ticket` of its own decision to release it. `subtrees`: it understands `Subtrees`.
    """

    role: str
    path: bytes
    transfer_id: bytes
    streams: int
    profile: str
    options: Options
    ticket: bytes = b""
    subtrees: bool = False


class Opened(_Message, tag=2):
    """Server's consent: how many data streams it accepts; with the `ticket`, where it is the source of a site's data.

    `subtrees`: it understands `Subtrees`.
    """

    streams: int
    session_id: bytes
    ticket: bytes = b""
    subtrees: bool = False


class Refuse(_Message, tag=3):
    """The peer will not go on: reason code, one sentence, what to do next."""

    reason: str
    message: str
    hint: str = ""
    retryable: bool = False


class DirectoryBegin(_Message, tag=4):
    """What follows lies in this directory, until its `DirectoryEnd`. The root's name is empty."""

    name: bytes


class DirectoryEnd(_Message, tag=5):
    """The current directory is complete (or, where not `complete`, could not be read to its end)."""

    mode: int
    mtime_ns: int
    extra: bytes = b""
    complete: bool = True
    apply: bool = True


class Offer(_Message, tag=6):
    """A run of entries of the current directory, in name order; large objects that were offered in runs are not among them."""

    entries: list[Entry]


_OFFER_HEAD: Final = b"\x92\x06"
"""What MessagePack has before the entries of an offer: a list of two, of which the first is its tag."""


class EncodedOffer:
    """An `Offer` whose entries nobody has decoded: where nothing changed, and where they are a block, nobody needs to.

    Args:
        data: the entries, as in a page of the manifest.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> bytes:
        """The message."""
        return _OFFER_HEAD + self.data

    def decode(self) -> Offer:
        """With its entries.

        Raises:
            ProtocolError: the bytes are no entries.
        """
        offer = decode(self.encode())
        assert isinstance(offer, Offer)
        return offer


class Folder(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A folder of `Subtrees`: how deep below the current directory, its name, mode and time, and its files.

    `entries` are those of an `Offer`, encoded; empty where it has no files itself.
    """

    depth: int
    name: bytes
    mode: int
    mtime_ns: int
    entries: bytes = b""


class _HasDepth(Protocol):
    @property
    def depth(self) -> int: ...


_OfSubtrees = TypeVar("_OfSubtrees", bound=_HasDepth)


def passages(folders: Iterable[_OfSubtrees], above: int = 0) -> Iterator[tuple[_OfSubtrees, bool]]:
    """Each folder of subtrees as it is entered (True) and, behind all that is in it, left (False).

    Args:
        folders: each before those in it.
        above: the depth of the outermost ones.
    """
    opened: list[_OfSubtrees] = []
    for folder in folders:
        while len(opened) > folder.depth - above:
            yield opened.pop(), False
        yield folder, True
        opened.append(folder)
    while opened:
        yield opened.pop(), False


class Subtrees(_Message, tag=25):
    """Whole subtrees of the current directory, each folder before those in it.

    It says what a `DirectoryBegin`, an `Offer` (where there are entries) and a `DirectoryEnd` of each folder would say; so
    it is as many offers as there are folders with entries.
    """

    folders: Annotated[list[Folder], msgspec.Meta(max_length=MAX_SUBTREES_FOLDERS)]


class ObjectBegin(_Message, tag=7):
    """A large object of the current directory begins; runs of it follow. `entry.chunks` is empty."""

    entry: Entry


class ObjectRun(_Message, tag=8):
    """The next consecutive chunks of the large object, packed."""

    chunks: bytes


class ObjectEnd(_Message, tag=9):
    """The large object is complete; `reason` not empty: it could not be read, forget it."""

    reason: str = ""
    message: str = ""


class Failed(_Message, tag=10):
    """One object failed at the sender of this message; the transfer goes on without it."""

    path: bytes
    reason: str
    message: str


class Lost(_Message, tag=18):
    """Source: these chunks of an offer cannot be served any more; their objects fail in this session."""

    offer: int
    index: int
    count: int
    reason: str
    message: str


class Listed(_Message, tag=19):
    """Answer to `Open` with role "stat" or "list": (name, mode, size, mtime_ns) rows; more follow until `last`."""

    rows: list[tuple[bytes, int, int, int]]
    last: bool


class Finer(_Message, tag=20):
    """An offer too: the chunks asked for in the `finer` of the answer to `offer`, in order, each cut finer."""

    offer: int
    chunks: bytes


class Totals(_Message, tag=11):
    """How much the scan has found so far (not: how much must move); `final` when the scan is done."""

    objects: int
    size_bytes: int
    final: bool


class Finish(_Message, tag=12):
    """Everything was offered. `complete` is False when something could not be scanned or read."""

    version_id: bytes
    objects: int
    size_bytes: int
    complete: bool
    checkpoint: bytes = b""


class Want(_Message, tag=13):
    """Answer to the next unanswered offer, in order: none, all, or a bitmap (LSB first) of its chunks.

    `finer` is the bitmap of chunks that are to be offered again, cut finer, before the target decides. `whole` is not 0: all
    or none of so many offers of one `Subtrees`; their chunks are addressed as if they were one offer, by the first one's number.
    """

    kind: int
    bitmap: bytes = b""
    finer: bytes = b""
    whole: int = 0


class Received(_Message, tag=14):
    """So many more payload bytes were verified, written and journalled: the credit comes back."""

    size_bytes: int


class WantStreams(_Message, tag=21):
    """Source: so many data connections would be of use now; the side that dials opens what is missing.

    `via` says over which link of the source's: the site at its other end; empty for all together.
    """

    count: int
    via: str = ""


class LeaveStreams(_Message, tag=23):
    """The side that dials: the source is to end these streams, and to send what they would have carried on others."""

    numbers: list[int]


class Rate(_Message, tag=22):
    """Target: the source is to send at most so much from now on; 0 for as much as it can."""

    bits_per_s: int


class ManifestPart(_Message, tag=24):
    """Source, under a grant that names a version: the next bytes of its manifest, before anything is offered."""

    data: bytes
    last: bool


class Landed(_Message, tag=15):
    """Totals so far of what is durable under its final name."""

    objects: int
    size_bytes: int


class Progress(_Message, tag=16):
    """Counters for the watching end, and what was decided since the last one; informational.

    `halt` is not: no object begins any more. Of a source it asks the target which ones have begun; of a target it
    says that all `unwanted` was told: runs (offer, index, count) that it wanted and is not to be sent any more.
    """

    counters: dict[str, int]
    bottleneck: str = ""
    changes: list[str] = []
    halt: str = ""
    unwanted: list[tuple[int, int, int]] = []


class Receipt(_Message, tag=17):
    """The target's last word: the version that landed and the counts behind it.

    `checkpoint` is, here and in `Finish`, the signed head of the sender's chain of evidence; empty where it keeps none.
    """

    version_id: bytes
    state: str
    counters: dict[str, int]
    bottleneck: str = ""
    checkpoint: bytes = b""


Message = (
    Open
    | Opened
    | Refuse
    | DirectoryBegin
    | DirectoryEnd
    | Offer
    | Subtrees
    | ObjectBegin
    | ObjectRun
    | ObjectEnd
    | Failed
    | Finer
    | Listed
    | Lost
    | Totals
    | Finish
    | Want
    | Received
    | Landed
    | Progress
    | Receipt
    | WantStreams
    | Rate
    | LeaveStreams
    | ManifestPart
)

encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Message)


def decode(data: bytes | memoryview) -> Message:
    """The message in `data`.

    Raises:
        ProtocolError: the bytes are not one message of this protocol.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise ProtocolError(
            f"the peer sent a control message that does not decode: {error}",
            hint="check that both sides run compatible versions (flow --version)",
        ) from None
    return message


def decode_lazily(data: bytes) -> Message | EncodedOffer:
    """The message in `data`; the entries of an offer stay as they are.

    Raises:
        ProtocolError: as `decode` does.
    """
    return EncodedOffer(data[len(_OFFER_HEAD) :]) if data.startswith(_OFFER_HEAD) else decode(data)
