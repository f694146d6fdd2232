"""Two sites meet on real sockets: under a good grant data moves; anything else is refused by the other site itself."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from parties import Federation

from flowengine.errors import FlowError
from flowengine.transfer.listen import Listener
from flowengine.transfer.run import TransferSettings, pull
from flowengine.transfer.serve import ServedRoot
from flowengine.transfer.sites import SitePeer, SiteTrust


def serving(host: SiteTrust, folder: Path, visit: Callable[[int], Awaitable[None]]) -> list[str]:
    """Run `visit` while `host` serves `folder`; gives what it logged."""
    log: list[str] = []
    server = ServedRoot(os.fsencode(folder))

    async def main() -> None:
        listener = Listener("127.0.0.1", 0, identity=host, log=log.append)
        listener.bind()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, server.handle)
            with trio.fail_after(60):
                await visit(listener.port)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return log


def test_a_grant_lets_two_sites_move_data(tmp_path: Path) -> None:
    federation = Federation()
    source, target = federation.site("a"), federation.site("b")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(os.urandom(3 << 20))

    async def visit(port: int) -> None:
        peer = SitePeer("127.0.0.1", port, target, federation.signed(source, target))
        report = await pull(peer, b"data/", os.fsencode(tmp_path / "in"), TransferSettings(use_cache=False))
        assert report.state == "completed"

    assert serving(source, tmp_path, visit) == []
    assert (tmp_path / "in/file").read_bytes() == (tmp_path / "data/file").read_bytes()


def test_a_grant_for_another_path_is_refused(tmp_path: Path) -> None:
    federation = Federation()
    source, target = federation.site("a"), federation.site("b")
    (tmp_path / "data").mkdir()

    async def visit(port: int) -> None:
        peer = SitePeer("127.0.0.1", port, target, federation.signed(source, target))
        with pytest.raises(FlowError) as raised:
            await pull(peer, b"other/", os.fsencode(tmp_path / "in"), TransferSettings(use_cache=False))
        assert raised.value.reason == "grant-other-path"

    (line,) = serving(source, tmp_path, visit)
    assert "refused (grant-other-path)" in line
