"""A reference: the engine's own parts and nothing between them, which tells what the engine adds to them."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.contenders.base import Contender
from perf.session import Session

__all__ = ["Parts"]

LONG_STREAMS, LOOPBACK_STREAMS = 8, 2
LEVEL = 1
PEER = (sys.executable, str(Path(__file__).with_name("parts_peer.py")))


class Parts(Contender):
    """Reads, cuts, hashes, seals, sends, opens, verifies and writes as `flow` does, by the same calls on like threads.

    What `flow` takes longer is what its promises cost beyond those on the bytes themselves: to ask before sending, to
    continue, to show, to remember, to take part in a plan. It is no proof of what cannot be had: each folder is listed twice,
    over a link all is compressed with one level, and what is written goes to the disk with the sync at the end. It moves trees of plain files to where nothing of them is; where the target holds
    something of them, it only describes them, which is right for s7 and s3-folders-again alone.
    """

    name = "parts"
    encrypts, verifies, syncs = "AES-256-GCM", "blake3, every chunk", "yes"

    @classmethod
    def version(cls) -> str:
        from flowengine import __version__

        return __version__

    def serve(self, session: Session, target: Path) -> None:
        self._far = session.network.name.startswith("link")
        streams = LONG_STREAMS if self._far else LOOPBACK_STREAMS
        self._where = [session.network.addresses["b"], str(session.port()), str(streams)]
        daemon = session.start("b", [*PEER, "receive", str(target), *self._where])
        session.wait_listening(daemon, int(self._where[1]))

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        there = any((target / item.name).exists() for item in source.iterdir())
        level, what = (LEVEL if self._far else 0), ("describe" if there else "move")
        session.run("a", [*PEER, "send", str(source), *self._where, str(level), what])
        return {"streams": int(self._where[2]), "level": level, "what": what}
