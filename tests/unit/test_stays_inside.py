"""Which connections are known to stay on their machine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from transfers import transfer

from flowengine.transfer import source as sending
from flowengine.transfer.streams import stays_inside


@pytest.mark.parametrize(("own", "inside"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_a_connection_between_equal_addresses_stays_inside(own: str, inside: bool) -> None:
    """Another address may be another machine's, though here it is not."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=(own, 0)) as near,
        listener.accept()[0] as far,
    ):
        assert stays_inside(near) is stays_inside(far) is inside


def test_what_is_no_connection_of_the_network_stays_inside() -> None:
    near, far = socket.socketpair(socket.AF_UNIX)
    with near, far:
        assert stays_inside(near)


def test_a_connection_that_broke_is_not_known_to() -> None:
    with socket.socket() as sock:
        assert not stays_inside(sock)


@pytest.mark.parametrize("inside", [True, False])
def test_nothing_is_compressed_where_all_connections_stay_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    text = b"".join(b"%d words, again and again\n" % number for number in range(200_000))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "text").write_bytes(text)
    if not inside:
        monkeypatch.setattr(sending, "stays_inside", lambda sock: False)
    done = transfer(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "text").read_bytes() == text
    assert (done.source.bytes_sent < len(text) / 2) is not inside
    assert (done.source.bytes_sent >= len(text)) is inside
