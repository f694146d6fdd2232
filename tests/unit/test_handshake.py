"""The handshake: who gets in, what a stranger learns, and versions that differ."""

from __future__ import annotations

import msgspec
import pytest

from flowengine.errors import AuthenticationError, FlowError, PeerError, ProtocolError, TemporaryError
from flowengine.wire.control import MAX_HANDSHAKE_BYTES
from flowengine.wire.handshake import ClientHandshake, Established, ServerHandshake, Software, refusal
from flowengine.wire.keys import Direction, Side
from flowengine.wire.proofs import TicketProof, among

SECRET, FINGERPRINT = b"k" * 24, b"F" * 32


def client(secret: bytes = SECRET, fingerprint: bytes = FINGERPRINT, **more: object) -> ClientHandshake:
    return ClientHandshake(TicketProof(secret), fingerprint, b"c" * 32, **more)  # type: ignore[arg-type]


def server(*secrets: bytes, **more: object) -> ServerHandshake:
    proofs = [TicketProof(secret) for secret in secrets or (SECRET,)]
    made = ServerHandshake(among(proofs), FINGERPRINT, b"s" * 32, **more)  # type: ignore[arg-type]
    assert made.start() == []
    return made


def run(dialler: ClientHandshake, listener: ServerHandshake) -> tuple[Established, Established]:
    """Both ends' results."""
    ends: dict[str, Established] = {}
    to_server, to_client = dialler.start(), list[bytes]()
    while to_server or to_client:
        for name, machine, queue, other in (
            ("server", listener, to_server, to_client),
            ("client", dialler, to_client, to_server),
        ):
            while queue:
                for output in machine.receive(queue.pop(0)):
                    if isinstance(output, bytes):
                        other.append(output)
                    else:
                        ends[name] = output
    return ends["client"], ends["server"]


def proof_of(dialler: ClientHandshake, listener: ServerHandshake) -> bytes:
    """The client's proof, which the server has not seen yet."""
    (hello,) = listener.receive(dialler.start()[0])
    assert isinstance(hello, bytes)
    (proof,) = dialler.receive(hello)
    assert isinstance(proof, bytes)
    return proof


def test_both_sides_learn_of_each_other_and_derive_the_same_keys() -> None:
    one = Software("flowengine", "1.2", {"streams": 16}, ("zstd", "new-thing"))
    two = Software("flowengine", "1.3", {"streams": 8})
    dialler, listener = client(software=one), server(b"other" * 5, SECRET, software=two)
    at_client, at_server = run(dialler, listener)
    assert (at_client.peer, at_server.peer) == (two, one)
    assert at_client.version == at_server.version == 1
    assert at_server.proof.identity == TicketProof(SECRET).identity
    assert dialler.is_done
    assert listener.is_done
    ours, theirs = at_client.secrets(), at_server.secrets()
    assert ours.preamble_key(b"i" * 16, Side.TARGET) == theirs.preamble_key(b"i" * 16, Side.TARGET)
    sealed = [
        secrets.stream_keys(b"i" * 16, 0, Direction.SOURCE_TO_TARGET, 0).advance()
        for secrets in (ours, theirs)
    ]
    assert len({aead.encrypt(nonce, b"x", b"") for aead, nonce, _ in sealed}) == 1
    assert repr(at_client.proof) == "<TicketProof>"
    assert "kkkk" not in repr(at_client)


def test_the_secret_goes_into_the_keys() -> None:
    (one, _), (two, _) = run(client(), server()), run(client(b"l" * 24), server(b"l" * 24))
    assert one.secrets().preamble_key(bytes(16), Side.SOURCE) != two.secrets().preamble_key(
        bytes(16), Side.SOURCE
    )


def test_a_wrong_secret_gets_authentication_failed_and_nothing_else() -> None:
    dialler, listener = client(b"wrong" * 5), server(software=Software("name", "version"))
    proof = proof_of(dialler, listener)
    with pytest.raises(AuthenticationError) as caught:
        listener.receive(proof)
    answer = refusal(caught.value)
    assert msgspec.msgpack.decode(answer) == {"type": "refusal", "reason": "authentication"}
    with pytest.raises(AuthenticationError, match="did not accept"):
        dialler.receive(answer)
    for machine in (dialler, listener):
        assert not machine.is_done
        with pytest.raises(ProtocolError, match="none was due"):
            machine.receive(proof)


def test_the_servers_hello_names_nothing_but_versions() -> None:
    (hello,) = server(software=Software("name", "9.9", {"x": 1}, ("f",))).receive(client().start()[0])
    assert isinstance(hello, bytes)
    assert set(msgspec.msgpack.decode(hello)) == {"type", "versions", "random"}


@pytest.mark.parametrize("field", ["kind", "identity", "mac"])
def test_every_part_of_a_proof_counts(field: str) -> None:
    dialler, listener = client(), server()
    proof = msgspec.msgpack.decode(proof_of(dialler, listener))
    proof[field] = {"kind": "certificate", "identity": b"12345678", "mac": bytes(32)}[field]
    with pytest.raises(AuthenticationError):
        listener.receive(msgspec.msgpack.encode(proof))


