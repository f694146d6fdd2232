"""Peers without a protocol of their own: cp, tar through a socket, and casync over HTTP; iperf3 as a reference."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from perf.contenders.base import Contender
from perf.data import total_size
from perf.session import RunFailedError, Session

__all__ = ["Casync", "Copy", "Iperf", "TarSocat"]


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


class Iperf(Contender):
    """iperf3 with eight streams for as many bytes as the tree has: what TCP carries, no file read or written."""

    name = "iperf3"
    programs = ("iperf3",)
    verifies = "nothing lands"
    reference = True

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        del target
        port, address = session.port(), session.network.addresses["b"]
        server = session.start("b", ["iperf3", "-s", "-1", "-p", str(port)], "server")
        session.wait_listening(server, port, "server")
        size = str(total_size(source)[0])
        output = session.run("a", ["iperf3", "-c", address, "-p", str(port), "-P", "8", "-n", size, "-J"])
        session.finish(server, "server")
        try:
            end = json.loads(output)["end"]
            return {
                "received_bits_per_s": round(end["sum_received"]["bits_per_second"]),
                "retransmits": end["sum_sent"]["retransmits"],
            }
        except (ValueError, KeyError) as error:
            raise RunFailedError(f"iperf3 gave no report: {error!r}") from None
