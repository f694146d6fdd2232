"""Coverage-guided fuzzing of everything that reads a peer's bytes.

Usage: python tests/fuzz/fuzz_wire.py TARGET [libFuzzer options], as `frames -max_total_time=60`. Needs
atheris; importing this module, and calling the targets with bytes, does not.

A target must take any bytes: a `FlowError` of the kinds that it names is right, anything else is a finding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import msgspec

from flowengine.errors import AuthenticationError, IntegrityError, PeerError, ProtocolError, UsageError
from flowengine.wire import hops as hop_messages
from flowengine.wire import messages as wire_messages
from flowengine.wire.control import ControlDecoder
from flowengine.wire.filters import FilterSet
from flowengine.wire.frames import FRAME_SIZES, HEADER_BYTES, MAX_FRAME_BYTES, FrameOpener, FrameSealer
from flowengine.wire.handshake import ClientHandshake, ServerHandshake
from flowengine.wire.keys import NO_FINGERPRINT, Direction, SessionSecrets, StreamKeys
from flowengine.wire.paths import check_link_target, check_relative_path, collision_key
from flowengine.wire.preamble import PREAMBLE_BYTES, Kind, Preamble, PreambleRegistry
from flowengine.wire.proofs import TicketProof, among
from flowengine.wire.records import pack_record_header, parse_record_header
from flowengine.wire.ticket import Ticket

_OUT: Final = bytearray(MAX_FRAME_BYTES)
_FRAGMENT: Final = Ticket("h", 1, b"", b"F" * 32, b"S" * 24).format_secret_url().partition("#")[2]


def _keys() -> StreamKeys:
    secrets = SessionSecrets(
        b"c" * 32, b"s" * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=b"S" * 32
    )
    return secrets.stream_keys(bytes(16), 1, Direction.SOURCE_TO_TARGET, 0)


def frames(data: bytes) -> None:
    """A stream of frames; a leading odd byte lets a right frame come first."""
    opener = FrameOpener(_keys())
    if data[:1] and data[0] & 1:
        sealed = bytearray(4096)
        FrameSealer(_keys()).seal_into([bytes(5)], sealed)
        for position, byte in enumerate(data[1:17]):
            # Most of these bytes are zero in a corpus, so headers stay close to a right one.
            sealed[position] ^= byte
        data = bytes(sealed) + data[17:]
    at = 0
    try:
        while len(data) - at >= HEADER_BYTES:
            header = data[at : at + HEADER_BYTES]
            length = opener.parse_header(header)
            if length + HEADER_BYTES not in FRAME_SIZES:
                raise AssertionError(f"unpublished length {length}")
            body = data[at + HEADER_BYTES : at + HEADER_BYTES + length].ljust(length, b"\0")
            used = opener.open_into(header, body, _OUT)
            if used != 5 or at:
                raise AssertionError("a frame was forged")
            at += HEADER_BYTES + length
    except (ProtocolError, IntegrityError):
        return


def control(data: bytes) -> None:
    """A control connection, fed in pieces whose lengths are the data's own bytes."""
    decoder, whole = ControlDecoder(max_message=64), ControlDecoder(max_message=64)
    got: list[bytes] = []
    at = 0
    try:
        while at < len(data):
            step = data[at] % 7 + 1
            got += decoder.feed(data[at : at + step])
            at += step
            if decoder.buffered_bytes >= 68:
                raise AssertionError("more than one message is held")
    except ProtocolError:
        return
    if whole.feed(data) != got:
        raise AssertionError("a split changed the messages")


