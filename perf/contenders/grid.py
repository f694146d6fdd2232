"""Peers from the grid: GridFTP and XRootD."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from perf.contenders.base import Contender
from perf.session import Session

__all__ = ["GridFtp", "XRootD"]


class GridFtp(Contender):
    """globus-url-copy with four streams and two files at once, from the disk of the source to a server."""

    name = "gridftp"
    programs = ("globus-url-copy", "globus-gridftp-server")
    package = "globus-gass-copy-progs globus-gridftp-server-progs"
    version_argv = ("globus-url-copy", "-version")
    _port = 0

    def serve(self, session: Session, target: Path) -> None:
        self._port = session.port()
        command = [
            self.program("globus-gridftp-server"),
            "-p",
            str(self._port),
            "-aa",
            "-c",
            "none",
            "-disable-usage-stats",
        ]
        interface = session.network.addresses["b"]
        options = ["-control-interface", interface, "-data-interface", interface]
        if os.geteuid() == 0:
            options += ["-anonymous-user", "root", "-allow-root"]
        daemon = session.start("b", [*command, *options])
        session.wait_listening(daemon, self._port)

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        remote = f"ftp://{session.network.addresses['b']}:{self._port}{target}/"
        command = ["globus-url-copy", "-r", "-cd", "-fast", "-p", "4", "-cc", "2", "-pp"]
        session.run("a", [*command, f"file://{source}/", remote])
        return {}


class XRootD(Contender):
    """xrdcp with four streams and adler32 of whole files at both ends."""

    name = "xrootd"
    programs = ("xrdcp", "xrootd")
    package = "xrootd-client xrootd-server"
    version_argv = ("xrdcp", "--version")
    verifies = "adler32 of whole files"
    _port = 0

    def serve(self, session: Session, target: Path) -> None:
        self._port = session.port()
        admin = session.scratch / "xrootd"
        admin.mkdir(exist_ok=True)
        config = session.scratch / "xrootd.cfg"
        lines = [
            f"xrd.port {self._port}",
            f"oss.localroot {target.parent}",
            "all.export /",
            "xrootd.chksum adler32",
            f"all.adminpath {admin}",
            f"all.pidpath {admin}",
        ]
        config.write_text("\n".join([*lines, ""]))
        command = [self.program("xrootd"), "-c", str(config), "-n", "perf"]
        if os.geteuid() == 0:
            # The server refuses to be root; it gets the target instead.
            for path in (session.scratch, admin, target, *target.rglob("*")):
                shutil.chown(path, "xrootd", "xrootd")
            command += ["-R", "xrootd"]
        daemon = session.start("b", command)
        session.wait_listening(daemon, self._port)

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        remote = f"root://{session.network.addresses['b']}:{self._port}//{target.name}/"
        command = ["xrdcp", "--recursive", "--force", "--nopbar", "--streams", "4", "--cksum", "adler32"]
        entries = [str(path) for path in sorted(source.iterdir())]
        session.run("a", [*command, *entries, remote])
        return {}
