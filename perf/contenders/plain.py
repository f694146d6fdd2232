"""Peers without a protocol of their own: cp, tar through a socket, and casync over HTTP."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from perf.contenders.base import Contender
from perf.session import Session

__all__ = ["Casync", "Copy", "TarSocat"]


class Copy(Contender):
    """cp -a on one machine."""

    name = "cp"
    programs = ("cp",)
    local_only = True

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        session.run("b", ["cp", "-a", f"{source}/.", str(target)])
        return {}


class TarSocat(Contender):
    """tar piped through a TCP connection by socat: what one stream can do without any care."""

    name = "tar"
    programs = ("tar", "socat")
    package = "socat"
    version_argv = ("tar", "--version")

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        port, address = session.port(), session.network.addresses["b"]
        listen = f"socat -u -b 1048576 TCP-LISTEN:{port},reuseaddr STDOUT"
        unpack = f"{listen} | tar -xf - -C {shlex.quote(str(target))}"
        pack = f"tar -cf - -C {shlex.quote(str(source))} . | socat -u -b 1048576 STDIN TCP:{address}:{port}"
        receiver = session.start("b", ["bash", "-o", "pipefail", "-c", unpack], "receiver")
        session.wait_listening(receiver, port, "receiver")
        session.run("a", ["bash", "-o", "pipefail", "-c", pack])
        session.finish(receiver, "receiver")
        return {}


class Casync(Contender):
    """casync: chunks into a store at the source, fetched over HTTP, with the old target as seed."""

    name = "casync"
    programs = ("casync",)
    verifies = "SHA-512/256, every chunk"
    _port = 0

    def serve(self, session: Session, target: Path) -> None:
        self._port = session.port()
        (session.scratch / "casync").mkdir(exist_ok=True)
        server = [sys.executable, str(Path(__file__).with_name("file_server.py"))]
        words = [session.network.addresses["a"], str(self._port), str(session.scratch / "casync")]
        daemon = session.start("a", [*server, *words])
        session.wait_listening(daemon, self._port)

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        store, index = session.scratch / "casync" / "store.castr", session.scratch / "casync" / "tree.caidx"
        plain = ["--with=unix", f"--store={store}"]
        session.run("a", ["casync", "make", *plain, str(index), str(source)], "make")
        remote = f"http://{session.network.addresses['a']}:{self._port}"
        seeds = [f"--seed={target}"] if any(target.iterdir()) else []
        extract = ["casync", "extract", "--with=unix", f"--store={remote}/store.castr", *seeds]
        session.run("b", [*extract, f"{remote}/tree.caidx", str(target)])
        return {}