def test_a_server_that_does_not_know_the_secret_is_found_out() -> None:
    dialler, listener = client(), server()
    proof = proof_of(dialler, listener)
    welcome = listener.receive(proof)[0]
    assert isinstance(welcome, bytes)
    forged = msgspec.msgpack.decode(welcome)
    # A mirror of the client's own proof is not the server's.
    forged["mac"] = msgspec.msgpack.decode(proof)["mac"]
    with pytest.raises(AuthenticationError, match="server did not prove"):
        dialler.receive(msgspec.msgpack.encode(forged))


def test_a_man_in_the_middle_with_another_certificate_cannot_pass_proofs_on() -> None:
    dialler, listener = client(fingerprint=b"M" * 32), server()
    proof = proof_of(dialler, listener)
    with pytest.raises(AuthenticationError):
        listener.receive(proof)


def test_a_changed_hello_is_found_out() -> None:
    dialler, listener = client(versions=(1, 2)), server(versions=(1, 2))
    hello = msgspec.msgpack.decode(dialler.start()[0])
    hello["versions"] = [1]
    (answer,) = listener.receive(msgspec.msgpack.encode(hello))
    assert isinstance(answer, bytes)
    answered = msgspec.msgpack.decode(answer)
    answered["versions"] = [1]
    (proof,) = dialler.receive(msgspec.msgpack.encode(answered))
    assert isinstance(proof, bytes)
    with pytest.raises(AuthenticationError):
        listener.receive(proof)


def test_the_highest_common_version_is_spoken() -> None:
    at_client, at_server = run(client(versions=(1, 2, 3)), server(versions=(2, 3, 0x0105)))
    assert at_client.version == at_server.version == 3


def test_versions_without_common_ground_name_both_and_who_is_older() -> None:
    dialler, listener = client(versions=(1,)), server(versions=(0x0200, 0x0201))
    with pytest.raises(ProtocolError, match=r"speaks 2\.0, 2\.1, the other 0\.1") as caught:
        listener.receive(dialler.start()[0])
    assert caught.value.reason == "incompatible"
    assert "the other side" in caught.value.hint
    with pytest.raises(ProtocolError, match=r"refused: no protocol version in common.*2\.1") as told:
        dialler.receive(refusal(caught.value))
    assert told.value.reason == "incompatible"


def test_unknown_fields_and_features_are_ignored_but_required_ones_are_not() -> None:
    dialler, listener = client(), server()
    hello = msgspec.msgpack.decode(dialler.start()[0])
    hello["later"] = {"a": [1]}
    assert listener.receive(msgspec.msgpack.encode(hello))
    run(client(software=Software(required=("x",))), server(known=("x",)))
    run(
        client(software=Software(features=("x",))),
        server(software=Software(features=("x",), required=("x",))),
    )
    with pytest.raises(ProtocolError, match="requires x") as caught:
        run(client(software=Software(required=("x",))), server())
    assert caught.value.reason == "incompatible"
    with pytest.raises(ProtocolError, match="requires y"):
        run(client(), server(software=Software(required=("y",))))
    # Who has not proved a thing does not learn what this side knows.
    with pytest.raises(AuthenticationError):
        run(client(b"wrong" * 5, software=Software(required=("x",))), server())


@pytest.mark.parametrize(
    "software",
    [
        Software("x" * 65),
        Software(version="1\n2"),
        Software(limits={f"{n}": n for n in range(65)}),
        Software(limits={"x": -1}),
        Software(features=("f",) * 65),
    ],
)
def test_claims_are_bounded(software: Software) -> None:
    with pytest.raises(ProtocolError, match="longer than allowed"):
        run(client(software=software), server())


@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", b"\x90", b"\x81\xa4type\xa4nope", b"x" * (MAX_HANDSHAKE_BYTES + 1), b"\x91" * 10_000],
)
def test_garbage_is_a_protocol_error(message: bytes) -> None:
    for machine in (client(), server()):
        if isinstance(machine, ClientHandshake):
            machine.start()
        with pytest.raises(ProtocolError):
            machine.receive(message)


def test_messages_out_of_turn_are_refused() -> None:
    with pytest.raises(ProtocolError, match="none was due"):
        client().receive(b"")
    dialler, listener = client(), server()
    hello = dialler.start()[0]
    listener.receive(hello)
    with pytest.raises(ProtocolError, match="out of turn"):
        listener.receive(hello)
    with pytest.raises(ValueError, match="before"):
        dialler.start()
    with pytest.raises(ValueError, match="before"):
        listener.start()


def test_a_mirrored_or_short_random_is_refused() -> None:
    for random in (b"c" * 32, b"s" * 31):
        other = client()
        other.start()
        hello = {"type": "server-hello", "versions": [1], "random": random}
        with pytest.raises(ProtocolError, match="32 random bytes"):
            other.receive(msgspec.msgpack.encode(hello))
    with pytest.raises(ValueError):
        ClientHandshake(TicketProof(SECRET), b"short", b"c" * 32)


def test_other_refusals_arrive_without_control_characters() -> None:
    error: FlowError = TemporaryError("too many\x1b[31m sessions", reason="busy")
    dialler = client()
    dialler.start()
    with pytest.raises(PeerError, match=r"too many\?\[31m sessions"):
        dialler.receive(refusal(error))


def test_a_hello_that_nobody_takes_is_not_sent() -> None:
    with pytest.raises(ValueError, match="longer than"):
        client(software=Software("x" * MAX_HANDSHAKE_BYTES)).start()
