"""Peers over ssh (rsync, scp, rclone by sftp) and the rsync daemon.

The ssh daemon is one of ours: keys, port and configuration live in the run's scratch directory. The cipher is
the fastest that OpenSSH has on machines with AES instructions, so that no peer loses to its default.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path
from typing import ClassVar

from perf.contenders.base import Contender
from perf.session import Session

__all__ = [
    "Rclone",
    "RsyncDaemon",
    "RsyncDaemonFsync",
    "RsyncDaemonZ",
    "RsyncSsh",
    "RsyncSshFsync",
    "RsyncSshZ",
    "Scp",
]

CIPHER = "aes128-gcm@openssh.com"


class OverSsh(Contender):
    """A contender that needs an ssh daemon at the target."""

    encrypts = "AES-128-GCM"
    port = 0

    def serve(self, session: Session, target: Path) -> None:
        self.port = session.port()
        folder = session.scratch / "ssh"
        if not folder.exists():
            folder.mkdir(mode=0o700)
            for key in ("host", "user"):
                session.run(
                    "b", ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], "keygen"
                )
            (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
        lines = [
            f"Port {self.port}",
            f"ListenAddress {session.network.addresses['b']}",
            f"HostKey {folder}/host",
            f"AuthorizedKeysFile {folder}/authorized",
            "PidFile none",
            "UsePAM no",
            # The remote shell must not spend the time of somebody's start-up files.
            f"SetEnv HOME={session.environment('b')['HOME']}",
            "StrictModes no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            "Subsystem sftp internal-sftp",
            "MaxStartups 100",
        ]
        (folder / "sshd_config").write_text("\n".join([*lines, ""]))
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where Debian's sshd confines itself
        daemon = session.start("b", [self.program("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")])
        session.wait_listening(daemon, self.port)

    def options(self, session: Session) -> list[str]:
        """What every ssh client gets, except for the port."""
        folder = session.scratch / "ssh"
        known = ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known"]
        return ["-F", "none", "-i", f"{folder}/user", *known, "-o", "BatchMode=yes", "-c", CIPHER, "-q"]

    def host(self, session: Session) -> str:
        return f"{getpass.getuser()}@{session.network.addresses['b']}"


class Scp(OverSsh):
    """scp -r, which knows neither resume nor delta."""

    name = "scp"
    programs = ("scp", "sshd", "ssh-keygen")
    package = "openssh-client openssh-server"
    version_argv = ("ssh", "-V")
    verifies = "in flight only"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        entries = [str(path) for path in sorted(source.iterdir())]
        options = [*self.options(session), "-P", str(self.port)]
        session.run("a", ["scp", "-r", "-p", *options, *entries, f"{self.host(session)}:{target}/"])
        return {}


class RsyncSsh(OverSsh):
    """rsync over ssh. It keeps partial files, and sends differences of changed ones."""

    name = "rsync-ssh"
    programs = ("rsync", "sshd", "ssh", "ssh-keygen")
    package = "rsync openssh-client openssh-server"
    verifies = "whole-file checksum of what it sent"
    extra: ClassVar[tuple[str, ...]] = ()

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        shell = " ".join(["ssh", *self.options(session), "-p", str(self.port)])
        command = ["rsync", "-a", "--partial", *self.extra, "-e", shell]
        session.run("a", [*command, f"{source}/", f"{self.host(session)}:{target}/"])
        return {}


class RsyncSshZ(RsyncSsh):
    """rsync over ssh that compresses with zstd."""

    name = "rsync-ssh-z"
    extra = ("--compress", "--compress-choice=zstd", "--compress-level=1")


class RsyncDaemon(Contender):
    """rsync's own daemon, in the clear."""

    name = "rsync-daemon"
    programs = ("rsync",)
    verifies = "whole-file checksum of what it sent"
    extra: ClassVar[tuple[str, ...]] = ()
    port = 0

    def serve(self, session: Session, target: Path) -> None:
        self.port = session.port()
        config = session.scratch / "rsyncd.conf"
        identity = ["uid = 0", "gid = 0"] if os.geteuid() == 0 else []
        lines = ["use chroot = no", *identity, "[target]", f"path = {target}", "read only = no"]
        config.write_text("\n".join([*lines, ""]))
        address = session.network.addresses["b"]
        command = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={self.port}"]
        daemon = session.start("b", [*command, f"--address={address}"])
        session.wait_listening(daemon, self.port)

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        remote = f"rsync://{session.network.addresses['b']}:{self.port}/target/"
        session.run("a", ["rsync", "-a", "--partial", *self.extra, f"{source}/", remote])
        return {}


class RsyncDaemonZ(RsyncDaemon):
    """rsync's own daemon with zstd."""

    name = "rsync-daemon-z"
    extra = ("--compress", "--compress-choice=zstd", "--compress-level=1")


class RsyncSshFsync(RsyncSsh):
    """rsync over ssh that syncs every file before it is renamed."""

    name = "rsync-ssh-fsync"
    syncs = "yes"
    extra = ("--fsync",)

    @classmethod
    def missing(cls) -> str:
        return super().missing() or _without_fsync()


class RsyncDaemonFsync(RsyncDaemon):
    """rsync's own daemon that syncs every file before it is renamed."""

    name = "rsync-daemon-fsync"
    syncs = "yes"
    extra = ("--fsync",)

    @classmethod
    def missing(cls) -> str:
        return super().missing() or _without_fsync()


def _without_fsync() -> str:
    """Why this rsync cannot sync; empty when it can."""
    done = subprocess.run(["rsync", "--help"], capture_output=True, text=True, check=False)
    return "" if "--fsync" in done.stdout else "this rsync is older than 3.2.4 and has no --fsync"


class Rclone(OverSsh):
    """rclone copy to an sftp remote, with its default of 4 transfers and 8 checkers."""

    name = "rclone"
    programs = ("rclone", "sshd", "ssh-keygen")
    package = "rclone openssh-server"
    version_argv = ("rclone", "version")
    verifies = "md5 or sha1 of whole files, read again"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        address = session.network.addresses["b"]
        remote = (
            f":sftp,host={address},port={self.port},user={getpass.getuser()},"
            f"key_file={session.scratch}/ssh/user,ciphers={CIPHER}:{target}"
        )
        config = ["--config", "/dev/null", "--links"]
        session.run("a", ["rclone", "copy", *config, str(source), remote])
        return {}