def handshake(data: bytes) -> None:
    """One message for each state of both sides; an odd first byte changes the right message instead."""
    proof = TicketProof(b"k" * 24)
    for state in range(4):
        client = ClientHandshake(proof, b"F" * 32, b"c" * 32)
        server = ServerHandshake(among([proof]), b"F" * 32, b"s" * 32)
        server.start()
        # The right message after `state` messages, and who waits for it.
        right, machine = client.start()[0], server if state % 2 == 0 else client
        for number in range(state):
            answer = (client if number % 2 else server).receive(right)[0]
            assert isinstance(answer, bytes)
            right = answer
        message = data[1:]
        if data[:1] and data[0] & 1:
            change = data[1:].ljust(len(right), b"\0")[: len(right)]
            message = bytes(a ^ b for a, b in zip(right, change, strict=True)) + data[1 + len(right) :]
        try:
            machine.receive(message)
        except (ProtocolError, AuthenticationError, PeerError):
            continue
        # What else a welcome says is under TLS alone.
        if machine.is_done and msgspec.msgpack.decode(right)["mac"] not in message:
            raise AssertionError("somebody came in without the secret")


def paths(data: bytes) -> None:
    """A path, a link and its target, divided by the first NUL."""
    path, _, target = data.partition(b"\0")
    collision_key(path)
    try:
        check_relative_path(path)
        check_link_target(path, target)
    except ProtocolError as error:
        str(error).encode("utf-8")
        return
    if {b"", b".", b".."} & set(path.split(b"/")) or target.startswith(b"/"):
        raise AssertionError("an unsafe path was accepted")
    depth = path.count(b"/")
    for name in target.split(b"/"):
        depth += {b"..": -1, b".": 0, b"": 0}.get(name, 1)
        if depth < 0:
            raise AssertionError("a link leads out")


def preambles(data: bytes) -> None:
    """The 64 bytes of a stranger; half of the time close to right ones."""
    for kind in Kind:
        registry = PreambleRegistry(kind)
        registry.register(bytes(16), b"k" * 32)
        good = Preamble(bytes(16), 0, 0, kind).encode(b"k" * 32)
        candidate = bytes(a ^ b for a, b in zip(good, data.ljust(PREAMBLE_BYTES, b"\0"), strict=False))
        for tried in (data, candidate):
            try:
                registry.accept(tried)
            except (ProtocolError, AuthenticationError):
                continue
            if tried != good:
                raise AssertionError("a preamble was forged")


def hops(data: bytes) -> None:
    """What a neighbour on a route says."""
    try:
        message = hop_messages.decode(data)
    except ProtocolError as error:
        str(error).encode("utf-8", "surrogatepass")
        return
    if not isinstance(message, hop_messages.Refuse) and len(message.ticket) > hop_messages.MAX_TICKET_BYTES:
        raise AssertionError("a ticket beyond the limit was taken")


def filters(data: bytes) -> None:
    """Patterns by line, the last line a path."""
    *patterns, path = data.split(b"\n")
    try:
        rules = FilterSet.from_wire([(bool(number & 1), pattern) for number, pattern in enumerate(patterns)])
    except ProtocolError:
        return
    for is_dir in (False, True):
        rules.allows_below(path, is_dir)


def tickets(data: bytes) -> None:
    """A ticket as somebody pasted it."""
    text = data.decode("utf-8", "surrogateescape")
    if data[:1] and data[0] & 1:
        text = f"flow://{text[1:]}#{_FRAGMENT}"
    try:
        ticket = Ticket.parse(text)
    except UsageError:
        return
    if Ticket.parse(ticket.format_secret_url()) != ticket:
        raise AssertionError("a ticket changed on its way")


def messages(data: bytes) -> None:
    """One control message: it decodes to something that encodes and decodes to the same, or is refused."""
    try:
        message = wire_messages.decode(data)
    except ProtocolError:
        return
    if wire_messages.decode(wire_messages.encode(message)) != message:
        raise AssertionError("a message does not survive its own encoding")


def records(data: bytes) -> None:
    """One record header: within its bounds, and packed again it is the same bytes."""
    try:
        header = parse_record_header(memoryview(data), 1 << 20)
    except ProtocolError:
        return
    if header is None:
        return
    codec, raw, stored, runs, size = header
    if not (0 < stored <= raw <= 1 << 20) or pack_record_header(codec, raw, stored, runs) != data[:size]:
        raise AssertionError("a record header was misread")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (frames, messages, records, control, handshake, paths, preambles, hops, filters, tickets)
}


if __name__ == "__main__":
    from instrument import fuzz

    fuzz(sys.argv, TARGETS, "flowengine.wire.")
