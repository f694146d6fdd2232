"""Messages recorded at protocol 0.1 are read for ever; what a newer peer adds is ignored, what it requires is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowengine.api import agents
from flowengine.errors import ProtocolError
from flowengine.wire import messages
from flowengine.wire.handshake import ClientHandshake, ServerHandshake, Software
from flowengine.wire.proofs import TicketProof, among

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "protocol-0.1.json").read_text("utf-8")
)
TICKET = TicketProof(bytes.fromhex("a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7"))
FINGERPRINT = bytes(range(0x40, 0x60))
HANDSHAKE = [bytes.fromhex(text) for text in RECORDED["handshake"]]
SERVER_RANDOM = bytes(range(0x20, 0x40))
CONTROL = pytest.mark.parametrize("case", RECORDED["control"], ids=lambda case: case["message"])
AGENTS = pytest.mark.parametrize("case", RECORDED["agents"], ids=lambda case: case["message"])
COMMANDS = pytest.mark.parametrize("case", RECORDED["commands"], ids=lambda case: case["message"])


def server() -> ServerHandshake:
    made = ServerHandshake(among([TICKET]), FINGERPRINT, SERVER_RANDOM)
    made.start()
    return made


# --- control messages -------------------------------------------------------------------------------------------


def test_every_message_is_recorded() -> None:
    kinds = {kind.__name__ for kind in messages.Message.__args__}
    recorded = {case["message"] for case in RECORDED["control"]}
    assert recorded == kinds, (
        "add its encoding to tests/vectors/protocol-0.1.json; never change what is there"
    )
    told = {kind.__name__ for kind in agents.Told.__subclasses__()}
    assert {case["message"] for case in RECORDED["agents"]} == told
    assert {case["message"] for case in RECORDED["commands"]} == {
        kind.__name__ for kind in agents.Command.__args__
    }


@CONTROL
def test_a_recorded_control_message_is_read(case: dict[str, str]) -> None:
    data = bytes.fromhex(case["hex"])
    message = messages.decode(data)
    assert type(message).__name__ == case["message"]
    # What a later version appends has defaults: the beginning stays as it was.
    again = msgspec.msgpack.decode(messages.encode(message))
    before = msgspec.msgpack.decode(data)
    assert again[: len(before)] == before


@CONTROL
def test_a_field_that_a_newer_peer_appends_is_ignored(case: dict[str, str]) -> None:
    data = bytes.fromhex(case["hex"])
    message = messages.decode(data)
    known = msgspec.msgpack.decode(messages.encode(message))
    for extra in ([None], [{"new": 1}], [b"x", [1, 2]]):
        assert messages.decode(msgspec.msgpack.encode([*known, *extra])) == message


def test_an_option_that_a_newer_peer_adds_is_ignored() -> None:
    (case,) = [case for case in RECORDED["control"] if case["message"] == "Open"]
    fields = msgspec.msgpack.decode(bytes.fromhex(case["hex"]))
    fields[-1]["sparkle"] = True
    assert messages.decode(msgspec.msgpack.encode(fields)) == messages.decode(bytes.fromhex(case["hex"]))


@pytest.mark.parametrize("data", [[99, "new"], ["Open"], [], {}, 5])
def test_a_message_that_is_not_known_is_refused(data: object) -> None:
    with pytest.raises(ProtocolError) as raised:
        messages.decode(msgspec.msgpack.encode(data))
    assert "versions" in raised.value.hint


# --- handshake --------------------------------------------------------------------------------------------------


def extended(message: bytes, **fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(message) | fields)


def test_the_recorded_handshake_is_read() -> None:
    machine = server()
    (hello,) = machine.receive(HANDSHAKE[0])
    assert hello == HANDSHAKE[1]
    machine.receive(HANDSHAKE[2])
    assert machine.is_done


def test_what_a_newer_client_says_besides_is_ignored() -> None:
    """The proof covers the hello as it was sent, so this is the client's own hello with more in it."""

    class Newer(ClientHandshake):
        def start(self) -> list[bytes]:
            (hello,) = super().start()
            self._hellos[0] = extended(hello, versions=[1, 2, 0x0100], colours=["red"], features=["new"])
            return [self._hellos[0]]

    machine, client = server(), Newer(TICKET, FINGERPRINT, bytes(32))
    (hello,) = machine.receive(client.start()[0])
    assert isinstance(hello, bytes)
    (proof,) = client.receive(hello)
    assert isinstance(proof, bytes)
    welcome, established = machine.receive(extended(proof, colours=["red"]))
    assert not isinstance(established, bytes)
    assert (established.version, established.peer.features) == (1, ("new",))
    assert isinstance(welcome, bytes)
    client.receive(extended(welcome, colours=["red"]))
    assert client.is_done


def test_a_feature_that_a_newer_client_requires_is_refused_by_name() -> None:
    machine = server()
    client = ClientHandshake(
        TICKET, FINGERPRINT, bytes(32), software=Software("flowengine", "9.0", required=("telepathy",))
    )
    (hello,) = machine.receive(client.start()[0])
    (proof,) = client.receive(hello)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="telepathy") as raised:
        machine.receive(proof)  # type: ignore[arg-type]
    assert (raised.value.reason, bool(raised.value.hint)) == ("incompatible", True)


def test_a_peer_of_another_version_alone_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no protocol version in common") as raised:
        server().receive(extended(HANDSHAKE[0], versions=[0x0200]))
    assert raised.value.reason == "incompatible"


# --- agents and coordinator -------------------------------------------------------------------------------------


@AGENTS
def test_a_recorded_message_of_agents_is_read(case: dict[str, Any]) -> None:
    kind = getattr(agents, case["message"])
    said = msgspec.json.decode(json.dumps(case["json"]), type=kind)
    again = json.loads(msgspec.json.encode(said))
    assert case["json"].items() <= again.items()
    agents.check_required(said)


@AGENTS
def test_what_a_newer_side_adds_is_ignored(case: dict[str, Any]) -> None:
    kind = getattr(agents, case["message"])
    said = msgspec.json.decode(json.dumps(case["json"]), type=kind)
    more = case["json"] | {"weather": "fine", "plan": {"a": [1]}}
    assert msgspec.json.decode(json.dumps(more), type=kind) == said


@AGENTS
def test_what_a_newer_side_requires_is_refused_by_name(case: dict[str, Any]) -> None:
    more = case["json"] | {"required": ["weather"]}
    said = msgspec.json.decode(json.dumps(more), type=getattr(agents, case["message"]))
    with pytest.raises(ProtocolError, match="weather") as raised:
        agents.check_required(said)
    assert (raised.value.reason, bool(raised.value.hint)) == ("incompatible", True)
    agents.check_required(said, {"weather"})


@COMMANDS
def test_a_recorded_command_is_read(case: dict[str, Any]) -> None:
    command = msgspec.json.decode(json.dumps(case["json"]), type=agents.Command)
    assert type(command).__name__ == case["message"]
    more = case["json"] | {"weather": "fine"}
    assert msgspec.json.decode(json.dumps(more), type=agents.Command) == command
