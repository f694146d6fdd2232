"""Messages of hops: what is said comes through, what is beyond the limits does not."""

from __future__ import annotations

import pytest

from flowengine.errors import ProtocolError
from flowengine.wire.handshake import ClientHandshake, Established, ServerHandshake
from flowengine.wire.hops import MAX_TICKET_BYTES, HopMessage, HopOpen, HopOpened, HopWait, decode, encode
from flowengine.wire.keys import Side
from flowengine.wire.messages import Refuse
from flowengine.wire.proofs import RelayProof, among


@pytest.mark.parametrize(
    "message",
    [
        HopOpen(True, b"ticket", 1500),
        HopOpen(False),
        HopOpened(bytes(16), b"t", 2),
        HopWait(bytes(16)),
        Refuse("busy", "no", ""),
    ],
)
def test_a_message_comes_through(message: HopMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        encode(HopOpened(b"short")),
        encode(HopWait(b"short")),
        encode(HopOpen(True, bytes(MAX_TICKET_BYTES + 1))),
        encode(HopOpen(True, b"", -1)),
        encode(HopOpened(bytes(16), b"", 1 << 32)),
    ],
)
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_a_hop_is_keyed_by_what_travels_inside_its_tls() -> None:
    proof = RelayProof(b"a signed document")
    keys = []
    for randoms in ((b"c", b"s"), (b"c", b"t")):
        client = ClientHandshake(proof, bytes(32), randoms[0] * 32)
        server = ServerHandshake(among([proof]), bytes(32), randoms[1] * 32)
        server.start()
        answers: list[object] = list(client.start())
        made: list[Established] = []
        for machine in (server, client, server, client):
            (message,) = [item for item in answers if isinstance(item, bytes)]
            answers = list(machine.receive(message))
            made += [item for item in answers if isinstance(item, Established)]
        one, two = (item.secrets(b"f" * 32).preamble_key(bytes(16), Side.SOURCE) for item in made)
        assert one == two
        keys.append(one)
    assert keys[0] != keys[1]
