"""Pinned bytes of keys, frames, preambles, tickets and the handshake.

Provenance: made by this implementation at protocol 0.1. The key schedule is computed here a second time, from
RFC 5869 with `hmac` alone. Whatever changes one of these bytes is a new protocol version.
"""

from __future__ import annotations

import hmac
import json
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import pytest

from flowengine.wire.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    FrameOpener,
    FrameSealer,
)
from flowengine.wire.handshake import ClientHandshake, ServerHandshake, Software
from flowengine.wire.keys import FRAMES_PER_GENERATION, Direction, SessionSecrets, Side
from flowengine.wire.preamble import Kind, Preamble, PreambleRegistry
from flowengine.wire.proofs import TicketProof, among
from flowengine.wire.ticket import Ticket

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "wire.json").read_text("utf-8")
)
GIVEN = {name: bytes.fromhex(value) for name, value in VECTORS["given"].items()}
DIRECTIONS = {direction.value: direction for direction in Direction}


def session() -> SessionSecrets:
    return SessionSecrets(
        GIVEN["client_random"],
        GIVEN["server_random"],
        client_fingerprint=GIVEN["client_fingerprint"],
        server_fingerprint=GIVEN["server_fingerprint"],
        binding=GIVEN["binding"],
    )


def independent_hkdf(info: bytes, length: int) -> bytes:
    """RFC 5869, sections 2.2 and 2.3."""
    prk = hmac.digest(GIVEN["binding"], GIVEN["client_random"] + GIVEN["server_random"], "sha256")
    output, block, number = b"", b"", 0
    while len(output) < length:
        number += 1
        block = hmac.digest(prk, block + info + bytes([number]), "sha256")
        output += block
    return output[:length]


def context() -> bytes:
    return b"\x00\x01" + b"\x01" + GIVEN["client_fingerprint"] + GIVEN["server_fingerprint"]


@pytest.mark.parametrize("case", VECTORS["stream_keys"])
def test_stream_keys(case: dict[str, Any]) -> None:
    direction = DIRECTIONS[case["direction"]]
    info = (
        b"flowengine stream key\x00" + context() + GIVEN["transfer_id"] + case["stream"].to_bytes(4, "big")
        + bytes([{"source->target": 1, "target->source": 2}[case["direction"]]])
        + case["epoch"].to_bytes(4, "big") + case["generation"].to_bytes(4, "big")
    )  # fmt: skip
    block = independent_hkdf(info, 44)
    assert (block[:32].hex(), block[32:].hex()) == (case["key"], case["iv"])
    keys = session().stream_keys(GIVEN["transfer_id"], case["stream"], direction, case["epoch"])
    keys._counter = case["generation"] * FRAMES_PER_GENERATION
    aead, nonce, counter = keys.advance()
    assert nonce == (int.from_bytes(block[32:], "big") ^ counter).to_bytes(12, "big")
    assert aead.encrypt(nonce, b"", b"").hex() == case["empty_tag"]


@pytest.mark.parametrize("case", VECTORS["preambles"])
def test_preambles(case: dict[str, Any]) -> None:
    label = b"flowengine preamble key\x00"
    dialer = Side(case["dialer"])
    info = label + context() + GIVEN["transfer_id"] + bytes([{"source": 1, "target": 2}[case["dialer"]]])
    key = session().preamble_key(GIVEN["transfer_id"], dialer)
    assert key == independent_hkdf(info, 32)
    preamble = Preamble(GIVEN["transfer_id"], case["stream"], case["epoch"], Kind[case["kind"]])
    assert preamble.encode(key).hex() == case["bytes"]
    registry = PreambleRegistry(preamble.kind)
    registry.register(GIVEN["transfer_id"], key)
    assert registry.accept(bytes.fromhex(case["bytes"])) == preamble


@pytest.mark.parametrize(("name", "stream"), [("frames", 1), ("large_frames", 2)])
def test_frames(name: str, stream: int) -> None:
    keys = [
        session().stream_keys(GIVEN["transfer_id"], stream, Direction.SOURCE_TO_TARGET, 0) for _ in range(2)
    ]
    sealer, opener = (FrameSealer(keys[0]), FrameOpener(keys[1]))
    out = bytearray(MAX_FRAME_BYTES)
    for case in VECTORS[name]:
        used = case["used"]
        plaintext = memoryview(bytes(n & 0xFF for n in range(used)))
        parts = [plaintext[: used // 3], plaintext[used // 3 :]]
        length = sealer.seal_end(out) if case["end"] else sealer.seal_into(parts, out, lone=case["lone"])
        frame = bytes(out[:length])
        assert length == case["length"]
        assert frame[:HEADER_BYTES].hex() == case["header"]
        assert frame[-16:].hex() == case["tag"]
        assert blake2b(frame, digest_size=32).hexdigest() == case["blake2b_256"]
        opened = bytearray(length)
        assert opener.open_into(frame[:HEADER_BYTES], frame[HEADER_BYTES:], opened) == (
            0 if case["end"] else used
        )
        if not case["end"]:
            assert opened[:used] == plaintext[:used]
    opener.finish()


def test_ticket() -> None:
    case = VECTORS["ticket"]
    ticket = Ticket.parse(case["url"])
    assert (ticket.host, ticket.port, ticket.path.hex()) == (case["host"], case["port"], case["path"])
    assert (ticket.fingerprint, ticket.secret) == (GIVEN["server_fingerprint"], GIVEN["ticket_secret"])
    assert ticket.format_secret_url() == case["url"]


def test_handshake() -> None:
    case = VECTORS["handshake"]
    proof = TicketProof(GIVEN["ticket_secret"])
    software = Software("flowengine", "0.1.0", {"streams": 16}, ("zstd",))
    client = ClientHandshake(proof, GIVEN["server_fingerprint"], GIVEN["client_random"], software=software)
    server = ServerHandshake(
        among([proof]), GIVEN["server_fingerprint"], GIVEN["server_random"], software=software
    )
    server.start()
    messages = client.start()
    for machine in (server, client, server, client):
        answers = machine.receive(messages[-1])
        messages += [answer for answer in answers if isinstance(answer, bytes)]
    assert [message.hex() for message in messages] == case["messages"]
    # The MACs once more, from the specification alone.
    first, second = (sha256(message).digest() for message in messages[:2])
    transcript = sha256(GIVEN["server_fingerprint"] + first + second).digest()
    for label, message in (
        (b"flowengine client proof\x00", messages[2]),
        (b"flowengine server proof\x00", messages[3]),
    ):
        assert hmac.digest(GIVEN["ticket_secret"], label + transcript, "sha256") in message
